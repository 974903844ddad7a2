"""What every model choice offers: `build`, a tokenizer where there is one, and the description of its architecture.

The description says where the blocks, attention projections, feed-forward pairs, norms and tied weights of a model
are. Pruning, quantization, activation checkpointing and tensor-parallel plans read it, so that none of them knows a
model by name.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from pipeline.data.base import DataSpec

TaskName = Literal["causal_lm", "image_classification"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A `model` choice: sizes in, an initialised `torch.nn.Module` out."""

    task: ClassVar[TaskName]
    name: str

    @abstractmethod
    def build(self, spec: DataSpec) -> nn.Module:
        """The model with fresh (or pretrained) float32 weights, in train mode; a transformers `PreTrainedModel`.

        Under `torch.device("meta")` it allocates nothing.
        """

    def build_offloaded(self, spec: DataSpec, dtype: torch.dtype, directory: Path) -> nn.Module:
        """As `build`; pretrained weights, in `dtype`, may lie in files in `directory` instead of in memory."""
        return self.build(spec)

    def weight_files(self) -> list[Path]:
        """Local safetensors of pretrained weights, which `build` maps and `build_offloaded` copies; none where
        there are none."""
        return []

    def assembled(self, spec: DataSpec, weights: dict[str, Tensor]) -> nn.Module:
        """What `build` makes of a checkpoint's tensors, here given by name instead of lying in `weight_files`. They are
        taken out of `weights`."""
        raise NotImplementedError

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that belongs to the model; None where the task has none."""
        return None

    def note(self) -> str | None:
        """One line on what runs where that is not quite what was named; None where it is."""
        return None

    def problems(self) -> list[str]:
        """What is wrong with these settings that types and ranges cannot say. Must not import torch."""
        return []


@dataclass(frozen=True)
class Attention:
    """Names of one attention's projections, relative to the root module, and its head counts.

    `query`, `key`, `value` are equal where the projections are fused.
    """

    query: str
    key: str
    value: str
    output: str
    heads: int
    key_value_heads: int


@dataclass(frozen=True)
class FeedForward:
    """Names of one feed-forward's linears: `gate` is None for the ungated kind, and `up` where they are one layer."""

    up: str
    down: str
    gate: str | None = None

    @property
    def fused(self) -> bool:
        """Whether gate and way up are the halves of one layer."""
        return self.up == self.gate


@dataclass(frozen=True)
class InvertedBottleneck:
    """Names of an inverted bottleneck's 1x1 convolutions: `expand` to its inner channels, `project` back."""

    expand: str
    project: str


@dataclass(frozen=True)
class Block:
    """One repeated block: its own name, its parts, its norms in the order of the forward pass."""

    name: str
    attention: Attention | None = None
    feed_forward: FeedForward | None = None
    norms: tuple[str, ...] = ()
    inverted_bottleneck: InvertedBottleneck | None = None


@dataclass(frozen=True)
class Architecture:
    """Where things are in a model. All names are those of `model.named_modules()`.

    `tied` lists groups of parameter names that share one storage. `head` is the last projection (the vocabulary's or
    the classes'), None where there is none.
    """

    blocks: tuple[Block, ...]
    embeddings: tuple[str, ...] = ()
    final_norm: str | None = None
    head: str | None = None
    tied: tuple[tuple[str, ...], ...] = ()
