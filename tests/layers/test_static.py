"""Static int8 layers, against integers by hand; observers, against the values themselves."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.layers import kernels
from pipeline.layers.quantize import Grid, quantize_rows
from pipeline.layers.quantized import KINDS
from pipeline.layers.schemes import put
from pipeline.layers.static import BINS, Histogram

CPU = torch.device("cpu")
HERE = [*(name for name in ("fbgemm", "fbgemm_split", "int_mm", "reference") if kernels.works(name, CPU)), "float"]


def static(layer, scale):
    root = nn.ModuleDict({"layer": layer})
    weight = layer.weight.detach().flatten(1)
    return put(root, "layer", quantize_rows(weight, Grid(bits=8)), "int8_static", input_scale=torch.tensor([scale]))


def integers(x, scale):
    return (x / torch.tensor(scale)).round().clamp(-128, 127).long()


@pytest.mark.parametrize("kernel", HERE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (5, 96), (2, 3, 96), (40, 96)])
def test_every_kernel_gives_the_exact_integer_products(kernel, bias, shape):
    torch.manual_seed(0)
    layer = static(nn.Linear(96, 72, bias=bias), 0.02)
    x = torch.randn(shape)  # 2.54 is clipped: the range is not the largest magnitude
    x[..., 0], x[..., 1] = 4.0, -4.0
    with kernels.forced(kernel):
        y = layer(x)
        assert torch.equal(y, layer(x))
    sums = integers(x, 0.02) @ layer.weight.long().t()
    want = sums.double() * torch.tensor(0.02).double() * layer.weight_scale.double().view(-1)
    want = want + (layer.bias.double() if bias else 0)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 4])
def test_a_convolution_gives_the_exact_integer_sums(groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups)
    layer = static(copy.deepcopy(conv), 0.03)
    x = torch.randn(2, 4, 9, 9) * 2
    sums = nn.functional.conv2d(
        integers(x, 0.03).double(), layer.weight.double(), None, conv.stride, conv.padding, 1, groups
    )
    want = sums * torch.tensor(0.03).double() * layer.weight_scale.double().view(1, -1, 1, 1)
    torch.testing.assert_close(layer(x).double(), want + conv.bias.view(1, -1, 1, 1).double(), rtol=1e-5, atol=1e-5)


def test_inputs_do_not_see_each_other():
    layer = static(nn.Linear(32, 8), 0.05)
    x = torch.randn(4, 32)
    other = x.clone()
    other[1:] *= 100
    torch.testing.assert_close(layer(x)[0], layer(other)[0], rtol=0, atol=0)


def test_a_scale_that_is_loaded_anew_is_the_one_that_is_used():
    layer = static(nn.Linear(32, 8), 0.05)
    x = torch.randn(1, 32)
    layer(x)  # packs the weights
    state = {**layer.state_dict(), "input_scale": torch.tensor([0.5])}
    layer.load_state_dict(state)
    torch.testing.assert_close(layer(x), static_again(layer)(x))


def static_again(layer):
    fresh = KINDS["int8_static", nn.Linear](nn.Linear(32, 8))
    fresh.load_state_dict(layer.state_dict())
    return fresh


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.floats(1, 100), st.floats(1e-3, 1e3))
def test_a_percentile_is_the_sorted_values_up_to_a_bin(seed, percent, size):
    x = torch.randn(999, generator=torch.Generator().manual_seed(seed)) * size
    largest = float(x.abs().max())
    histogram = Histogram(largest)
    histogram(x[:500])
    histogram(x[500:])
    near = [float(x.abs().double().quantile(percent / 100, interpolation=way)) for way in ("lower", "higher")]
    width = largest / BINS
    assert near[0] - 2 * width <= histogram.percentile(percent) <= near[1] + 2 * width


def test_the_range_of_least_error_clips_a_lone_outlier_and_is_better_than_its_neighbours():
    x = torch.cat([torch.randn(100_000, generator=torch.Generator().manual_seed(0)), torch.tensor([40.0])])
    histogram = Histogram(40.0)
    histogram(x)
    limit = histogram.least_error()

    def error(limit):
        step = limit / 127.5
        return float((((x / step).round().clamp(-128, 127) * step) - x).double().square().sum())

    assert limit < 30
    assert error(limit) < error(40.0)
    assert error(limit) <= 1.05 * min(error(limit * factor) for factor in (0.5, 0.7, 0.9, 1.1, 1.3, 1.6))


@pytest.mark.parametrize("largest", [1e-35, 1e-38, 1e-40])
def test_inputs_so_small_that_a_bin_has_no_width_have_a_histogram_too(largest):
    x = torch.linspace(0, 1, 101) * largest
    histogram = Histogram(float(x.max()))
    histogram(x)
    assert int(histogram.counts.sum()) == 101
    assert histogram.percentile(50) == pytest.approx(largest / 2, rel=0.01)


def test_inputs_that_are_all_zero_have_a_histogram_too():
    histogram = Histogram(0.0)
    histogram(torch.zeros(10))
    assert histogram.percentile(99.0) == 0.0
    assert histogram.least_error() == 0.0
