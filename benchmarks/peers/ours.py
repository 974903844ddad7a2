"""leanfit's side of a comparison: one link of compression, without recovery training, from Python."""

from __future__ import annotations

from typing import Any

import protocol
import torch
from torch import nn

import pipeline.layers.schemes  # noqa: F401  (what methods import when they first need it is no cost of theirs)
from pipeline.app import compose
from pipeline.compression.base import Context
from pipeline.models.architecture import describe

BATCH = 16


def prepare(method: str, settings: dict[str, Any], model: nn.Module) -> protocol.Compress:
    if method == "none":
        return lambda model, calibration: model
    typed = [f"compression.{method}.{key}={'null' if value is None else value}" for key, value in settings.items()]
    link = compose([f"compression={method}", *typed]).chain[method]

    def compress(model: nn.Module, calibration: torch.Tensor) -> nn.Module:
        batches = [{"input_ids": rows} for rows in calibration.split(BATCH)]
        context = Context(
            stage=method, architecture=describe(model), device="cpu", steps=0, seed=0, calibration=lambda: batches
        )
        return link.finalize(link.prepare(model, context), context)

    return compress


if __name__ == "__main__":
    protocol.run(prepare)
