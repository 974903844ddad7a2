"""LoRA and DoRA layers, against their papers' formulas written plainly."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.layers.lora import (
    LoraLinear,
    LowRank,
    NF4AdaptedLinear,
    adapt,
    adapters_detail,
    fill_dense,
    held_tensors,
    merge,
)
from pipeline.layers.quantized import KINDS
from pipeline.layers.schemes import empty_layer, quantize_layers

LORA, DORA = LowRank(4, 2.0), LowRank(4, 2.0, magnitude=True)
BOTH = pytest.mark.parametrize("adapter", [LORA, DORA], ids=["lora", "dora"])
BASES = pytest.mark.parametrize("nf4", [False, True], ids=["float", "nf4"])


class Model(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(24, 32, bias=bias), nn.LayerNorm(32)
        self.second = nn.Linear(32, 12, bias=bias)

    def forward(self, x):
        return self.second(self.norm(self.first(x)).relu())


def made(adapter, nf4=False, trained=True, bias=True):
    model = Model(bias)
    if nf4:
        quantize_layers(model, ["first", "second"], "nf4", block_size=16, double_quant=True)
    adapt(model, ["first", "second"], adapter, seed=3)
    if trained:
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@BOTH
@BASES
def test_it_starts_as_the_layer_was(adapter, nf4):
    model, x = Model(), torch.randn(5, 24)
    if nf4:
        quantize_layers(model, ["first", "second"], "nf4", block_size=16, double_quant=True)
    before = model(x)
    assert torch.equal(adapt(model, ["first", "second"], adapter, seed=0)(x), before)


@BOTH
@BASES
def test_only_adapters_get_gradients(adapter, nf4):
    model = made(adapter, nf4)
    model(torch.randn(5, 24)).square().sum().backward()
    leaves = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None}
    assert leaves == {"lora_A", "lora_B"} | ({"lora_magnitude"} if adapter.magnitude else set())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 4 * (24 + 32) + 4 * (32 + 12) + (32 + 12 if adapter.magnitude else 0)


@BASES
def test_lora_is_its_papers_formula(nf4):
    layer, x = made(LORA, nf4).first, torch.randn(2, 5, 24)
    want = x @ layer.base_weight().T + 2.0 * (x @ layer.lora_A.T @ layer.lora_B.T) + layer.bias
    torch.testing.assert_close(layer(x), want)


@BASES
@pytest.mark.parametrize("bias", [True, False])
def test_dora_is_magnitude_times_direction(nf4, bias):
    """W' = m (W + s B A) / ||W + s B A||, a norm for each output; the norm is a constant to the backward pass."""
    layer, x = made(DORA, nf4, bias=bias).first, torch.randn(2, 5, 24)
    weight = layer.base_weight()
    rows = []
    for out in range(weight.shape[0]):
        row = weight[out] + 2.0 * layer.lora_B[out] @ layer.lora_A
        rows.append(layer.lora_magnitude[out] * row / row.detach().square().sum().sqrt())
    want = F.linear(x, torch.stack(rows), layer.bias)
    y = layer(x)
    torch.testing.assert_close(y, want)
    seed = torch.randn_like(y)
    found = torch.autograd.grad(y, layer.adapter_parameters(), seed)
    wanted = torch.autograd.grad(want, layer.adapter_parameters(), seed)
    for mine, naive in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, naive, rtol=1e-4, atol=1e-5)


@BOTH
def test_merged_equals_unmerged_and_is_a_plain_model(adapter):
    model, x = made(adapter).eval(), torch.randn(5, 24)
    before = model(x)
    merged = merge(model)
    assert type(merged.first) is type(merged.second) is nn.Linear
    assert merged.state_dict().keys() == Model().state_dict().keys()
    assert not merged.training
    assert all(parameter.requires_grad for parameter in merged.parameters())
    torch.testing.assert_close(merged(x), before, rtol=1e-5, atol=1e-5)


