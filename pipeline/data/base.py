"""What every data choice offers: datasets for training and evaluation that do not overlap, and a fingerprint."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from transformers import PreTrainedTokenizerBase

from pipeline.models.base import TaskName


@dataclass(frozen=True)
class DataSpec:
    """What a model must know of the data to be built. None where it does not apply."""

    vocabulary: int | None = None
    sequence_length: int | None = None
    classes: int | None = None
    channels: int | None = None
    image_size: int | None = None


@dataclass(frozen=True)
class DataBundle:
    """Opened data. Each dataset is map-style and gives a dict of tensors without a batch dimension.

    Language: {"input_ids": int64 [T], "labels": int64 [T]} with T = `spec.sequence_length`; labels are the inputs
    (the shift is the task's). Images: {"pixel_values": float32 [C, H, W], "labels": int64 []}.
    """

    train: Dataset[dict[str, Any]]
    evaluation: Dataset[dict[str, Any]]
    spec: DataSpec
    fingerprint: str
    """sha256 of what was read, so that a lock file can say whether the data changed."""
    description: str
    """One line for the report: what, how much, how it was split."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """A `data` choice."""

    task: ClassVar[TaskName]
    name: str

    @abstractmethod
    def open(self, tokenizer: PreTrainedTokenizerBase | None) -> DataBundle:
        """Read (or memory-map from the cache) and split. Raises ConfigError where the source cannot serve."""

    def problems(self) -> list[str]:
        """What is wrong with these settings that types and ranges cannot say (a missing path). No torch import."""
        return []
