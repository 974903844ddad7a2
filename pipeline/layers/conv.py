"""Quantized forms of nn.Conv2d, grouped and depthwise too: int8 W8A8, int8 weight-only, int4.

W8A8 takes one activation scale a sample. Its integer products are carried in float convolutions: exact while a sum
stays below 2^24, which up to 1024 inputs of an output always do, and no framework here has a faster int8
convolution without a compile step. A scale stands for a whole output channel, in int4 too: filters are short.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.layers.kernels import ACTIVATION_LEVELS, SMALLEST, integers_of
from pipeline.layers.quantized import FloatLayer, QuantizedLayer, quantizes


class _QuantizedConv2d(QuantizedLayer):
    def __init__(self, layer: FloatLayer, **settings: Any) -> None:
        settings.pop("group_size", None)
        super().__init__(layer, **settings)
        conv = cast(nn.Conv2d, layer)
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.dequantized().to(x.dtype), self.bias)

    def settings(self) -> dict[str, Any]:
        return {}


@quantizes("int8", nn.Conv2d)
class Int8Conv2d(_QuantizedConv2d):
    """int8 weights per output channel, int8 activations per sample, exact integer sums."""

    bits = 8
    packed = False
    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        step = wide.abs().amax((1, 2, 3), keepdim=True).clamp_min_(SMALLEST).div_(ACTIVATION_LEVELS)
        sums = self.convolve(integers_of(wide / step), self.weight.to(wide.dtype), None)
        sums *= self.weight_scale.to(wide.dtype).view(1, -1, 1, 1)
        if self.bias is None:
            return sums.mul_(step).to(x.dtype)
        return torch.addcmul(self.bias.to(wide.dtype).view(1, -1, 1, 1), sums, step).to(x.dtype)

    @property
    def kernel(self) -> str:
        return "integers in float convolution"


@quantizes("int8_weight_only", nn.Conv2d)
class Int8WeightOnlyConv2d(_QuantizedConv2d):
    """int8 weights per output channel, float activations."""

    bits = 8
    packed = False


@quantizes("int4", nn.Conv2d)
class Int4Conv2d(_QuantizedConv2d):
    """4-bit weights per output channel, packed eight to an int32, float activations."""

    bits = 4
    packed = True
