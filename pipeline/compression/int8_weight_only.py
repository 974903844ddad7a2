"""int8 weight-only: weights per output channel, rounded to nearest; activations and compute in float.

Saves disk and memory, not time: a layer multiplies by its dequantized weight. Embedding tables too, if asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.compression.base import Context
from pipeline.compression.quantization import TableQuantizer
from pipeline.registry import register

if TYPE_CHECKING:
    from torch import nn


def quantize_int8_weights(model: nn.Module, layers: Sequence[str]) -> nn.Module:
    """`model` with the weights of each named layer as int8 per output channel (or row of a table), in place.

    Raises:
        LeanfitError: no layers, or NaN or infinity in a weight (the layer is named).
    """
    from pipeline.layers.schemes import quantize_layers

    return quantize_layers(model, layers, "weight_only", bits=8)


@register("compression", "int8_weight_only")
@dataclass(frozen=True, kw_only=True)
class Int8WeightOnly(TableQuantizer):
    """No settings but those of every quantizer that knows tables."""

    def form(self, context: Context) -> tuple[str, dict[str, Any]]:
        return "weight_only", {"bits": 8}

    def finalize(self, model: nn.Module, context: Context) -> nn.Module:
        return quantize_int8_weights(model, self.layers(model, context))
