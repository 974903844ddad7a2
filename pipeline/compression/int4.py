"""int4 weight-only: round to nearest, one scale for each `group_size` inputs, packed eight values to an int32.

The baseline that GPTQ (Frantar et al., 2023, arXiv:2210.17323) and AWQ are measured against. Saves disk and memory,
not time: a layer multiplies by its dequantized weight. Convolutions take one scale an output channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge

from pipeline.compression.base import Context, Kind, Method
from pipeline.registry import register

if TYPE_CHECKING:
    from torch import nn


def quantize_int4(model: nn.Module, layers: Sequence[str], group_size: int) -> nn.Module:
    """`model` with the weights of each named nn.Linear and nn.Conv2d as 4-bit integers, in place.

    `group_size` must divide the inputs of every named linear layer.

    Raises:
        LeanfitError: no layers, or NaN or infinity in a weight (the layer is named).
    """
    from pipeline.layers.schemes import quantize_layers

    return quantize_layers(model, layers, "int4", group_size=group_size)


@register("compression", "int4")
@dataclass(frozen=True, kw_only=True)
class Int4(Method):
    """`ignore`: module names, last components or fnmatch patterns of layers to leave in float."""

    kind: ClassVar[Kind] = "quantization"
    cannot_follow: ClassVar[frozenset[str]] = frozenset({"quantization"})

    group_size: Annotated[int, Ge(2)]
    ignore: tuple[str, ...]

    def preflight(self, model: nn.Module, context: Context) -> list[str]:
        from pipeline.layers.select import group_problems, select, selection_problems

        key = f"compression.{context.stage}"
        problems = selection_problems(model, context.architecture, self.ignore, key)
        if problems:
            return problems
        return group_problems(model, select(model, context.architecture, self.ignore).layers, self.group_size, key)

    def finalize(self, model: nn.Module, context: Context) -> nn.Module:
        from pipeline.layers.select import select

        return quantize_int4(model, select(model, context.architecture, self.ignore).layers, self.group_size)

    def detail(self, model: nn.Module, context: Context) -> dict[str, Any]:
        from pipeline.layers.schemes import quantization_detail

        return {**quantization_detail(model, context.architecture, self.ignore), "group_size": self.group_size}
