"""Fake-quantized layers: the value is what conversion gives, the gradient goes straight through, the model stays."""

import copy
import math
from types import MethodType

import lightning.pytorch as lightning
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pipeline.errors import LeanfitError
from pipeline.layers import kernels
from pipeline.layers.fake import fake_quantize_layers, fake_quantized
from pipeline.layers.masks import HoldMasks
from pipeline.layers.quantize import Grid, dequantize_rows, quantize_rows
from pipeline.layers.quantized import KINDS
from pipeline.layers.schemes import quantize_layers
from pipeline.layers.sparsity import set_mask

INT8 = {"share_flat": False}


def four_bits(group_size=None, symmetric=True, bits=4):
    return {"bits": bits, "group_size": group_size, "symmetric": symmetric}


def one(layer, scheme, **chosen):
    """`layer`, fake-quantized in place."""
    return fake_quantize_layers(nn.ModuleDict({"layer": layer}), ["layer"], scheme, **chosen)["layer"]


def naive_symmetric(row, bits):
    """A row of floats to `bits` and back, by the formula, in float64."""
    high = 2 ** (bits - 1) - 1
    low = -high if bits == 8 else -high - 1
    scale = max(abs(value) for value in row) / (127 if bits == 8 else high + 0.5) or 1.0
    return [min(max(round(value / scale), low), high) * scale for value in row]


