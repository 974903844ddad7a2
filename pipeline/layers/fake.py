"""Fake-quantized linear layers and convolutions: float weights that compute as their quantized forms will.

Going forward, weights (and, for int8, activations) are rounded to the integers that conversion will store and back to
float, by the same operations in the same order, so that a converted layer gives the same outputs bit for bit (an int8
linear layer by the `float` kernel). Going back, rounding counts as the identity: the straight-through estimator of
Bengio et al., 2013 (arXiv:1308.3432), as Jacob et al., 2018 (arXiv:1712.05877) train with. Scales are made anew from
the weights at each forward pass and take no gradient.

A layer becomes fake-quantized by a change of its class: parameters, buffers (masks among them), hooks and their names
stay, and a checkpoint holds what the float model's does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.layers.kernels import ACTIVATION_LEVELS, SMALLEST, integers_of
from pipeline.layers.quantize import Grid, Quantized, at_least_float32, quantize_rows, wide
from pipeline.layers.quantized import form_of
from pipeline.layers.schemes import require_finite


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, found: Tensor) -> Tensor:
        ctx.dtype = value.dtype
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].to(ctx.dtype), None


def straight_through(value: Tensor, found: Tensor) -> Tensor:
    """`found`, with the gradient handed to `value` as it comes.

    Both of one shape; `found` was computed from `value` outside of autograd, in any dtype. The estimator gives zero
    where a grid clips. The grids here end at the largest magnitude of the moment, of a weight's group or a token: what
    lies beyond their last integer does so by rounding alone, and nothing is clipped.
    """
    return cast(Tensor, _StraightThrough.apply(value, found))  # type: ignore[no-untyped-call]


def fake_quantized(weight: Tensor, grid: Grid) -> Tensor:
    """`weight` [rows, ...] on the integers of `grid` and back, in its own dtype; gradients go straight through.

    The value is `quantize_rows(weight, grid).dequantized()`, rounded in float32 at least, whatever autocast says.
    """
    return straight_through(weight, _rounded(weight, grid).dequantized().view(weight.shape))


def _rounded(weight: Tensor, grid: Grid) -> Quantized:
    return quantize_rows(weight.detach().flatten(1), grid)


def _steps(values: Tensor, dimensions: int | tuple[int, ...] | None) -> Tensor:
    """Steps of dynamic symmetric int8 activations, one for what `dimensions` span (None: one for all)."""
    peaks = values.abs().amax().view([1] * values.ndim) if dimensions is None else values.abs().amax(dimensions, True)
    return peaks.clamp_min_(SMALLEST).div_(ACTIVATION_LEVELS)


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


class FakeInt8Linear(nn.Linear):
    """What `linear.Int8Linear` will compute; `share_flat` as there."""

    share_flat: bool

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        values = wide(rows)
        step = _steps(values, None if self.share_flat and x.ndim == 2 else -1)
        rows = straight_through(rows, integers_of(values / step).mul_(step))
        found = _rounded(self.weight, Grid(bits=8))
        weight = straight_through(self.weight, found.integers.to(values.dtype) * found.scale.to(values.dtype))
        y = F.linear(rows, weight, None if self.bias is None else self.bias.to(values.dtype)).view(*x.shape[:-1], -1)
        return y if _autocast(x) else y.to(x.dtype)


class FakeInt8Conv2d(nn.Conv2d):
    """What `conv.Int8Conv2d` will compute: integers convolved, then scaled. `share_flat` is for linear layers."""

    share_flat: bool

    def forward(self, x: Tensor) -> Tensor:
        values = wide(x)
        step = _steps(values, (1, 2, 3))
        found = _rounded(self.weight, Grid(bits=8))
        integers, scale = integers_of(values / step), found.scale.to(values.dtype).view(-1, 1, 1, 1)
        weight = found.integers.to(values.dtype).view(self.weight.shape)
        if _autocast(x):
            # Sums of integers leave the range of float16.
            inputs, weight = straight_through(x, integers * step), straight_through(self.weight, weight * scale)
            return cast(Tensor, self._conv_forward(inputs, weight, self.bias))
        # Through the division by a step the gradient is that of the value before it.
        inputs = straight_through(at_least_float32(x) / step, integers)
        sums: Tensor = self._conv_forward(inputs, straight_through(at_least_float32(self.weight) / scale, weight), None)
        sums = sums * scale.view(1, -1, 1, 1)
        if self.bias is None:
            return (sums * step).to(x.dtype)
        return torch.addcmul(self.bias.to(values.dtype).view(1, -1, 1, 1), sums, step).to(x.dtype)


class FakeWeightOnlyLinear(nn.Linear):
    """What `linear.WeightOnlyLinear` will compute."""

    grid: Grid

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, fake_quantized(self.weight, self.grid), self.bias)


class FakeWeightOnlyConv2d(nn.Conv2d):
    """What `conv.WeightOnlyConv2d` will compute: one scale an output channel, whatever the grid's groups."""

    grid: Grid

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self._conv_forward(x, fake_quantized(self.weight, self.grid.of(self.weight)), self.bias))


FAKE: dict[tuple[str, type[nn.Module]], type[nn.Module]] = {
    ("int8", nn.Linear): FakeInt8Linear,
    ("int8", nn.Conv2d): FakeInt8Conv2d,
    ("weight_only", nn.Linear): FakeWeightOnlyLinear,
    ("weight_only", nn.Conv2d): FakeWeightOnlyConv2d,
}
"""(scheme, float layer's class) -> class that computes, with float weights, as the scheme's layer will."""


def fake_quantize_layers(model: nn.Module, layers: Sequence[str], scheme: str, **settings: Any) -> nn.Module:
    """`model` with each of the named nn.Linear and nn.Conv2d computing as its form in `scheme` will, in place.

    `settings`: share_flat for int8; bits, group_size and symmetric for weight_only, as `schemes.quantize_layers` takes
    them, which converts the model once it is trained.

    Raises:
        LeanfitError: no layers, one without such a form, or a weight that holds NaN or infinity (the layer is named);
            nothing is changed then.
    """
    modules = require_finite(model, layers, f"fake quantization ({scheme})")
    forms = {name: form_of(FAKE, scheme, modules[name], name) for name in layers}
    attributes = settings if scheme == "int8" else {"grid": Grid(**settings)}
    for name, form in forms.items():
        layer = modules[name]
        layer.__class__ = form
        for key, value in attributes.items():
            setattr(layer, key, value)
    return model
