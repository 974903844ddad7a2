"""NF4 layers, against the paper's formulas written plainly and torch's own modules on the dequantized weight."""

import itertools
import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pipeline.layers.nf4 import VALUES, block_maxima, double_quantize, nf4_codes, nf4_values, unpack_values
from pipeline.layers.packing import pack_int32, unpack_int32
from pipeline.layers.quantized import KINDS
from pipeline.layers.schemes import empty_layer

SETTINGS = [
    {"block_size": 64, "double_quant": False},
    {"block_size": 64, "double_quant": True},
    {"block_size": 7, "double_quant": True},
    {"block_size": 1000, "double_quant": False},
]


def nf4(layer, block_size=64, double_quant=False):
    return KINDS["nf4", type(layer)].from_float(layer, block_size=block_size, double_quant=double_quant)


def test_the_values_are_the_quantiles_of_the_paper():
    """Quantiles at 2^3 even steps of probability below zero and 2^3 + 1 from it up, over the largest."""
    offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
    quantile = NormalDist().inv_cdf
    below = [-quantile(offset - step * (offset - 0.5) / 7) for step in range(7)]
    above = [quantile(0.5 + step * (offset - 0.5) / 8) for step in range(1, 9)]
    want = [value / above[-1] for value in (*below, 0.0, *above)]
    assert max(abs(value - other) for value, other in zip(VALUES, want, strict=True)) < 2e-6
    assert VALUES[7] == 0.0


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40))
def test_a_code_is_that_of_the_nearest_value(numbers):
    found = nf4_values(nf4_codes(torch.tensor(numbers)))
    for number, value in zip(numbers, found.tolist(), strict=True):
        assert abs(value - number) <= min(abs(v - number) for v in VALUES) + 1e-7


def test_every_value_has_a_code_of_its_own_and_zero_is_zero():
    codes = nf4_codes(torch.tensor(VALUES))
    assert sorted(codes.tolist()) == list(range(-8, 8))
    assert nf4_values(codes).tolist() == list(VALUES)
    assert nf4_codes(torch.zeros(1)).item() == 0


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 40), block=st.integers(2, 70), double=st.booleans(),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_dequantized_is_the_naive_block_by_block_rounding(rows, columns, block, double, seed):
    torch.manual_seed(seed)
    linear = nn.Linear(columns, rows, bias=False)
    layer = nf4(linear, block, double)
    flat, table = linear.weight.detach().flatten(), torch.tensor(VALUES)
    maxima = layer.maxima()
    want = torch.empty_like(flat)
    for index in range(math.ceil(flat.numel() / block)):
        part = slice(index * block, (index + 1) * block)
        if not double:
            assert maxima[index] == flat[part].abs().max()
        choices = table * maxima[index]
        want[part] = choices[(flat[part, None] - choices).abs().argmin(1)]
    torch.testing.assert_close(layer.dequantized().flatten(), want, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 5), columns=st.integers(1, 40), seed=st.integers(0, 1000))
def test_values_are_unpacked_as_they_were_packed(rows, columns, seed):
    codes = torch.randint(-8, 8, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = pack_int32(codes, 4)
    assert torch.equal(unpack_int32(packed, 4, columns), codes)
    assert torch.equal(unpack_values(packed, columns), nf4_values(codes))
    assert packed.shape[1] == math.ceil(columns / 8)


def test_the_error_is_below_half_the_widest_gap_of_its_block():
    torch.manual_seed(0)
    linear = nn.Linear(96, 50)
    layer = nf4(linear)
    gap = max(b - a for a, b in itertools.pairwise(VALUES))
    error = (layer.dequantized() - linear.weight).detach().abs()
    assert (error.flatten() <= layer.spread_maxima() * gap / 2 + 1e-6).all()


def test_normal_weights_come_nearer_than_on_four_bit_integers():
    torch.manual_seed(0)
    linear = nn.Linear(512, 256)
    nn.init.normal_(linear.weight)
    integers = KINDS["weight_only", nn.Linear].from_float(linear, bits=4, group_size=64)
    errors = [(layer.dequantized() - linear.weight).norm() for layer in (nf4(linear), nf4(linear, 64, True), integers)]
    assert errors[0] < 0.92 * errors[2]
    assert errors[1] < 1.01 * errors[0]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 700), st.integers(0, 100))
