"""int8 W8A8: weights per output channel, activations dynamic per token, integer products.

Round to nearest, symmetric, no calibration (Dettmers et al., 2022, arXiv:2208.07339, without its outlier path;
compressed-tensors' dynamic W8A8). Convolutions too: see layers/conv.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.compression.base import Context
from pipeline.compression.quantization import Int8Quantizer
from pipeline.registry import register

if TYPE_CHECKING:
    from torch import nn


def quantize_int8(model: nn.Module, layers: Sequence[str], share_flat: bool = False) -> nn.Module:
    """`model` with each named nn.Linear and nn.Conv2d replaced, in place, by its int8 W8A8 form.

    `share_flat`: linear layers that are given [rows, in] take one activation scale for all rows, as compressed-tensors
    does; right for language models (see layers/linear.py).

    Raises:
        LeanfitError: no layers, or NaN or infinity in a weight (the layer is named).
    """
    from pipeline.layers.schemes import quantize_layers

    return quantize_layers(model, layers, "int8", share_flat=share_flat)


@register("compression", "int8")
@dataclass(frozen=True, kw_only=True)
class Int8(Int8Quantizer):
    """Dynamic W8A8; no settings but `ignore`."""

    def finalize(self, model: nn.Module, context: Context) -> nn.Module:
        return quantize_int8(model, self.layers(model, context), share_flat=self.share_flat(context))
