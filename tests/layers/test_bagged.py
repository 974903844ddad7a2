"""Few tokens times packed weights by embedding bags, beside the product by the dequantized weight in float64."""

import copy
import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.layers import bagged, kernels, quantized
from pipeline.layers.offload import offload_module, place_of
from pipeline.layers.schemes import KINDS
from tests.preempting import interrupted

if kernels.choose(torch.device("cpu"), torch.float32, 1) not in kernels.FBGEMM:
    pytest.skip("FBGEMM is not here", allow_module_level=True)


def made(inputs=96, outputs=72, bias=True, dtype=torch.float32, **chosen):
    chosen = {"bits": 4, "group_size": 32, **chosen}
    return KINDS["weight_only", nn.Linear].from_float(nn.Linear(inputs, outputs, bias=bias, dtype=dtype), **chosen)


def by_hand(x, layer):
    y = x.double() @ layer.dequantized().double().t()
    return y if layer.bias is None else y + layer.bias.double()


def largest_sums(x, layer, size):
    """Of the terms that are added: integers without sign, and what makes up for that."""
    steps = layer.weight_scale.double().repeat_interleave(size, 1)
    return (x.double().abs() @ steps.t()) * (1 << layer.bits)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    groups=st.integers(1, 6),
    size=st.integers(1, 20),
    outputs=st.integers(1, 40),
    symmetric=st.booleans(),
    bias=st.booleans(),
    tokens=st.integers(1, bagged.TOKENS[torch.float32]),
    seed=st.integers(0, 99),
)
def test_a_product_is_as_near_as_sums_in_float32_are(bits, groups, size, outputs, symmetric, bias, tokens, seed):
    torch.manual_seed(seed)
    layer = made(groups * size, outputs, bias, bits=bits, group_size=size, symmetric=symmetric)
    x = torch.randn(tokens, groups * size) * 10 ** torch.linspace(-3, 3, groups * size)
    y = layer(x)
    assert layer._packed.value is not None
    assert y.dtype == torch.float32
    assert ((y - by_hand(x, layer)).abs() <= 1e-6 * largest_sums(x, layer, size) + 1e-6).all()


@pytest.mark.parametrize("shape", [(96,), (1, 96), (1, 1, 96), (2, 4, 96), (8, 96)])
@pytest.mark.parametrize("chosen", [{}, {"group_size": None}, {"symmetric": False}, {"bits": 8, "symmetric": False}])
def test_any_shape_of_few_tokens_is_taken_and_any_group(shape, chosen):
    torch.manual_seed(0)
    layer, x = made(**chosen), torch.randn(shape)
    assert layer.kernel == "bags up to 8 tokens, then dequantize"
    torch.testing.assert_close(layer(x).double(), by_hand(x, layer), rtol=1e-5, atol=1e-5)
    assert layer._packed.value is not None


def test_inputs_may_lie_anyhow():
    torch.manual_seed(0)
    layer, x = made(), torch.randn(1, 96)
    want = by_hand(x, layer).expand(3, -1)
    for lying in (x.expand(3, -1), x.t().expand(-1, 3).t(), torch.randn(3, 192)[:, ::2].copy_(x)):
        torch.testing.assert_close(layer(lying).double(), want, rtol=1e-5, atol=1e-5)
    layer = made(1, 7, group_size=1)
    torch.testing.assert_close(layer(x[:, :1].expand(3, -1)).double(), by_hand(x[:, :1], layer).expand(3, -1))


