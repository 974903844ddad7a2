"""`data=digits`: scikit-learn's handwritten digits (Alpaydin & Kaynak, 1998, UCI), 1,797 grey images of 8 x 8.

They come with scikit-learn, so nothing is downloaded. Every class is split in the same proportion; mean and deviation
are those of the training split. Enlarged images stay in memory: 7 MB at 32 pixels a side, 360 MB at 224.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from annotated_types import Ge, Gt, Lt

from pipeline.data.base import Data, DataBundle, DataSpec
from pipeline.models.base import TaskName
from pipeline.registry import register

if TYPE_CHECKING:
    import numpy as np
    from torch.utils.data import Dataset
    from transformers import PreTrainedTokenizerBase

    Rows = np.ndarray[Any, np.dtype[np.int64]]

SAMPLES, CLASSES, SIDE = 1797, 10, 8


@register("data", "digits")
@dataclass(frozen=True, kw_only=True)
class Digits(Data):
    """`image_size`: pixels a side after enlarging. `seed` chooses the split and nothing else."""

    task: ClassVar[TaskName] = "image_classification"

    image_size: Annotated[int, Ge(SIDE)]
    interpolation: Literal["nearest", "bilinear"]
    evaluation_fraction: Annotated[float, Gt(0), Lt(1)]
    seed: Annotated[int, Ge(0), Lt(2**32)]

    def problems(self) -> list[str]:
        held_out = math.ceil(SAMPLES * self.evaluation_fraction)
        if CLASSES <= held_out <= SAMPLES - CLASSES:
            return []
        low, high = CLASSES / SAMPLES, 1 - CLASSES / SAMPLES
        return [
            f"data.evaluation_fraction={self.evaluation_fraction} leaves a split without an image of each class; "
            f"choose {low:.3f} to {high:.3f}"
        ]

    def open(self, tokenizer: PreTrainedTokenizerBase | None) -> DataBundle:
        """Items are {"pixel_values": float32 [1, S, S], "labels": int64 []}."""
        import numpy as np
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, labels = digits.images.astype(np.float32), digits.target.astype(np.int64)
        train, held_out = split_by_class(labels, self.evaluation_fraction, self.seed)
        mean, deviation = float(images[train].mean()), float(images[train].std())

        def part(rows: Rows) -> Dataset[dict[str, Any]]:
            normalised = (images[rows] - mean) / deviation
            return _dataset(normalised, labels[rows], self.image_size, self.interpolation)

        return DataBundle(
            train=part(train),
            evaluation=part(held_out),
            spec=DataSpec(classes=CLASSES, channels=1, image_size=self.image_size),
            fingerprint=hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest(),
            description=f"handwritten digits: {len(train):,} images to train on, {len(held_out):,} held out, the "
            f"same share of each class; 8 x 8 grey, {self.interpolation} to {self.image_size} x {self.image_size}",
        )


def split_by_class(labels: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """(training rows, held-out rows), sorted: ceil(n x `fraction`) rows held out, each class in proportion."""
    import numpy as np
    from sklearn.model_selection import train_test_split

    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=fraction, stratify=labels, random_state=seed, shuffle=True
    )
    return np.sort(train), np.sort(held_out)


def _dataset(
    images: np.ndarray[Any, np.dtype[np.float32]],
    labels: Rows,
    size: int,
    interpolation: Literal["nearest", "bilinear"],
) -> Dataset[dict[str, Any]]:
    """A map-style dataset of images [N, 8, 8], enlarged to `size`."""
    import torch
    from torch.nn import functional
    from torch.utils.data import StackDataset

    pixels = functional.interpolate(torch.from_numpy(images).unsqueeze(1), size=(size, size), mode=interpolation)
    # StackDataset's annotations know no tensors and no keywords, though both are documented; its items are dicts.
    parts: dict[str, Any] = {"pixel_values": pixels, "labels": torch.from_numpy(labels)}
    return cast("Dataset[dict[str, Any]]", StackDataset(**parts))
