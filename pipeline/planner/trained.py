"""What the fit of stage 0 begins with, in shapes: the model, its adapters, and what the first link holds compressed."""

from __future__ import annotations

import torch
from torch import nn

from pipeline import stage_input
from pipeline.chain import Stage
from pipeline.planner.fakes import faked, tracing
from pipeline.planner.supposed import Supposing
from pipeline.schema import RunConfig


def adapted(config: RunConfig, stage: Stage, model: nn.Module) -> nn.Module:
    """What stage 0 trains of `model`, both on the meta device, in the dtypes that it has in the fit. In place."""
    context = stage_input.context_of(config, stage, model)
    model = config.precision.convert(model)
    if not stage_input.beside_compressed(config, stage):
        with torch.device("meta"):
            return stage_input.adapted(config, stage, model, context)
    with tracing(config), Supposing():
        model = stage_input.adapted(config, stage, faked(model), context)
    return faked(model, device="meta")