def test_tokens_do_not_change_one_another():
    torch.manual_seed(0)
    layer, x = made(), torch.randn(8, 96)
    x[3] *= 1e6
    torch.testing.assert_close(layer(x), torch.cat([layer(row.view(1, -1)) for row in x]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "why",
    [
        "many tokens",
        "two in 16 bits",
        "a gradient",
        "in float64",
        "weights in another dtype",
        "forced",
        "no tokens",
        "compiled",
    ],
)
def test_else_it_is_the_product_by_the_dequantized_weight(why):
    torch.manual_seed(0)
    layer, x = made(), torch.randn(9 if why == "many tokens" else 0 if why == "no tokens" else 2, 96)
    if why == "a gradient":
        x.requires_grad_()
    if why == "two in 16 bits":
        layer, x = made(dtype=torch.bfloat16), x.bfloat16()
    if why == "in float64":
        x = x.double()
        layer.bias = nn.Parameter(layer.bias.double())
    if why == "weights in another dtype":
        layer = made(dtype=torch.bfloat16)
        layer.bias = nn.Parameter(layer.bias.float())
    if why == "compiled":
        exported = torch.export.export(layer, (x,))
        assert not [node for node in exported.graph.nodes if "bag" in str(node.target)]
    else:
        with kernels.forced("float" if why == "forced" else None):
            y = layer(x)
        assert torch.equal(y, nn.functional.linear(x, layer.dequantized().to(x.dtype), layer.bias))
    assert layer._packed.value is None


@pytest.mark.parametrize("chosen", [{}, {"bits": 8, "group_size": None}, {"symmetric": False}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_token_in_16_bits_is_rounded_once(dtype, chosen):
    torch.manual_seed(0)
    layer, x = made(dtype=dtype, **chosen), torch.randn(1, 1, 96, dtype=dtype)
    assert layer.kernel == "bags at one token, then dequantize"
    y = layer(x)
    assert y.dtype == dtype
    zeros = layer.zero_points()
    groups = layer.integers().double().view(72, layer.weight_scale.shape[1], -1) - (
        0 if zeros is None else zeros.double().unsqueeze(-1)
    )
    weight = (groups * layer.weight_scale.double().unsqueeze(-1)).view(72, 96)
    want = x.double() @ weight.t() + layer.bias.double()
    assert ((y - want).abs() <= 0.51 * torch.finfo(dtype).eps * want.abs() + 1e-5).all()
    assert layer._packed.value is not None


def test_zeros_give_the_bias_and_what_is_not_a_number_stays_so():
    layer, x = made(), torch.zeros(2, 96)
    assert torch.equal(layer(x), layer.bias.expand(2, -1))
    x[1, 5] = torch.nan
    y = layer(x)
    assert torch.equal(y[0], layer.bias)
    assert y[1].isnan().all()


def test_weights_are_held_once_with_the_bits_of_their_rows_and_a_scale_for_each_group():
    layer = made(128, 256, bits=3, group_size=64)
    layer(torch.randn(1, 128))
    packed = layer._packed.value
    assert packed.rows.numel() == 128 * (256 // 2 + 4)
    assert packed.scales.shape == (2, 1, 256)
    assert layer.weight_packed.numel() == 0


@pytest.mark.parametrize(
    "chosen", [{"bits": bits, "symmetric": even} for bits in (2, 3, 4, 8) for even in (True, False)]
)
def test_what_was_handed_to_the_kernel_is_as_it_was_for_all_others(chosen):
    torch.manual_seed(0)
    layer, x = made(96, 77, **chosen), torch.randn(20, 96)
    integers, weight, y = layer.integers(), layer.dequantized(), layer(x)
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer(x[:1])
    assert layer.weight_packed.numel() == 0
    assert torch.equal(layer.integers(), integers)
    assert torch.equal(layer.dequantized(), weight)
    assert torch.equal(layer.decoded_rows(19, 43), weight[19:43])
    assert torch.equal(layer(x), y)
    assert layer.weight_packed.numel() == 0
    again = layer.state_dict()
    assert all(torch.equal(tensor, stored[name]) and tensor.is_contiguous() for name, tensor in again.items())
    layer(x[:1])
    assert torch.equal(layer.to(torch.float64).weight_packed, stored["weight_packed"])
    layer.float()(x[:1])
    layer.set_integers(integers.flip(0))
    assert torch.equal(layer.integers(), integers.flip(0))


def test_weights_in_files_stay_there(tmp_path):
    torch.manual_seed(0)
    layer, x = made(), torch.randn(1, 96)
    want = nn.functional.linear(x, layer.dequantized(), layer.bias)
    offload_module(layer, tmp_path)
    assert torch.equal(layer(x), want)
    assert layer._packed.value is None
    assert place_of(layer.weight_packed) == tmp_path


def test_inference_mode_before_leaves_nothing_that_training_cannot_use():
    layer = made(48, 8, group_size=16)
    with torch.inference_mode():
        layer(torch.randn(1, 48))
    x = torch.randn(1, 48, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer(x.detach()).shape == (1, 8)


@pytest.mark.parametrize("first", ["stored", "handed over"])
def test_threads_that_share_a_layer_find_its_weight_in_one_form_or_the_other(first):
    """At whatever line one thread is, another may give the weight to the kernel, or take it back."""
    few, many = torch.randn(1, 64), torch.randn(40, 64)
    kind = KINDS["weight_only", nn.Linear]
    within = (
        kind.forward, kind.hand_over, kind.unsigned_rows, kind.integers, kind.decoded_rows, quantized.decoded_product
    )  # fmt: skip
    torch.manual_seed(0)
    made = kind.from_float(nn.Linear(64, 24), bits=4, group_size=32)
    expected = {x: made(x) for x in (many, few)}
    for x, expected_y in expected.items():
        for line in itertools.count():
            layer = copy.deepcopy(made)
            by = partial(layer, few)
            if first == "handed over":
                layer(few)
                by = layer.state_dict
            y, met = interrupted(partial(layer, x), by, line, *within)
            torch.testing.assert_close(y, expected_y, msg=lambda told, line=line: f"line {line}: {told}")
            torch.testing.assert_close(layer(many), expected[many])
            if not met:
                break
        assert line > 4
