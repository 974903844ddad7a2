"""leanfit's side of a comparison: one link of compression, without recovery training, from Python."""

from __future__ import annotations

from typing import Any

import common
import torch
from torch import nn

from pipeline.app import compose
from pipeline.compression.base import Context
from pipeline.models.architecture import describe

BATCH = 16


def compress(model: nn.Module, calibration: torch.Tensor, method: str, settings: dict[str, Any]) -> nn.Module:
    if method == "none":
        return model
    typed = [f"compression.{method}.{key}={'null' if value is None else value}" for key, value in settings.items()]
    link = compose([f"compression={method}", *typed]).chain[method]
    batches = [{"input_ids": rows} for rows in calibration.split(BATCH)]
    context = Context(
        stage=method, architecture=describe(model), device="cpu", steps=0, seed=0, calibration=lambda: batches
    )
    return link.finalize(link.prepare(model, context), context)


if __name__ == "__main__":
    common.run(compress)
