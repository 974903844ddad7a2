"""Quantization-aware training to weights of few bits in groups: train with their rounding, then round and pack.

Krishnamoorthi, 2018 (arXiv:1806.08342), with the straight-through estimator of Bengio et al., 2013 (arXiv:1308.3432).
Scales follow the weights: each forward pass finds them anew, as `int4` finds them once. The result is `int4`'s, with
weights that have adapted to their grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipeline.compression.base import Context
from pipeline.compression.quantization import GroupQuantizer, QuantizationAware
from pipeline.registry import register

if TYPE_CHECKING:
    from torch import nn


def prepare_int4_qat(
    model: nn.Module, layers: Sequence[str], group_size: int | None, bits: int = 4, symmetric: bool = True
) -> nn.Module:
    """`model` with each named nn.Linear and nn.Conv2d computing, in place, with weights of `bits`; to be trained.

    `group_size` must divide the inputs of every named linear layer. Names and values in the state dict stay.

    Raises:
        LeanfitError: no layers, or NaN or infinity in a weight (the layer is named).
    """
    from pipeline.layers.fake import fake_quantize_layers

    return fake_quantize_layers(model, layers, "weight_only", bits=bits, group_size=group_size, symmetric=symmetric)


def convert_int4_qat(
    model: nn.Module, layers: Sequence[str], group_size: int | None, bits: int = 4, symmetric: bool = True
) -> nn.Module:
    """The trained `model` with the weights of each named layer as packed integers, in place; masked ones are zero.

    Raises:
        LeanfitError: no layers, or NaN or infinity in a weight (the layer is named).
    """
    from pipeline.layers.schemes import quantize_layers
    from pipeline.layers.sparsity import apply_masks

    apply_masks(model)
    return quantize_layers(model, layers, "weight_only", bits=bits, group_size=group_size, symmetric=symmetric)


@register("compression", "int4_qat")
@dataclass(frozen=True, kw_only=True)
class Int4Qat(QuantizationAware, GroupQuantizer):
    """No settings but those of every grid of groups, and of every quantizer that trains."""

    untrained: ClassVar[str] = "int4"

    def prepare(self, model: nn.Module, context: Context) -> nn.Module:
        return prepare_int4_qat(model, self.layers(model, context), **self.grid_settings())

    def finalize(self, model: nn.Module, context: Context) -> nn.Module:
        return convert_int4_qat(model, self.layers(model, context), **self.grid_settings())
