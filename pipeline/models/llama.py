"""`model=llama`: RMSNorm, rotary positions, SwiGLU and grouped-query attention, built as transformers' Llama.

Touvron et al., 2023 (arXiv:2302.13971); grouped queries: Ainslie et al., 2023 (arXiv:2305.13245).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge, Lt

from pipeline.models.base import Model, TaskName
from pipeline.models.gpt import head_problems, token_sizes
from pipeline.registry import register

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from pipeline.data.base import DataSpec


@register("model", "llama")
@dataclass(frozen=True, kw_only=True)
class Llama(Model):
    """Sizes of the transformer.

    `intermediate`: the feed-forward's width; None for two thirds of four times the width, rounded up to a multiple of
    64, which keeps the parameter count of the ungated kind. `dropout` acts on the attention weights: Llama drops
    nothing else.
    """

    task: ClassVar[TaskName] = "causal_lm"

    layers: Annotated[int, Ge(1)]
    heads: Annotated[int, Ge(1)]
    key_value_heads: Annotated[int, Ge(1)]
    width: Annotated[int, Ge(1)]
    intermediate: Annotated[int, Ge(1)] | None
    dropout: Annotated[float, Ge(0), Lt(1)]
    tie_embeddings: bool

    def problems(self) -> list[str]:
        found = head_problems(self.heads, self.width)
        if not found and (self.width // self.heads) % 2:
            found.append(
                f"model.width={self.width} gives model.heads={self.heads} heads of {self.width // self.heads}, an odd "
                f"size that rotary positions cannot turn; choose a width that is a multiple of {2 * self.heads}"
            )
        if self.heads % self.key_value_heads:
            divisors = ", ".join(str(d) for d in range(1, self.heads + 1) if self.heads % d == 0)
            found.append(
                f"model.key_value_heads={self.key_value_heads} does not divide model.heads={self.heads}; "
                f"choose one of {divisors}"
            )
        return found

    def build(self, spec: DataSpec) -> LlamaForCausalLM:
        """Fresh float32 weights from the global torch seed; `spec` gives vocabulary and positions."""
        from transformers import LlamaConfig, LlamaForCausalLM

        vocabulary, positions = token_sizes(spec)
        config = LlamaConfig(
            vocab_size=vocabulary,
            max_position_embeddings=positions,
            hidden_size=self.width,
            intermediate_size=self.intermediate or 64 * -(-8 * self.width // (3 * 64)),
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            attention_dropout=self.dropout,
            tie_word_embeddings=self.tie_embeddings,
            # Llama's defaults (1 and 2) are real bytes here.
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        return LlamaForCausalLM(config)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        from pipeline.models.byte_tokenizer import byte_tokenizer

        return byte_tokenizer()
