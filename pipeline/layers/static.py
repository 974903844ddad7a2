"""int8 W8A8 with static activation scales: one for all inputs of a layer, found on a calibration set before.

Nothing is measured while the model runs, which is what accelerators without dynamic ranges want (Jacob et al., 2018,
arXiv:1712.05877; Wu et al., 2020, arXiv:2004.09602, compare the ways to choose a range). q = round(x / s) in
[-128, 127], s = range / 127.5 as compressed-tensors divides it; what lies outside of the range is clipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.errors import LeanfitError
from pipeline.layers import kernels
from pipeline.layers.blockwise import Segment
from pipeline.layers.conv import Convolution
from pipeline.layers.kernels import ACTIVATION_LEVELS, integers_of
from pipeline.layers.linear import KernelLinear
from pipeline.layers.pulse import alike
from pipeline.layers.quantize import Grid, wide
from pipeline.layers.quantized import FloatLayer, IntegerLayer, quantizes

ObserverName = Literal["minmax", "percentile", "mse"]
BINS = 8192
"""Of the histogram of magnitudes that `percentile` and `mse` read, from 0 to the largest."""
CANDIDATES = 200
"""Ranges that `mse` tries, evenly from the largest magnitude down."""


@quantizes("int8_static", nn.Linear)
class Int8StaticLinear(KernelLinear):
    """int8 weights per output channel, int8 activations at one scale, integer products (`layers/kernels.py`)."""

    input_scale: Tensor

    def __init__(self, layer: FloatLayer, input_scale: Tensor | None = None) -> None:
        """`input_scale`: [1]; None where a loader will fill it in."""
        super().__init__(layer)
        self.register_buffer("input_scale", _scale_for(layer, input_scale))

    def fused_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        assert self.product is not None
        return self.product(x, self.weight, self.weight_scale, self.input_scale, bias, setting=(0,))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and self.fuses(x):
            return self.fused_product(x, self.bias)
        return kernels.int8_linear_static(x, self.weight, self.weight_scale, self.input_scale, self.bias, self._packed)


@quantizes("int8_static", nn.Conv2d)
class Int8StaticConv2d(Convolution, IntegerLayer):
    """int8 weights per output channel, int8 activations at one scale; integers in a float convolution."""

    packed = False
    input_scale: Tensor

    def __init__(self, layer: FloatLayer, input_scale: Tensor | None = None) -> None:
        super().__init__(layer, Grid(bits=8))
        self.register_buffer("input_scale", _scale_for(layer, input_scale))
        self.take_geometry(layer)

    def forward(self, x: Tensor) -> Tensor:
        values = wide(x)
        step = self.input_scale.to(values.dtype)
        sums = self.convolve(integers_of(values / step), self.weight.to(values.dtype), None)
        sums *= (self.weight_scale.to(values.dtype) * step).view(-1, 1, 1)
        return (sums if self.bias is None else sums.add_(self.bias.view(-1, 1, 1))).to(x.dtype)

    @property
    def kernel(self) -> str:
        return "integers in float convolution"


def _scale_for(layer: FloatLayer, given: Tensor | None) -> Tensor:
    """`given` where the layer's weight is, or room for it: [1], in the weight's dtype."""
    empty = torch.empty(1, dtype=layer.weight.dtype, device=layer.weight.device)
    return empty if given is None else given.to(empty).clone()


def input_scales(
    segment: Segment, layers: Sequence[str], observer: ObserverName, percentile: float
) -> dict[str, Tensor]:
    """{layer: activation scale [1]} from all that the calibration set shows the named layers of `segment`.

    `minmax`: the largest magnitude is the range. `percentile`: the one that this many percent of the magnitudes do not
    exceed. `mse`: the one with the least squared error of the inputs. The latter two take a second pass.

    Raises:
        LeanfitError: a layer that is given NaN or infinity, or that the calibration set never reaches (it is named).
    """
    peaks = {name: _Peak() for name in layers}
    segment.observe(peaks)
    for name, peak in peaks.items():
        if peak.value is None:
            raise LeanfitError(
                f"int8_static: the calibration set never reaches {name}; leave it in float with `ignore`"
            )
        if not torch.isfinite(peak.value):
            raise LeanfitError(f"int8_static: the calibration inputs of {name} hold NaN or infinity")
    ranges = {name: float(peak.value) for name, peak in peaks.items() if peak.value is not None}
    if observer != "minmax":
        histograms = {name: Histogram(ranges[name]) for name in layers}
        segment.observe(histograms)
        for name, histogram in histograms.items():
            ranges[name] = histogram.percentile(percentile) if observer == "percentile" else histogram.least_error()
    scales = {}
    for name in layers:
        weight = segment.root.get_submodule(name).get_parameter("weight")
        scale = torch.tensor([ranges[name] / ACTIVATION_LEVELS], dtype=torch.float64)
        # A scale of zero, or one that underflows, cannot be divided by; compressed-tensors takes eps too.
        scale = scale.to(device=weight.device, dtype=weight.dtype)
        scales[name] = torch.where(scale == 0, torch.finfo(weight.dtype).eps, scale)
    return scales


class _Peak:
    """Largest magnitude seen; None before anything was."""

    value: Tensor | None = None

    def __call__(self, x: Tensor) -> None:
        if x.numel():
            peak = wide(x).abs().max()
            self.value = peak if self.value is None else torch.maximum(self.value, peak)


class Histogram:
    """How many magnitudes lie in each of BINS equal bins from 0 to `largest`."""

    def __init__(self, largest: float) -> None:
        self.largest = largest
        self.counts = torch.zeros(BINS, dtype=torch.int64)

    def __call__(self, x: Tensor) -> None:
        # In this order: the width of a bin of tiny magnitudes may be zero.
        bins = (wide(x).abs().flatten() / (self.largest or 1.0)).mul_(BINS).long().clamp_(max=BINS - 1)
        self.counts += torch.bincount(bins, minlength=BINS).cpu()

    def percentile(self, percent: float) -> float:
        """The magnitude that `percent` of all do not exceed, up to a bin's width."""
        share = self.counts.cumsum(0).double() / self.counts.sum()
        bins = int((share < percent / 100 - 1e-12).sum()) + 1
        return self.largest * bins / BINS

    def least_error(self) -> float:
        """The range with the least squared error of what is rounded and clipped, each bin at its middle."""
        middles = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (self.largest / BINS)
        best, best_error = self.largest, float("inf")
        for candidate in alike(range(CANDIDATES)):
            limit = self.largest * (1 - candidate / CANDIDATES)
            step = limit / ACTIVATION_LEVELS or 1.0
            rounded = integers_of(middles / step) * step
            error = float(((rounded - middles).square() * self.counts).sum())
            if error < best_error:
                best, best_error = limit, error
        return best