def naive_asymmetric(row, bits):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    least, most = min(0.0, *row), max(0.0, *row)
    scale = (most - least) / (high - low) or 1.0
    zero = min(max(round(low - least / scale), low), high)
    return [(min(max(round(value / scale) + zero, low), high) - zero) * scale for value in row]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_value_is_the_formula_s_group_by_group(bits, symmetric):
    torch.manual_seed(bits)
    weight = torch.randn(5, 24, dtype=torch.float64)
    naive = naive_symmetric if symmetric else naive_asymmetric
    want = [
        [value for start in range(0, 24, 8) for value in naive(row[start : start + 8], bits)] for row in weight.tolist()
    ]
    found = fake_quantized(weight, Grid(bits, 8, symmetric))
    torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert torch.equal(found, quantize_rows(weight, Grid(bits, 8, symmetric)).dequantized())
    assert found.unique().numel() <= 15 * 2**bits


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from([2, 3, 4, 8]), st.booleans(), st.sampled_from([None, 4]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 2**31),
)  # fmt: skip
def test_a_min_max_grid_clips_nothing_so_the_gradient_comes_back_as_it_came(bits, symmetric, size, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    spread = 10 ** (torch.rand(3, 1, generator=generator) * 4 - 3)
    weight = (torch.randn(3, 8, generator=generator) * spread).to(dtype).requires_grad_()
    found = fake_quantized(weight, Grid(bits, size, symmetric))
    given_back = torch.randn(3, 8, generator=generator).to(dtype)
    found.backward(given_back)
    assert found.dtype == weight.grad.dtype == dtype
    assert torch.equal(weight.grad, given_back)
    # What the estimator rests on: no value lies more than a step away from what it became.
    quantized = quantize_rows(weight.detach(), Grid(bits, size, symmetric))
    scale = quantized.scale.float()
    zero = None if symmetric else quantized.zero_point
    error = (dequantize_rows(quantized.integers, scale, zero) - weight.detach().float()).view(3, scale.shape[1], -1)
    # A scale so small that its dtype spaces it by the least that there is moves the ends by that, once a step.
    spacing = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert (error.abs() <= 1.1 * scale.unsqueeze(-1) + (1 << bits) * spacing / 2).all()


def naive_int8_linear(x, layer):
    """Rows of [tokens, in] times the int8 weight, by the formula, in Python's floats."""
    weight = [naive_symmetric(row, 8) for row in layer.weight.tolist()]
    bias = layer.bias.tolist() if layer.bias is not None else [0.0] * len(weight)
    out = []
    for token in x.tolist():
        step = max(max(abs(value) for value in token), 1e-30) / 127.5
        rounded = [min(max(round(value / step), -128), 127) * step for value in token]
        out.append(
            [
                math.fsum(a * b for a, b in zip(rounded, row, strict=True)) + c
                for row, c in zip(weight, bias, strict=True)
            ]
        )
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
def test_an_int8_linear_layer_computes_the_formula_and_gives_the_gradients_of_its_rounded_product(bias):
    torch.manual_seed(0)
    layer = one(nn.Linear(12, 5, bias=bias, dtype=torch.float64), "int8", **INT8)
    x = torch.randn(7, 12, dtype=torch.float64) * 10 ** torch.linspace(-3, 3, 7, dtype=torch.float64).unsqueeze(1)
    x[3] = 0
    x.requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, naive_int8_linear(x.detach(), layer), rtol=1e-12, atol=1e-14)
    given_back = torch.randn_like(y)
    y.backward(given_back)
    weight = torch.tensor([naive_symmetric(row, 8) for row in layer.weight.tolist()], dtype=torch.float64)
    step = x.detach().abs().amax(1, keepdim=True).clamp_min(1e-30) / 127.5
    rounded = (x.detach() / step).round().clamp(-128, 127) * step
    torch.testing.assert_close(x.grad, given_back @ weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.weight.grad, given_back.t() @ rounded, rtol=1e-12, atol=1e-12)
    if bias:
        torch.testing.assert_close(layer.bias.grad, given_back.sum(0))


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_an_int8_convolution_gives_the_gradients_of_its_rounded_product(groups, bias):
    torch.manual_seed(0)
    conv = one(nn.Conv2d(8, 16, 3, 2, 1, groups=groups, bias=bias, dtype=torch.float64), "int8", **INT8)
    x = torch.randn(3, 8, 9, 9, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1, 1)
    x.requires_grad_()
    y = conv(x)
    given_back = torch.randn_like(y)
    y.backward(given_back)
    step = x.detach().abs().amax((1, 2, 3), keepdim=True) / 127.5
    inputs = ((x.detach() / step).round().clamp(-128, 127) * step).requires_grad_()
    rows = [naive_symmetric(row, 8) for row in conv.weight.flatten(1).tolist()]
    weight = torch.tensor(rows, dtype=torch.float64).view(conv.weight.shape).requires_grad_()
    want = F.conv2d(inputs, weight, conv.bias, 2, 1, 1, groups)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    want.backward(given_back)
    torch.testing.assert_close(x.grad, inputs.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(conv.weight.grad, weight.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("share_flat", [True, False])
@pytest.mark.parametrize("shape", [(1,), (40,), (2, 20), (2, 3, 5)])
def test_an_int8_linear_layer_converts_without_a_difference(shape, share_flat, dtype):
    torch.manual_seed(1)
    layer = nn.Linear(48, 20).to(dtype)
    made = KINDS["int8", nn.Linear].from_float(copy.deepcopy(layer), share_flat=share_flat)
    x = torch.randn(*shape, 48).mul_(3).to(dtype)
    with kernels.forced("float"):
        want = made(x)
    found = one(layer, "int8", share_flat=share_flat)(x)
    assert found.requires_grad
    assert found.dtype == dtype
    assert torch.equal(found, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("scheme", "chosen"),
    [
        ("int8", INT8),
        *(("weight_only", four_bits(3, symmetric, bits)) for symmetric in (True, False) for bits in (2, 3, 4, 8)),
    ],
)
@pytest.mark.parametrize("groups", [1, 6])
def test_a_convolution_converts_without_a_difference(groups, scheme, chosen, dtype):
    torch.manual_seed(2)
    conv = nn.Conv2d(6, 12, 3, padding="same", groups=groups).to(dtype)
    made = KINDS[scheme, nn.Conv2d].from_float(copy.deepcopy(conv), **chosen)
    x = torch.randn(2, 6, 7, 7).to(dtype)
    assert torch.equal(one(conv, scheme, **chosen)(x), made(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_weight_only_linear_layer_converts_without_a_difference(bits, symmetric, dtype):
    torch.manual_seed(3)
    layer = nn.Linear(32, 10).to(dtype)
    layer.weight.data[0] = 0
    chosen = four_bits(16, symmetric, bits)
    made = KINDS["weight_only", nn.Linear].from_float(copy.deepcopy(layer), **chosen)
    x = torch.randn(2, 5, 32).to(dtype)  # more than the kernels for few tokens take
    assert torch.equal(one(layer, "weight_only", **chosen)(x), made(x))


@pytest.mark.parametrize(("scheme", "chosen"), [("int8", INT8), ("weight_only", four_bits(4))])
def test_parameters_masks_hooks_and_names_stay_as_they_are(scheme, chosen):
    class Own(nn.Linear):
        """A subclass is treated as the layer it is."""

    model = nn.Sequential(Own(8, 8), nn.Conv2d(4, 4, 1))
    set_mask(model[0], torch.rand(8, 8) > 0.5)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = [id(parameter) for parameter in model.parameters()]
    fake_quantize_layers(model, ["0", "1"], scheme, **chosen)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert parameters == [id(parameter) for parameter in model.parameters()]
    assert isinstance(model[0], nn.Linear)
    assert isinstance(model[1], nn.Conv2d)
    x = torch.randn(3, 8)
    assert not torch.equal(model[0](x), F.linear(x, before["0.weight"], before["0.bias"]))
    assert calls == [1]
    assert torch.equal(copy.deepcopy(model)[0](x), model[0](x))


@pytest.mark.parametrize(("scheme", "chosen"), [("int8", INT8), ("weight_only", four_bits(4, bits=2))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_rounding_is_float32_s_and_the_product_the_narrow_one(scheme, chosen, dtype):
    torch.manual_seed(4)
    layer = one(nn.Linear(64, 8), scheme, **chosen)
    conv = one(nn.Conv2d(64, 8, 3), scheme, **chosen)
    # Integers as large as these, summed over 576 inputs, would leave the range of float16.
    conv.weight.data.abs_()
    x, image = torch.rand(5, 64), torch.rand(2, 64, 4, 4) + 1
    exact, exact_image = layer(x), conv(image)
    with torch.autocast("cpu", dtype):
        y, z = layer(x), conv(image)
        narrow = layer(x.to(dtype))
    assert y.dtype == z.dtype == narrow.dtype == dtype
    torch.testing.assert_close(y.float(), exact, rtol=0.02, atol=0.02)
    torch.testing.assert_close(z.float(), exact_image, rtol=0.02, atol=0.02)
    (y.float().sum() + z.float().sum() + narrow.float().sum()).backward()
    for parameter in (*layer.parameters(), *conv.parameters()):
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize(("scheme", "chosen"), [("int8", INT8), ("weight_only", four_bits(4))])
def test_true_sixteen_bits_keep_their_dtype_and_stay_finite(scheme, chosen):
    torch.manual_seed(5)
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Conv2d(2, 4, 3)}).to(torch.bfloat16)
    fake_quantize_layers(model, ["a", "b"], scheme, **chosen)
    for name, x in (("a", torch.randn(3, 16)), ("b", torch.randn(1, 2, 5, 5))):
        x = x.to(torch.bfloat16).requires_grad_()
        y = model[name](x)
        y.sum().backward()
        assert y.dtype == x.grad.dtype == model[name].weight.grad.dtype == torch.bfloat16
        assert all(torch.isfinite(value).all() for value in (y, x.grad, model[name].weight.grad))


@pytest.mark.parametrize(("scheme", "chosen"), [("int8", INT8), ("weight_only", four_bits(4))])
def test_recomputed_blocks_give_the_same_gradients(scheme, chosen):
    from pipeline.memory.saving import apply_activation_checkpointing

    torch.manual_seed(6)
    model = nn.ModuleDict({"block": nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))})
    model.forward = MethodType(lambda self, x: self.block(x), model)
    fake_quantize_layers(model, ["block.0", "block.2"], scheme, **chosen)
    x = torch.randn(4, 8)
    model(x).pow(2).sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    apply_activation_checkpointing(model, ["block"], "full")
    model(x).pow(2).sum().backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(before, model.parameters(), strict=True))


class Masked(lightning.LightningModule):
    def __init__(self, scheme, chosen):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        for layer in (self.model[0], self.model[2]):
            set_mask(layer, torch.rand(layer.weight.shape) > 0.5)
        fake_quantize_layers(self.model, ["0", "2"], scheme, **chosen)
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append(float((self.model[0].weight == 0).float().mean()))
        return (self.model(batch[0]) - batch[1]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and on devices
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scheme", ["int8", "weight_only"])
def test_masked_weights_stay_zero_through_training_and_conversion(scheme, symmetric, tmp_path):
    chosen = INT8 if scheme == "int8" else four_bits(4, symmetric)
    module = Masked(scheme, chosen)
    kept = {name: module.model[name].weight_mask.clone() for name in (0, 2)}
    before = module.model[0].weight.detach().clone()
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(40, 8), torch.randn(40, 4)), 8)
    lightning.Trainer(
        max_steps=5, callbacks=[HoldMasks()], logger=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", default_root_dir=tmp_path, enable_checkpointing=False,
    ).fit(module, batches)  # fmt: skip
    assert len(module.seen) == 5
    assert not torch.equal(module.model[0].weight, before)
    x = torch.randn(3, 8)
    want = module.model(x)
    made = quantize_layers(module.model, ["0", "2"], scheme, **chosen)
    with kernels.forced("float"):
        assert torch.equal(made(x), want)
    for name, mask in kept.items():
        assert made[name].sparse
        assert (made[name].dequantized()[~mask] == 0).all()


def test_nothing_to_work_on_and_weights_that_are_no_numbers_are_errors():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(LeanfitError, match="no layer"):
        fake_quantize_layers(model, [], "int8", **INT8)
    model[1].weight.data[0, 0] = float("nan")
    with pytest.raises(LeanfitError, match="the weight of 1 holds NaN"):
        fake_quantize_layers(model, ["0", "1"], "int8", **INT8)
    assert type(model[0]) is nn.Linear
