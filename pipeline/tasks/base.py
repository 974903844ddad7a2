"""A task is the batch's schema, the loss, the metric, and how speed is measured. Model and data choices name one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from pipeline.data.base import DataBundle
    from pipeline.layers.sliced_loss import Criterion

Batch = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class Quality:
    """A metric over `n` held-out tokens or samples, and the mean loss in nats beside it."""

    metric: str
    direction: Literal["lower", "higher"]
    value: float
    loss: float
    n: int


@dataclass(frozen=True)
class Speed:
    """Median over repeats: units a second, and seconds for one unit of work (a decoded token, or one batch)."""

    unit: Literal["tokens/s", "samples/s"]
    per_second: float
    latency: float
    batch_size: int


class Task(ABC):
    name: ClassVar[str]
    metric: ClassVar[str]
    direction: ClassVar[Literal["lower", "higher"]]
    unit: ClassVar[Literal["tokens/s", "samples/s"]]

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, chunks: int = 1, criterion: Criterion | None = None) -> torch.Tensor:
        """Mean loss of a batch in nats, a float32 scalar with a graph; logits held for one of `chunks` parts only.

        `criterion`: what makes nats of logits and targets; None: cross-entropy by torch's operators, in slices.
        """

    @abstractmethod
    def count(self, batch: Batch) -> int:
        """Units (tokens or samples) in a batch, for throughput."""

    @abstractmethod
    def evaluate(self, model: nn.Module, data: DataBundle, batch_size: int, device: str) -> Quality:
        """The metric over the whole evaluation split; model in eval mode, restored to its former mode after."""

    @abstractmethod
    def baseline(self, data: DataBundle) -> float:
        """The metric of a model that learned nothing: unigram perplexity, majority-class accuracy."""

    @abstractmethod
    def speed(self, models: Mapping[str, nn.Module], data: DataBundle, device: str) -> dict[str, Speed]:
        """Speed of each model, measured in turns (A B A B ...) so that the machine's drift hits all alike."""

    @abstractmethod
    def probe(self, data: DataBundle) -> Batch:
        """A small fixed batch of model inputs (no labels) whose outputs the receipt compares."""
