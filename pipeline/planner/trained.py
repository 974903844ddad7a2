"""What the fit of stage 0 begins with, in shapes: the model, its adapters, and what the first link holds compressed."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import nn

from pipeline import stage_input
from pipeline.chain import Stage
from pipeline.layers.nf4 import NF4Layer
from pipeline.layers.quantized import FloatLayer
from pipeline.planner.supposed import Supposing
from pipeline.schema import RunConfig


def adapted(config: RunConfig, stage: Stage, model: nn.Module) -> nn.Module:
    """What stage 0 trains of `model`, both on the meta device, in the dtypes that it has in the fit. In place."""
    context = stage_input.context_of(config, stage, model)
    model = config.precision.convert(model)
    with torch.device("meta"), Supposing(), mock.patch.object(NF4Layer, "from_float", classmethod(_with_room)):
        return stage_input.adapted(config, stage, model, context)


def _with_room(cls: type[NF4Layer], layer: FloatLayer, /, **settings: Any) -> NF4Layer:
    """The shapes of what `layer` becomes are those of the room for it: to find codes takes seconds for 8B weights."""
    return cls(layer, **settings).like(layer)
