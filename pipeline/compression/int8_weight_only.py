"""int8 weight-only: weights per output channel, rounded to nearest; activations and compute in float.

Saves disk and memory, not time: a layer multiplies by its dequantized weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.compression.base import Context, Kind, Method
from pipeline.registry import register

if TYPE_CHECKING:
    from torch import nn


def quantize_int8_weights(model: nn.Module, layers: Sequence[str]) -> nn.Module:
    """`model` with the weights of each named nn.Linear and nn.Conv2d as int8 per output channel, in place.

    Raises:
        LeanfitError: no layers, or NaN or infinity in a weight (the layer is named).
    """
    from pipeline.layers.schemes import quantize_layers

    return quantize_layers(model, layers, "int8_weight_only")


@register("compression", "int8_weight_only")
@dataclass(frozen=True, kw_only=True)
class Int8WeightOnly(Method):
    """`ignore`: module names, last components or fnmatch patterns of layers to leave in float."""

    kind: ClassVar[Kind] = "quantization"
    cannot_follow: ClassVar[frozenset[str]] = frozenset({"quantization"})

    ignore: tuple[str, ...]

    def preflight(self, model: nn.Module, context: Context) -> list[str]:
        from pipeline.layers.select import selection_problems

        return selection_problems(model, context.architecture, self.ignore, f"compression.{context.stage}")

    def finalize(self, model: nn.Module, context: Context) -> nn.Module:
        from pipeline.layers.select import select

        return quantize_int8_weights(model, select(model, context.architecture, self.ignore).layers)

    def detail(self, model: nn.Module, context: Context) -> dict[str, Any]:
        from pipeline.layers.schemes import quantization_detail

        return quantization_detail(model, context.architecture, self.ignore)
