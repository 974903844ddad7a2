"""Weight-only integers in groups, 4 bits unless said otherwise: round to nearest, packed.

The baseline that GPTQ (Frantar et al., 2023, arXiv:2210.17323) and AWQ are measured against. Saves disk and memory,
not time: a layer multiplies by its dequantized weight. Convolutions take one scale an output channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.compression.base import Context
from pipeline.compression.quantization import GroupQuantizer, TableQuantizer
from pipeline.registry import register

if TYPE_CHECKING:
    from torch import nn


def quantize_int4(
    model: nn.Module, layers: Sequence[str], group_size: int | None, bits: int = 4, symmetric: bool = True
) -> nn.Module:
    """`model` with the weights of each named layer as integers of `bits`, in place.

    `group_size` must divide the inputs of every named linear layer, and the width of every table.

    Raises:
        LeanfitError: no layers, or NaN or infinity in a weight (the layer is named).
    """
    from pipeline.layers.schemes import quantize_layers

    return quantize_layers(model, layers, "weight_only", bits=bits, group_size=group_size, symmetric=symmetric)


@register("compression", "int4")
@dataclass(frozen=True, kw_only=True)
class Int4(GroupQuantizer, TableQuantizer):
    """No settings but those of every grid of groups, and of every quantizer that knows tables."""

    def finalize(self, model: nn.Module, context: Context) -> nn.Module:
        return quantize_int4(model, self.layers(model, context), **self.grid_settings())
