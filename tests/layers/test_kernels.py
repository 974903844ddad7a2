import copy
import pickle

import pytest
import torch
from torch import nn

from pipeline.layers import kernels
from pipeline.layers.schemes import KINDS, empty_layer

CPU = torch.device("cpu")
HERE = [name for name in ("fbgemm", "fbgemm_split", "int_mm", "reference") if kernels.works(name, CPU)]


def integers_by_hand(x, layer):
    """W8A8 in int64 and float64: a reference of its own."""
    flat = x.double().reshape(-1, x.shape[-1])
    step = (x.reshape(-1, x.shape[-1]).abs().amax(1, keepdim=True) / 127.5).clamp_min(1e-30)
    q = (x.reshape(-1, x.shape[-1]) / step).round().clamp(-128, 127).long()
    y = (q @ layer.weight.long().t()).double() * step.double() * layer.weight_scale.double().view(1, -1)
    assert flat.shape == q.shape
    return (y + (0 if layer.bias is None else layer.bias.double())).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("kernel", [*HERE, "float"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (1, 1, 96), (2, 96), (5, 96), (2, 3, 96), (40, 96)])
def test_every_kernel_computes_the_same_products(kernel, bias, shape):
    torch.manual_seed(0)
    layer = KINDS["int8", nn.Linear].from_float(nn.Linear(96, 72, bias=bias))
    x = torch.randn(shape)
    # The largest is positive: it is the one that must be clipped to 127. No other is half-way between two integers.
    x[..., 0] = 3.1 * x.abs().max()
    with kernels.forced(kernel):
        y = layer(x)
    torch.testing.assert_close(y.double(), integers_by_hand(x, layer), rtol=1e-5, atol=1e-5)


def test_an_exact_kernel_is_found_and_the_saturating_one_is_not_taken():
    assert HERE
    assert kernels.choose(CPU, torch.float32, 1) == HERE[0]
    assert kernels.choose(CPU, torch.float64, 1) == "reference"


def test_tokens_do_not_see_each_other_unless_the_scale_is_shared():
    torch.manual_seed(0)
    layer = KINDS["int8", nn.Linear].from_float(nn.Linear(32, 8))
    x = torch.randn(4, 32)
    other = x.clone()
    other[1:] *= 100
    assert torch.equal(layer(x)[0], layer(other)[0])
    layer.share_flat = True
    assert not torch.equal(layer(x)[0], layer(other)[0])


@pytest.mark.skipif("fbgemm" not in HERE, reason="FBGEMM is not exact on this processor")
def test_the_integers_of_a_token_alone_are_those_of_quotients():
    torch.manual_seed(0)
    packed = kernels.fbgemm_pack(torch.eye(64, dtype=torch.int8), torch.ones(64, 1))  # the product shows the integers
    tokens = torch.randn(4000, 64) * torch.logspace(-20, 20, 4000)[:, None]
    peaks = tokens.abs().amax(1, keepdim=True)
    want = kernels.integers_of(tokens / (peaks / kernels.ACTIVATION_LEVELS))
    found = torch.cat([kernels.token_product(token, packed) for token in tokens.split(1)])
    steps = torch.tensor([[kernels.token_step(peak)] for peak in peaks.view(-1).tolist()], dtype=torch.float64)
    apart = ((found.double() / steps).round() - want).abs()
    assert {-127.0, -128.0, 127.0} <= set(want.view(-1).tolist())
    assert not apart[tokens.abs() == peaks].any()
    assert apart.max() <= 1
    assert apart.sum() <= 10  # of 256,000: those that lie on an edge but for rounding


def test_a_token_of_zeros_gives_the_bias():
    layer = KINDS["int8", nn.Linear].from_float(nn.Linear(32, 8))
    for rows in (1, 3, 40):
        torch.testing.assert_close(layer(torch.zeros(rows, 32)), layer.bias.expand(rows, 8))


@pytest.mark.parametrize("tokens", [1, 3])
def test_what_is_not_a_number_stays_so_and_the_tiniest_does_not_become_so(tokens):
    layer = KINDS["int8", nn.Linear].from_float(nn.Linear(32, 8))
    x = torch.randn(tokens, 32)
    x[0, 3] = torch.nan
    assert layer(x)[0].isnan().all()
    torch.testing.assert_close(layer(torch.full((tokens, 32), 1e-42)), layer.bias.expand(tokens, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_keep_their_dtype_and_come_near(dtype):
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    x = torch.randn(3, 64)
    y = KINDS["int8", nn.Linear].from_float(linear.to(dtype))(x.to(dtype))
    assert y.dtype == dtype
    exact = linear.float()(x)
    assert ((y.float() - exact).norm() / exact.norm()) < 0.02


def test_new_weights_are_used_after_load_copy_pickle_and_move():
    torch.manual_seed(0)
    linear = nn.Linear(32, 16)
    first = KINDS["int8", nn.Linear].from_float(linear)
    second = KINDS["int8", nn.Linear].from_float(nn.Linear(32, 16))
    x = torch.randn(1, 32)
    want, before = second(x), first(x)
    assert torch.equal(copy.deepcopy(first)(x), before)
    assert torch.equal(pickle.loads(pickle.dumps(first))(x), before)
    assert torch.equal(first.to("cpu")(x), before)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), want)
    made = empty_layer("int8", linear)
    made.load_state_dict(second.state_dict(), assign=True)
    assert torch.equal(made(x), want)


