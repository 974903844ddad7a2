"""torchao's side (0.18): `quantize_` with the configs that correspond to ours, and its quantization-aware training.

Run by the Python of its own virtual environment: see setup.py. It quantizes nn.Linear; the head, whose weight is the
token table's too, stays in float on both sides. Its result is saved as its documentation does, by torch.save of the
state dict.
"""

from __future__ import annotations

from typing import Any

import protocol
import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerGroup,
    PerRow,
    quantize_,
)
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

INTEGERS = {2: torch.int2, 3: torch.int3, 4: torch.int4, 8: torch.int8}


def base_config(method: str, settings: dict[str, Any]) -> AOBaseConfig:
    """What rounds at once."""
    if method.startswith("int4"):
        group = PerGroup(settings["group_size"])
        return IntxWeightOnlyConfig(weight_dtype=INTEGERS[settings["bits"]], granularity=group)
    if method == "int8_weight_only":
        return Int8WeightOnlyConfig(granularity=PerRow(), set_inductor_config=False)
    mapping = MappingType.ASYMMETRIC if method == "int8_qat" else MappingType.SYMMETRIC
    return Int8DynamicActivationInt8WeightConfig(
        granularity=PerRow(), act_mapping_type=mapping, set_inductor_config=False
    )


def training_config(method: str, settings: dict[str, Any]) -> QATConfig:
    """What rounds while it is trained; activations of a token have zero points, as it trains no others."""
    if method == "int4_qat":
        weight = IntxFakeQuantizeConfig(INTEGERS[settings["bits"]], group_size=settings["group_size"])
        return QATConfig(weight_config=weight, step="prepare")
    weight = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
    inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    return QATConfig(weight_config=weight, activation_config=inputs, step="prepare")


def linear(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and not name.endswith("lm_head")


def prepare(method: str, settings: dict[str, Any], model: nn.Module) -> protocol.Compress:
    if method == "none":
        return lambda model, draw: model

    def compress(model: nn.Module, draw: protocol.Draw) -> nn.Module:
        if method.endswith("_qat"):
            quantize_(model, training_config(method, settings), filter_fn=linear)
            protocol.fit(model, draw)
            quantize_(model, QATConfig(step="convert"), filter_fn=linear)
        quantize_(model, base_config(method, settings), filter_fn=linear)
        return model

    return compress


if __name__ == "__main__":
    protocol.run(prepare, protocol.save_state)
