"""`model=gpt`: a pre-norm decoder-only transformer with learned positions, built as transformers' OPT with GELU.

OPT (Zhang et al., 2022, arXiv:2205.01068) rather than GPT-2 because its projections are `nn.Linear`, which every
quantization and pruning tool reads; GPT-2's are `Conv1D`, which they pass over in silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Lt

from pipeline.errors import ConfigError
from pipeline.models.base import Model, TaskName
from pipeline.registry import register

if TYPE_CHECKING:
    from transformers import OPTForCausalLM, PreTrainedTokenizerFast

    from pipeline.data.base import DataSpec


@register("model", "gpt")
@dataclass(frozen=True, kw_only=True)
class GPT(Model):
    """Sizes of the transformer; the feed-forward is four times the width."""

    task: ClassVar[TaskName] = "causal_lm"

    layers: Annotated[int, Ge(1)]
    heads: Annotated[int, Ge(1)]
    width: Annotated[int, Ge(1)]
    dropout: Annotated[float, Ge(0), Lt(1)]
    activation: Literal["gelu", "gelu_new", "relu", "silu"]
    tie_embeddings: bool

    def problems(self) -> list[str]:
        return head_problems(self.heads, self.width)

    def build(self, spec: DataSpec) -> OPTForCausalLM:
        """Fresh float32 weights from the global torch seed.

        One position a token of `spec.sequence_length`, one embedding an entry of `spec.vocabulary`.
        """
        from transformers import OPTConfig, OPTForCausalLM

        vocabulary, positions = token_sizes(spec)
        config = OPTConfig(
            vocab_size=vocabulary,
            max_position_embeddings=positions,
            hidden_size=self.width,
            ffn_dim=4 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            do_layer_norm_before=True,
            activation_function=self.activation,
            dropout=self.dropout,
            attention_dropout=self.dropout,
            tie_word_embeddings=self.tie_embeddings,
            # OPT's defaults (1 and 2) would zero the embedding of a real byte and end a text at another.
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        return OPTForCausalLM(config)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        from pipeline.models.byte_tokenizer import byte_tokenizer

        return byte_tokenizer()


def token_sizes(spec: DataSpec) -> tuple[int, int]:
    """Vocabulary and sequence length. Raises ConfigError for data without tokens."""
    if spec.vocabulary is None or spec.sequence_length is None:
        raise ConfigError(
            "data: a language model needs text, but this data has no tokens; choose data=pystdlib or data=text"
        )
    return spec.vocabulary, spec.sequence_length


def head_problems(heads: int, width: int) -> list[str]:
    """A message where `heads` does not divide `width`, with the counts that do (up to the width's 12 smallest)."""
    if width % heads == 0:
        return []
    divisors = [str(d) for d in range(1, min(width, 1024) + 1) if width % d == 0]
    return [f"model.heads={heads} does not divide model.width={width}; choose one of {', '.join(divisors[:12])}"]
