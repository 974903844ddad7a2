"""float8 layers against the scaling formula written out, and in fits: near bf16-mixed, and gone afterwards."""

import pytest
import torch
from torch import nn

from pipeline.composing import compose
from pipeline.models.architecture import describe
from pipeline.precision.fp8 import chosen_layers
from tests.parallelism.test_parity import COMMON, LLAMA, outcome, train
from tests.tiny import efficientnet, llama, odd_llama, opt

EMULATED = ["precision=fp8-mixed", "precision.emulate=true"]
RECIPES = ["tensorwise", "rowwise"]


def precision(recipe="tensorwise"):
    return compose([*COMMON, *EMULATED, f"precision.recipe={recipe}"]).precision


def float8(values, dtype, axis):
    """`values` rounded to float8: one scale for all, or one for each slice along `axis`, a power of two."""
    values = values.double()
    largest = values.abs().amax() if axis is None else values.abs().amax(axis, keepdim=True)
    scale = torch.finfo(dtype).max / largest
    if axis is not None:
        scale = 2 ** scale.log2().floor()
    scale = scale.float().double()
    return (values * scale).float().to(dtype).double() / scale


@pytest.mark.parametrize("recipe", RECIPES)
def test_products_are_those_of_the_scaling_formula(recipe):
    torch.manual_seed(0)
    rows = recipe == "rowwise"
    e4m3, gradient = torch.float8_e4m3fn, torch.float8_e4m3fn if rows else torch.float8_e5m2
    model = llama()
    layer = "model.layers.0.mlp.up_proj"
    precision(recipe).convert_layers(model, describe(model))
    linear = model.get_submodule(layer)
    given = torch.randn(5, 7, 32, requires_grad=True)
    back = torch.randn(5, 7, 48, dtype=torch.bfloat16) * 100
    out = linear(given)
    out.backward(back)

    x, w, g = given.detach().bfloat16().flatten(0, 1), linear.weight.detach(), back.flatten(0, 1)

    def along(axis):
        return axis if rows else None

    expected = float8(x, e4m3, along(1)) @ float8(w, e4m3, along(1)).t()
    to_input = float8(g, gradient, along(1)) @ float8(w, e4m3, along(0))
    to_weight = float8(g, gradient, along(0)).t() @ float8(x, e4m3, along(0))
    assert out.dtype == torch.bfloat16
    assert linear.weight.dtype == linear.weight.grad.dtype == torch.float32
    for found, wanted in ((out, expected), (given.grad, to_input), (linear.weight.grad, to_weight)):
        wanted = wanted.view(found.shape)
        # One rounding to bfloat16 at the end, of sums in float32.
        margin = 2**-8 * wanted.abs() + 1e-5 * wanted.abs().max()
        assert ((found.double() - wanted).abs() <= margin).all()


def test_layers_of_the_blocks_are_chosen_whose_sizes_the_kernels_take():
    model = llama()
    chosen = chosen_layers(model, describe(model))
    assert len(chosen) == 2 * 7
    assert all(name.startswith("model.layers.") for name in chosen)
    odd = odd_llama(intermediate_size=72)
    assert not any("mlp" in name for name in chosen_layers(odd, describe(odd)))
    assert len(chosen_layers(odd, describe(odd))) == 4


def test_a_model_with_nothing_to_multiply_in_float8_is_told_before_training():
    model = efficientnet()
    (line,) = precision().shape_problems(model, describe(model))
    assert line.endswith("use precision=bf16-mixed")
    assert precision().shape_problems(llama(), describe(llama())) == []


def test_the_very_layers_come_back_with_what_happened_meanwhile():
    model = opt()
    chosen = chosen_layers(model, describe(model))
    before, names = dict(model.named_modules()), list(model.state_dict())
    inside = [set(vars(module)) for module in model.modules()]
    undo = precision().convert_layers(model, describe(model))
    swapped = [name for name, module in model.named_modules() if module is not before[name]]
    assert swapped == chosen
    assert list(model.state_dict()) == names
    layer = model.get_submodule(swapped[0])
    layer.register_buffer("mask", torch.ones(2))
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight))
    undo()
    assert dict(model.named_modules()) == before
    assert torch.equal(before[swapped[0]].mask, torch.ones(2))
    assert not before[swapped[0]].weight.any()
    assert not before[swapped[0]]._forward_pre_hooks
    del before[swapped[0]].mask
    assert [set(vars(module)) for module in model.modules()] == inside
    assert {type(module) for module in model.modules() if isinstance(module, nn.Linear)} == {nn.Linear}


@pytest.mark.parametrize("recipe", RECIPES)
def test_twenty_steps_come_near_those_of_bf16_mixed(tmp_path, recipe):
    ends = {}
    settings = [f"precision.recipe={recipe}", "memory.activation_checkpointing=full"]
    for name, words in (("bf16", ["precision=bf16-mixed"]), ("fp8", [*EMULATED, *settings])):
        train(tmp_path / name, compose([*COMMON, *LLAMA, *words]))
        ends[name] = outcome(tmp_path / name)
    (losses, weights), (expected, plain) = ends["fp8"], ends["bf16"]
    assert not torch.equal(losses, expected)
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=0)
    assert {name: weight.dtype for name, weight in weights.items()} == dict.fromkeys(plain, torch.float32)


def test_a_fit_is_resumed_to_the_same_bits(tmp_path):
    words = [*COMMON, *EMULATED, "optimizer.schedule=constant"]
    train(tmp_path / "whole", compose([*words, "trainer.max_steps=4"]))
    train(tmp_path / "parts", compose([*words, "trainer.max_steps=2"]))
    train(tmp_path / "parts", compose([*words, "trainer.max_steps=4"]), resume=True)
    (losses, weights), (expected, plain) = (outcome(tmp_path / name) for name in ("parts", "whole"))
    assert torch.equal(losses, expected)
    assert all(torch.equal(weights[name], weight) for name, weight in plain.items())


def test_what_runs_is_said():
    assert precision().label == "fp8-mixed emulated"
    assert precision().problems() == []
    assert precision().weight_dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs float8 kernels"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torchao's own, of torch's names
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gpus_kernels_give_what_is_emulated(recipe):
    from dataclasses import replace

    found = []
    for emulate in (False, True):
        model = llama(hidden_size=64, intermediate_size=128).cuda().train()
        replace(precision(recipe), emulate=emulate).convert_layers(model, describe(model))
        ids = torch.arange(64, device="cuda").view(2, 32)
        with torch.autocast("cuda", torch.bfloat16):
            found.append(model(input_ids=ids, use_cache=False).logits.float())
    torch.testing.assert_close(*found, rtol=0.05, atol=0.05)
