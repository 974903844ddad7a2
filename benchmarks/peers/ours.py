"""leanfit's side of a comparison: one link of compression from Python; one that trains does so by the common loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import protocol
import torch
from torch import nn

# What methods import when they first need it is no cost of theirs.
import pipeline.layers.depth
import pipeline.layers.schemes
import pipeline.layers.structure_importance
import pipeline.layers.structure_plan
import pipeline.parallelism.shards  # noqa: F401
from pipeline.artifact import store
from pipeline.composing import compose
from pipeline.compression.base import Context
from pipeline.models.architecture import describe

BATCH = 16


def prepare(method: str, settings: dict[str, Any], model: nn.Module) -> protocol.Compress:
    if method == "none":
        return lambda model, draw: model
    typed = [f"compression.{method}.{key}={'null' if value is None else value}" for key, value in settings.items()]
    link = compose([f"compression={method}", *typed]).chain[method]
    trains = method.endswith("_qat")

    def compress(model: nn.Module, draw: protocol.Draw) -> nn.Module:
        def batches() -> list[dict[str, torch.Tensor]]:
            split = protocol.split(draw.calibration, BATCH)
            return [{name: rows for name, rows in batch.items() if name != "labels"} for batch in split]

        model = link.entering(model)
        steps = draw.steps if trains else 0
        context = Context(
            stage=method, architecture=describe(model), device="cpu", steps=steps, seed=0, calibration=batches
        )
        model = link.prepare(model, context)
        if trains:
            protocol.fit(model, draw)
        return link.finalize(model, context)

    return compress


def save(model: nn.Module, directory: Path) -> None:
    probe = {"input_ids": torch.arange(8)[None]} if describe(model).embeddings else {"pixel_values": _image(model)}
    store.save(model, directory / "artifact", chain=[], probe=probe)


def _image(model: nn.Module) -> torch.Tensor:
    config: Any = model.config
    return torch.zeros(1, config.num_channels, config.image_size, config.image_size)


if __name__ == "__main__":
    protocol.run(prepare, save)
