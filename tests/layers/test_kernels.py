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
    x[..., 0] = 3.0 * x.abs().max()  # the largest is positive: it is the one that must be clipped to 127
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
