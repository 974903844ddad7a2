"""Calibration batches: samples of the training split (or of a text of its own), drawn by a seed, as model inputs."""

from __future__ import annotations

import os
from collections.abc import Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pipeline.calibration.settings import Calibration
from pipeline.data.base import DataBundle
from pipeline.data.loader import Batch, collate
from pipeline.data.tokens import File, Span, TokenWindows, encode, read_files
from pipeline.errors import ConfigError
from pipeline.models.byte_tokenizer import is_byte_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def calibration_batches(
    settings: Calibration, data: DataBundle, tokenizer: PreTrainedTokenizerBase | None, positions: int | None = None
) -> list[Batch]:
    """Batches of model inputs without labels: {"input_ids": int64 [B, T]}, or {"pixel_values": float32 [B, C, H, W]}.

    `positions`: the longest sequence the model takes, None where it has no limit.

    Raises:
        ConfigError: the source holds fewer samples than were asked for, or fits neither the model nor the data.
    """
    dataset = _source(settings, data, tokenizer, positions)
    held = len(cast(Sized, dataset))
    if held < settings.samples:
        of = f" of {dataset.windows.shape[1]} tokens" if isinstance(dataset, TokenWindows) else ""
        raise ConfigError(
            f"calibration.samples={settings.samples}: calibration.source={settings.source} holds {held} samples{of}; "
            + (f"choose at most {held}, or " if held else "choose ")
            + ("a shorter calibration.length, or more text" if of else "another source")
        )
    chosen = np.random.default_rng(settings.seed).choice(held, settings.samples, replace=False)
    batches = []
    for start in range(0, settings.samples, settings.batch_size):
        rows = [dataset[int(index)] for index in chosen[start : start + settings.batch_size]]
        batches.append({key: value for key, value in collate(rows).items() if key != "labels"})
    return batches


def _source(
    settings: Calibration, data: DataBundle, tokenizer: PreTrainedTokenizerBase | None, positions: int | None
) -> Any:
    own = settings.source != "train"
    if not isinstance(data.train, TokenWindows):
        if own or settings.length is not None:
            key = f"source={settings.source}" if own else f"length={settings.length}"
            raise ConfigError(f"calibration.{key} is for text; with this data leave it out")
        return data.train
    length = settings.length or data.train.windows.shape[1]
    if positions is not None and length > positions:
        raise ConfigError(f"calibration.length={length} is more than the model's {positions} positions; choose fewer")
    if not own:
        return TokenWindows(data.train.windows.reshape(-1), length)
    from pipeline.data.text import matching_files, tokenizer_of

    path = Path(os.path.expanduser(settings.source))
    paths = [path] if path.is_file() else sorted(matching_files(path, "**/*"))
    files = read_files(path.parent if path.is_file() else path, paths)
    return TokenWindows(_encoded(files, tokenizer_of(tokenizer), settings.samples * length), length)


def _encoded(files: list[File], tokenizer: PreTrainedTokenizerBase, enough: int) -> Any:
    """Tokens of `files` in order, until there are `enough` and half as many again to draw from."""
    parts, count = [np.empty(0, np.int64)], 0
    for file in files:
        for ids in encode(Span(file.path, 0, file.size, last=True), tokenizer, is_byte_tokenizer(tokenizer)):
            parts.append(ids)
            count += len(ids)
            if count >= enough + enough // 2:
                return np.concatenate(parts)
    return np.concatenate(parts)
