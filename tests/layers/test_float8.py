"""E4M3 layers, against torch's cast and compressed-tensors."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pipeline.layers import float8
from pipeline.layers.float8 import E4M3, find_scale, to_float8
from pipeline.layers.quantized import KINDS
from pipeline.layers.schemes import empty_layer

WEIGHTS = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel")
TOKENS = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="token", dynamic=True)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def fp8(layer, **settings):
    return KINDS["fp8", type(layer)].from_float(layer, **settings)


def dynamic_reference(layer, x):
    scale, _ = compute_dynamic_scales_and_zp(value=x, args=TOKENS, module=layer)
    return F.linear(fake_quantize(x, scale, None, TOKENS), layer.dequantized().to(x.dtype), layer.bias)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=30), st.sampled_from(DTYPES))
def test_weights_are_torchs_cast_of_what_the_scale_leaves(numbers, dtype):
    linear = nn.Linear(len(numbers), 1, bias=False)
    linear.weight.data = torch.tensor([numbers]).to(dtype)
    layer = fp8(linear)
    weight = linear.weight.detach().float()
    scale = layer.weight_scale.float()
    assert layer.weight.dtype == E4M3
    assert layer.weight_scale.dtype == dtype
    assert torch.equal(layer.weight.float(), (weight / scale).clamp(-448, 448).to(E4M3).float())
    largest = weight.abs().max()
    if largest / 448 > torch.finfo(dtype).smallest_normal:
        assert scale.item() == pytest.approx(largest.item() / 448, rel=2 * torch.finfo(dtype).eps)
        bound = (weight.abs() / 16).clamp_min(largest / 448 * 2**-10) + largest * torch.finfo(dtype).eps
        assert ((layer.dequantized().float() - weight).abs() <= bound * 1.01).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_those_of_compressed_tensors(dtype):
    torch.manual_seed(0)
    linear = nn.Linear(32, 16).to(dtype)
    layer = fp8(linear)
    theirs = quantize(linear.weight, layer.weight_scale, None, WEIGHTS, dtype=E4M3)
    differ = (theirs.float() != layer.weight.float()).float().mean()
    assert differ == 0 if dtype == torch.float32 else differ < 0.05  # they divide in 16 bits, these in 32


def test_zero_and_subnormal_rows_stay_finite_and_zeros_zero():
    linear = nn.Linear(8, 3, bias=False)
    linear.weight.data[0] = 0
    linear.weight.data[1] = 1e-42
    linear.weight.data[2, ::2] = 0
    found = fp8(linear).dequantized()
    assert torch.isfinite(found).all()
    assert (found[0] == 0).all()
    assert (found[2, ::2] == 0).all()


@pytest.mark.parametrize("shape", [(2, 5, 24), (7, 24), (1, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_dynamic_activations_are_those_of_compressed_tensors(shape, bias):
    torch.manual_seed(0)
    layer = fp8(nn.Linear(24, 16, bias=bias), activations="dynamic", share_flat=True)
    x = torch.randn(shape)
    assert torch.equal(layer(x), dynamic_reference(layer, x))
    assert layer.kernel == "float"
    apart = fp8(nn.Linear(24, 16, bias=bias), activations="dynamic", share_flat=False)
    assert torch.equal(apart(x), dynamic_reference(apart, x.view(-1, 1, 24)).view(*shape[:-1], 16))


def test_without_dynamic_activations_inputs_stay_and_gradients_flow():
    torch.manual_seed(0)
    layer = fp8(nn.Linear(24, 16))
    x = torch.randn(3, 24, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, F.linear(x, layer.dequantized(), layer.bias))
    assert torch.autograd.grad(y.sum(), x)[0].allclose(layer.dequantized().sum(0).expand(3, -1), atol=1e-5)


def test_the_gpus_product_is_the_same_arithmetic(monkeypatch):
    """torch._scaled_mm is stood in for by its definition; what is tested is padding, scales and bias around it."""

    def product(left, right, scale_a, scale_b, out_dtype, use_fast_accum):
        assert left.dtype == right.dtype == E4M3
        assert not any(size % 16 for size in (*left.shape, right.shape[1]))
        assert right.stride(0) == 1  # column-major, as the kernel demands
        return (left.float() * scale_a) @ (right.float() * scale_b).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    torch.manual_seed(0)
    for shape in ((2, 5, 24), (1, 24)):
        layer, x = fp8(nn.Linear(24, 18), activations="dynamic", share_flat=True), torch.randn(shape)
        plain = layer(x)
        with monkeypatch.context() as patch:
            patch.setattr(float8, "multiplies_float8", lambda device: True)
            assert layer.kernel == "scaled_mm"
            torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-5)
            with float8.kernels.forced("float"):
                assert torch.equal(layer(x), plain)


def test_a_nan_stays_one_and_an_infinity_does_not_pass_as_a_number():
    layer = fp8(nn.Linear(24, 16), activations="dynamic")
    x = torch.randn(2, 24)
    x[0, 1] = torch.nan
    x[1, 1] = torch.inf
    assert layer(x).isnan().all()


def test_a_change_of_dtype_spares_the_bytes():
    layer = fp8(nn.Linear(24, 16))
    before = layer.dequantized()
    layer.to(torch.bfloat16).float()
    assert layer.weight.dtype == E4M3
    torch.testing.assert_close(layer.dequantized(), before, rtol=1e-2, atol=1e-4)
    loaded = empty_layer("fp8", nn.Linear(24, 16), **layer.settings())
    loaded.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(loaded.dequantized(), layer.dequantized())


def test_a_convolution_is_torchs_on_the_dequantized_weight():
    conv = nn.Conv2d(6, 12, 3, stride=2, padding=1, groups=2)
    layer = fp8(conv, activations="dynamic", share_flat=False)
    x = torch.randn(2, 6, 9, 9)
    assert torch.equal(layer(x), F.conv2d(x, layer.dequantized(), conv.bias, 2, 1, 1, 2))
    assert layer.kernel == "dequantize"


def test_what_lies_beyond_the_range_is_clamped():
    assert to_float8(torch.tensor([1e6, -500.0]), torch.tensor(1.0)).float().tolist() == [448.0, -448.0]
    assert find_scale(torch.zeros(2), torch.float32).gt(0).all()