@BOTH
def test_over_nf4_nothing_is_merged_and_a_dense_model_can_stand_for_it(adapter):
    model, x = made(adapter, nf4=True).eval(), torch.randn(5, 24)
    before = model(x)
    kept = merge(model)
    assert isinstance(kept.first, NF4AdaptedLinear)
    assert torch.equal(kept(x), before)
    assert [name for name, p in kept.named_parameters() if p.requires_grad] == ["norm.weight", "norm.bias"]
    dense = fill_dense(Model().eval(), kept)
    torch.testing.assert_close(dense(x), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(dense.norm.weight, kept.norm.weight)


@BOTH
def test_a_stored_layer_is_made_anew_from_its_settings(adapter):
    layer, x = made(adapter, nf4=True).first.eval(), torch.randn(5, 24)
    again = empty_layer("nf4_adapted", nn.Linear(24, 32), **layer.settings()).eval()
    again.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(again(x), layer(x))
    assert adapters_detail(nn.Sequential(layer))["adapters"]["rank"] == 4
    assert adapters_detail(Model()) == {}


def test_the_nf4_codes_under_an_adapter_stay_those_of_the_plain_layer():
    plain = KINDS["nf4", nn.Linear].from_float(nn.Linear(24, 32), block_size=16, double_quant=True)
    over = NF4AdaptedLinear.over(plain, LORA)
    assert torch.equal(over.weight_packed, plain.weight_packed)
    assert torch.equal(over.stored_weight(), plain.dequantized())
    assert held_tensors(over).keys() == {f".{name}" for name in dict(plain.named_buffers())}


def test_dropout_is_on_the_adapters_input_alone_and_only_in_training():
    model = made(LowRank(4, 2.0, dropout=0.9))
    layer, x = model.first, torch.ones(1, 24)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    nn.init.zeros_(layer.lora_B)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_draws_depend_on_the_seed_alone_and_differ_by_layer():
    one, other = made(LORA, trained=False), made(LORA, trained=False)
    assert torch.equal(one.first.lora_A, other.first.lora_A)
    again = adapt(Model(), ["first", "second"], LORA, seed=4)
    assert not torch.equal(one.first.lora_A, again.first.lora_A)
    assert one.first.lora_A.abs().max() <= 24**-0.5
    assert one.first.lora_A.std().item() == pytest.approx((3 * 24) ** -0.5, rel=0.2)


def test_a_row_of_zeros_stays_finite_under_dora():
    model = Model()
    model.first.weight.data[3] = 0
    adapt(model, ["first"], DORA, seed=0)
    y = model(torch.randn(2, 24))
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(p).all() and torch.isfinite(p.grad).all() for p in model.first.adapter_parameters())
    assert torch.isfinite(merge(model).first.weight).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@BASES
def test_dtypes_are_kept(dtype, nf4):
    model = Model().to(dtype)
    if nf4:
        quantize_layers(model, ["first", "second"], "nf4", block_size=16, double_quant=True)
    adapt(model, ["first"], DORA, seed=0)
    assert model.first.lora_A.dtype == dtype
    assert model(torch.randn(2, 24, dtype=dtype)).dtype == dtype
    if not nf4:
        assert merge(model).first.weight.dtype == dtype


def test_mixed_precision_trains_the_adapters_in_float32():
    model = made(DORA, nf4=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(2, 24)).float().square().sum()
    loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_layers_that_cannot_be_adapted_are_errors():
    with pytest.raises(ValueError, match="no layer"):
        adapt(Model(), [], LORA, seed=0)
    with pytest.raises(ValueError, match="norm is a LayerNorm"):
        adapt(Model(), ["norm"], LORA, seed=0)
    with pytest.raises(ValueError, match="first is a LoraLinear"):
        adapt(made(LORA), ["first"], LORA, seed=0)
    assert isinstance(made(LORA).first, LoraLinear)