def test_double_quantization_is_the_mean_and_bytes_in_blocks_of_256(blocks, seed):
    torch.manual_seed(seed)
    maxima = torch.rand(blocks) * 3
    integers, scale, mean = double_quantize(maxima, torch.float32)
    assert (integers.dtype, len(integers), len(scale)) == (torch.int8, blocks, math.ceil(blocks / 256))
    assert mean.item() == pytest.approx(maxima.mean().item())
    for index, part in enumerate(maxima.split(256)):
        assert scale[index].item() == pytest.approx((part - mean).abs().max().item() / 127, abs=1e-6)
        found = integers[index * 256 : index * 256 + 256] * scale[index] + mean
        assert (found - part).abs().max() <= scale[index] / 2 * 1.01


def test_it_stores_half_a_byte_a_weight_and_a_byte_or_four_a_block():
    linear = nn.Linear(512, 512, bias=False)

    def stored(layer):
        return sum(t.numel() * t.element_size() for t in layer.state_dict().values())

    assert stored(nf4(linear)) == 512 * 512 / 2 + 4 * 4096
    assert stored(nf4(linear, 64, True)) == 512 * 512 / 2 + 4096 + 4 * 16 + 4


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_zeros_stay_zeros_in_masked_and_in_dead_blocks(settings):
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    linear.weight.data[torch.rand(32, 64) < 0.5] = 0
    linear.weight.data[3] = 0
    layer = nf4(linear, **settings)
    assert (layer.dequantized()[linear.weight == 0] == 0).all()
    assert torch.isfinite(layer.dequantized()).all()
    nn.init.zeros_(linear.weight)
    assert (nf4(linear, **settings).dequantized() == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("double", [False, True])
def test_dtypes_are_kept_and_change_with_the_model(dtype, double):
    torch.manual_seed(0)
    linear, table = nn.Linear(64, 16).to(dtype), nn.Embedding(8, 64).to(dtype)
    layer, rows = nf4(linear, 64, double), nf4(table, 64, double)
    assert layer(torch.randn(2, 64, dtype=dtype)).dtype == layer.dequantized().dtype == dtype
    assert rows(torch.tensor([1, 2])).dtype == dtype
    error = (layer.dequantized() - linear.weight).norm() / linear.weight.norm()
    assert error < 0.12
    assert rows.double()(torch.tensor([1])).dtype == torch.float64
    loaded = empty_layer("nf4", nn.Linear(64, 16), **layer.settings())
    loaded.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(loaded.dequantized(), layer.dequantized())


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_gradient_of_the_input_is_that_of_the_dense_layer(settings):
    torch.manual_seed(0)
    linear = nn.Linear(40, 24)
    layer = nf4(linear, **settings)
    x = torch.randn(3, 5, 40, dtype=torch.float32, requires_grad=True)
    y = layer(x)
    want = F.linear(x, layer.dequantized(), linear.bias)
    assert torch.equal(y, want)
    seed = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, seed)
    (dense,) = torch.autograd.grad(want, x, seed)
    torch.testing.assert_close(found, dense)


def test_no_float_weight_is_kept_between_forward_and_backward():
    layer = nf4(nn.Linear(64, 64))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(2, 64, requires_grad=True)).sum()
    assert [t for t in kept if t.numel() >= 64 * 64 and t.is_floating_point()] == []


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("columns", [5, 32])
def test_an_embedding_looks_up_the_dequantized_rows(settings, columns):
    layer = nf4(nn.Embedding(50, columns, padding_idx=3), **settings)
    ids = torch.randint(0, 50, (4, 7))
    assert torch.equal(layer(ids), layer.dequantized()[ids])
    assert layer(ids[:0]).shape == (0, 7, columns)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 9])
def test_a_bag_reduces_the_dequantized_rows(mode, padding):
    table = nn.EmbeddingBag(50, 20, mode=mode, padding_idx=padding)
    layer = nf4(table, 64, True)
    with torch.no_grad():
        table.weight.copy_(layer.dequantized())
    ids, offsets = torch.randint(0, 50, (23,)), torch.tensor([0, 4, 4, 11])
    torch.testing.assert_close(layer(ids, offsets), table(ids, offsets))


@pytest.mark.parametrize("groups", [1, 6])
def test_a_convolution_is_torchs_on_the_dequantized_weight(groups):
    conv = nn.Conv2d(6, 12, 3, stride=2, padding=1, groups=groups)
    layer = nf4(conv, 64, True)
    x = torch.randn(2, 6, 9, 9)
    assert torch.equal(layer(x), F.conv2d(x, layer.dequantized(), conv.bias, 2, 1, 1, groups))
    assert len(block_maxima(conv.weight, 64)) == math.ceil(conv.weight.numel() / 64)