@pytest.mark.parametrize("kernel", HERE)
def test_a_token_alone_gives_what_it_gives_among_others(kernel):
    torch.manual_seed(0)
    layer = KINDS["int8", nn.Linear].from_float(nn.Linear(768, 40))
    x = torch.randn(12, 768)
    with kernels.forced(kernel):
        together = layer(x)
        for row, want in zip(x, together, strict=True):
            for shape in ((768,), (1, 768), (1, 1, 768)):
                torch.testing.assert_close(layer(row.view(shape)).view(-1), want, rtol=1e-6, atol=1e-6)


FBGEMM_HERE = [name for name in kernels.FBGEMM if name in HERE]
CUT = {"fbgemm": 1e-6, "fbgemm_split": 8e-6}
"""Error of a product of three digits beside its exact value, as norms: 2^-24 and 2^-20 of the peak an input."""


def weight_only(inputs, outputs, bias=True, **settings):
    settings = {"bits": 8, **settings}
    return KINDS["weight_only", nn.Linear].from_float(nn.Linear(inputs, outputs, bias=bias), **settings)


def product_by_hand(x, layer):
    bias = 0 if layer.bias is None else layer.bias.double()
    return x.double() @ (layer.integers().double() * layer.weight_scale.double()).t() + bias


@pytest.mark.parametrize("kernel", FBGEMM_HERE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (1, 1, 96)])
def test_a_token_of_floats_times_int8_weights_is_as_near_as_in_float(kernel, bias, shape):
    torch.manual_seed(0)
    layer, x = weight_only(96, 72, bias), torch.randn(shape)
    x[..., 5] = -4 * x.abs().max()
    with kernels.forced(kernel):
        y = layer(x)
    exact = product_by_hand(x, layer)
    assert y.dtype == torch.float32
    assert y.shape == exact.shape
    assert layer._packed.value is not None
    assert (y - exact).norm() / exact.norm() < CUT[kernel]


@pytest.mark.parametrize("kernel", FBGEMM_HERE)
def test_the_largest_digits_and_weights_do_not_saturate(kernel):
    layer = weight_only(128, 16, bias=False)
    signs = torch.tensor([1, -1]).repeat(64)
    layer.set_integers(torch.stack([signs * 127, signs.abs() * 127] * 8).to(torch.int8))
    for x in (signs.float(), torch.ones(128), -torch.ones(128), signs.roll(1) * 0.503937):
        with kernels.forced(kernel):
            y = layer(x.view(1, -1))
        torch.testing.assert_close(y.double(), product_by_hand(x.view(1, -1), layer), rtol=1e-6, atol=1e-6)


def test_weight_only_is_the_float_product_where_that_is_forced_or_tokens_are_many_or_a_gradient_flows():
    torch.manual_seed(0)
    layer, x = weight_only(96, 72), torch.randn(3, 96)
    want = nn.functional.linear(x, layer.dequantized(), layer.bias)
    assert torch.equal(layer(x), want)
    with kernels.forced("float"):
        assert torch.equal(layer(x[:1]), nn.functional.linear(x[:1], layer.dequantized(), layer.bias))
    x = x[:1].clone().requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad[0], layer.dequantized().sum(0))
    assert layer._packed.value is None


def test_a_weight_only_token_of_zeros_gives_the_bias_and_what_is_not_a_number_stays_so():
    layer = weight_only(32, 8)
    assert torch.equal(layer(torch.zeros(1, 32))[0], layer.bias)
    torch.testing.assert_close(layer(torch.full((1, 32), 1e-42))[0], layer.bias)
    x = torch.randn(1, 32)
    x[0, 3] = torch.nan
    assert layer(x).isnan().all()


@pytest.mark.parametrize("settings", [{}, {"bits": 4, "group_size": 16}], ids=["integers", "bags"])
def test_new_weight_only_weights_are_used_after_load_copy_and_pickle(settings):
    torch.manual_seed(0)
    first, second, x = weight_only(32, 16, **settings), weight_only(32, 16, **settings), torch.randn(1, 32)
    want, before = second(x), first(x)
    assert torch.equal(copy.deepcopy(first)(x), before)
    assert torch.equal(pickle.loads(pickle.dumps(first))(x), before)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), want)
    assert set(first.state_dict()) == {"bias", "weight_packed", "weight_shape", "weight_scale"}
