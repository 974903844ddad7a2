"""Image classification: one class for each image. Accuracy, and images a second in batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from pipeline.data.loader import evaluation_loader
from pipeline.layers.blockwise import in_dtype_of
from pipeline.layers.sliced_loss import Criterion, cross_entropy
from pipeline.tasks.base import Batch, Quality, Speed, Task
from pipeline.tasks.measuring import inference, wait

if TYPE_CHECKING:
    from collections.abc import Sized

    from pipeline.data.base import DataBundle

SPEED_BATCH = 32
SPEED_SECONDS = 2.0
"""What all rounds of all models together may take, warm-up aside, as long as each model gets its `MIN_ROUNDS`."""
MIN_ROUNDS, MAX_ROUNDS = 5, 50
PROBE_IMAGES = 4


class ImageClassification(Task):
    """Batches: {"pixel_values": float32 [B, C, H, W], "labels": int64 [B]}."""

    name: ClassVar[str] = "image_classification"
    metric: ClassVar[str] = "accuracy"
    direction: ClassVar[Literal["lower", "higher"]] = "higher"
    unit: ClassVar[Literal["tokens/s", "samples/s"]] = "samples/s"

    def loss(self, model: nn.Module, batch: Batch, chunks: int = 1, criterion: Criterion | None = None) -> torch.Tensor:
        """Mean cross-entropy in nats an image, in float32 (float64 where the model computes in it)."""
        return (criterion or cross_entropy)(_logits(model, batch["pixel_values"]), batch["labels"])

    def count(self, batch: Batch) -> int:
        """Images."""
        return len(batch["labels"])

    def evaluate(self, model: nn.Module, data: DataBundle, batch_size: int, device: str) -> Quality:
        """Share of held-out images whose class has the largest logit, from 0 to 1."""
        accuracy = MulticlassAccuracy(num_classes=_classes(data), average="micro").to(device)
        nats, images = 0.0, 0
        with inference(model):
            for batch in evaluation_loader(data.evaluation, batch_size):
                logits, labels = _logits(model, batch["pixel_values"].to(device)), batch["labels"].to(device)
                accuracy.update(logits, labels)
                nats += cross_entropy(logits, labels, "sum").item()
                images += len(labels)
        return Quality(self.metric, self.direction, float(accuracy.compute()), nats / images, images)

    def baseline(self, data: DataBundle) -> float:
        """Accuracy on the evaluation split of always naming the class most frequent in training."""
        held_out = _counts(data, "evaluation")
        return float(held_out[_counts(data, "train").argmax()] / held_out.sum())

    def speed(self, models: Mapping[str, nn.Module], data: DataBundle, device: str) -> dict[str, Speed]:
        """Forward passes over one batch of 32 held-out images (fewer where there are fewer).

        Models take rounds of one pass in turns for about `SPEED_SECONDS`; `latency` is the seconds of a whole batch.
        """
        images = _first(data, SPEED_BATCH).to(device)
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for model in models.values():
            for _ in range(2):
                _forward_seconds(model, images)
        started = time.perf_counter()
        for turn in range(MAX_ROUNDS):
            for name, model in models.items():
                seconds[name].append(_forward_seconds(model, images))
            if turn + 1 >= MIN_ROUNDS and time.perf_counter() - started > SPEED_SECONDS:
                break
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        return {
            name: Speed(self.unit, len(images) / latency, latency, batch_size=len(images))
            for name, latency in medians.items()
        }

    def probe(self, data: DataBundle) -> Batch:
        """{"pixel_values": float32 [4, C, H, W]}: the first held-out images (fewer where there are fewer)."""
        return {"pixel_values": _first(data, PROBE_IMAGES)}


def _logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits [B, classes], in float32 at least."""
    logits = cast(torch.Tensor, model(pixel_values=in_dtype_of(model, images)).logits)
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _classes(data: DataBundle) -> int:
    if data.spec.classes is None:
        raise ValueError("the data's spec has no classes")
    return data.spec.classes


def _counts(data: DataBundle, split: Literal["train", "evaluation"]) -> torch.Tensor:
    """Images of each class: int64 [classes]."""
    counts = torch.zeros(_classes(data), dtype=torch.long)
    for batch in evaluation_loader(getattr(data, split), 256):
        counts += torch.bincount(batch["labels"], minlength=len(counts))
    return counts


def _first(data: DataBundle, images: int) -> torch.Tensor:
    held_out = min(images, len(cast("Sized", data.evaluation)))
    return torch.stack([data.evaluation[i]["pixel_values"] for i in range(held_out)])


def _forward_seconds(model: nn.Module, images: torch.Tensor) -> float:
    with inference(model):
        wait(images.device)
        started = time.perf_counter()
        _logits(model, images)
        wait(images.device)
        return time.perf_counter() - started
