"""Quantized forms of nn.Conv2d, grouped and depthwise too: int8 W8A8, and weights alone in 2 to 8 bits.

W8A8 takes one activation scale a sample. Its integer products are carried in float convolutions: exact while a sum
stays below 2^24, which up to 1024 inputs of an output always do, and no framework here has a faster int8
convolution without a compile step. A scale stands for a whole output channel, at 4 bits too: filters are short.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.layers.kernels import ACTIVATION_LEVELS, SMALLEST, integers_of
from pipeline.layers.quantize import Grid, wide
from pipeline.layers.quantized import FloatLayer, IntegerLayer, QuantizedLayer, quantizes
from pipeline.layers.weight_only import WeightOnly


class Convolution(QuantizedLayer):
    """What the quantized forms of nn.Conv2d share: its geometry."""

    def take_geometry(self, layer: FloatLayer) -> None:
        conv = cast(nn.Conv2d, layer)
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.padding_mode, self.padded = conv.padding_mode, tuple(conv._reversed_padding_repeated_twice)
        # For the module around it: MobileNets pad by it.
        self.kernel_size, self.in_channels, self.out_channels = conv.kernel_size, conv.in_channels, conv.out_channels

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode == "zeros":
            return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        padded = F.pad(x, self.padded, mode=self.padding_mode)
        return F.conv2d(padded, weight, bias, self.stride, 0, self.dilation, self.groups)


@quantizes("int8", nn.Conv2d)
class Int8Conv2d(Convolution, IntegerLayer):
    """int8 weights per output channel, int8 activations per sample, exact integer sums."""

    packed = False

    def __init__(self, layer: FloatLayer, share_flat: bool = False) -> None:
        super().__init__(layer, Grid(bits=8))
        self.take_geometry(layer)

    def forward(self, x: Tensor) -> Tensor:
        values = wide(x)
        step = values.abs().amax((-3, -2, -1), keepdim=True).clamp_min_(SMALLEST).div_(ACTIVATION_LEVELS)
        sums = self.convolve(integers_of(values / step), self.weight.to(values.dtype), None)
        sums *= self.weight_scale.to(values.dtype).view(-1, 1, 1)
        if self.bias is None:
            return sums.mul_(step).to(x.dtype)
        return torch.addcmul(self.bias.to(values.dtype).view(-1, 1, 1), sums, step).to(x.dtype)

    @property
    def kernel(self) -> str:
        return "integers in float convolution"


@quantizes("weight_only", nn.Conv2d)
class WeightOnlyConv2d(Convolution, WeightOnly):
    """Packed weights of 2 to 8 bits, a scale for each output channel; float activations."""

    def __init__(self, layer: FloatLayer, bits: int, group_size: int | None = None, symmetric: bool = True) -> None:
        super().__init__(layer, bits, None, symmetric)
        self.take_geometry(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.dequantized().to(x.dtype), self.bias)
