"""Bits by layer: the budget is kept to the byte, sensitive layers get their bits, transformers opens the result."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from pipeline.artifact import store
from pipeline.composing import compose
from pipeline.compression.base import Context
from pipeline.compression.mixed_bits import first_samples
from pipeline.errors import LeanfitError
from pipeline.layers.footprint import file_bytes, model_tensors
from pipeline.layers.quantize import Grid
from pipeline.layers.quantized import quantized_layers
from pipeline.layers.select import select, split_experts
from pipeline.layers.sensitivity import sensitivities
from pipeline.layers.sparsity import set_mask, unstructured_mask
from pipeline.models.architecture import describe
from tests.layers.test_experts import nemotron
from tests.tiny import mixtral, opt

IDS = {"input_ids": torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))}


def batches():
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 64, (4, 16), generator=generator)} for _ in range(2)]


def context(model):
    return Context(stage="mixed_bits", architecture=describe(model), device="cpu", steps=0, seed=0, calibration=batches)


def mixed(**changes):
    typed = [f"compression.mixed_bits.{key}={value}" for key, value in changes.items()]
    return compose(["compression=mixed_bits", "compression.mixed_bits.group_size=16", *typed]).chain["mixed_bits"]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 0.8, 1.0])
def test_the_file_keeps_the_budget_and_uses_it(tmp_path, share):
    model = opt()
    layers = select(model, describe(model)).layers
    least, most = (file_bytes(model_tensors(model, dict.fromkeys(layers, Grid(bits, 16)))) for bits in (2, 8))
    budget = int(least + share * (most - least)) + 64  # the header's digits
    ctx = context(model)
    made = mixed(budget=budget).finalize(model, ctx)
    store.save(made, tmp_path / "a", chain=[], probe=IDS)
    size = store.tensor_bytes(tmp_path / "a")
    assert size <= budget
    assert size >= budget - 64 - 32 * 32 * 6 // 8 * 4  # no room left for the smallest upgrade of a fc layer
    assert ctx.facts["exact"]
    assert len(ctx.facts["sensitivity"]) == len(layers) == 12


@pytest.mark.parametrize("build", [opt, lambda: split_experts(mixtral()), lambda: split_experts(nemotron())],
                         ids=["opt", "mixtral", "nemotron"])  # fmt: skip
def test_footprint_is_the_file_to_the_byte(build, tmp_path):
    """Under public names where experts have them."""
    for grid in (Grid(3, 8), Grid(8), Grid(2, 8, symmetric=False), None):
        model = build()
        layers = select(model, describe(model)).layers
        planned = {} if grid is None else dict.fromkeys(layers, grid)
        said = file_bytes(model_tensors(model, planned))
        if grid is not None:
            from pipeline.layers.schemes import quantize_layers

            quantize_layers(
                model, layers, "weight_only", bits=grid.bits, group_size=grid.group_size, symmetric=grid.symmetric
            )
        store.save(model, tmp_path / "a", chain=[], probe=IDS)
        assert store.tensor_bytes(tmp_path / "a") == said
    model = build()
    for name in select(model, describe(model)).layers:
        layer = model.get_submodule(name)
        set_mask(layer, unstructured_mask(layer.weight.detach().abs(), 0.5))
    store.save(model, tmp_path / "masked", chain=[], probe=IDS)
    assert store.tensor_bytes(tmp_path / "masked") == file_bytes(model_tensors(model, {}))
    save_file({"x": torch.zeros(3, dtype=torch.bfloat16)}, tmp_path / "x", metadata={"format": "pt"})
    assert (tmp_path / "x").stat().st_size == file_bytes([("x", torch.bfloat16, (3,))])


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_masked_layers_are_counted_as_they_are_stored(tmp_path, sparsity):
    model = opt()
    layers = select(model, describe(model)).layers
    for name in layers:
        layer = model.get_submodule(name)
        set_mask(layer, unstructured_mask(layer.weight.detach().abs(), sparsity))
    plain = opt()
    sizes, fixed = mixed()._sizes(model, layers)
    assert mixed()._sizes(plain, layers, lambda name: 1 - sparsity) == (sizes, fixed)  # said beforehand, without masks
    least, most = (fixed + sum(size[k] for size in sizes.values()) for k in (0, -1))
    dense, more = mixed()._sizes(plain, layers)
    assert most < more + sum(size[-1] for size in dense.values())
    budget = (least + most) // 2
    ctx = dataclasses.replace(context(model), kept=lambda name: 1 - sparsity)
    assert mixed(budget=budget).preflight(plain, ctx) == []
    (told,) = mixed(budget=least - 1).preflight(plain, ctx)
    assert told.endswith("give more, or prune more before")
    made = mixed(budget=budget).finalize(model, ctx)
    store.save(made, tmp_path / "a", chain=[], probe=IDS)
    assert budget * 0.8 < store.tensor_bytes(tmp_path / "a") <= budget


def test_average_bits_is_kept_and_the_layer_that_matters_gets_most():
    model = opt()
    with torch.no_grad():  # this one decides the logits
        model.get_submodule("model.decoder.layers.1.fc2").weight.mul_(100)
    ctx = context(model)
    made = mixed(average_bits=3.0).finalize(model, ctx)
    bits = {name: layer.bits for name, layer in quantized_layers(made).items()}
    assert bits["model.decoder.layers.1.fc2"] == max(bits.values()) > min(bits.values())
    sizes = {name: layer.rows * layer.columns for name, layer in quantized_layers(made).items()}
    average = sum(bits[name] * sizes[name] for name in bits) / sum(sizes.values())
    assert average <= 3.0
    assert ctx.facts["average_bits"] == pytest.approx(average)


def test_sensitivity_is_the_divergence_of_the_model_with_that_layer_rounded():
    model = opt()
    name = "model.decoder.layers.0.fc1"
    kept = model.get_submodule(name).weight.detach().clone()
    found = sensitivities(model, [name], [Grid(2, 16), Grid(8, 16)], batches(), "cpu")[name]
    assert torch.equal(model.get_submodule(name).weight, kept)
    ids = torch.cat([batch["input_ids"] for batch in batches()])
    with torch.no_grad():
        p = model(ids).logits.double().softmax(-1)
        from pipeline.layers.quantize import quantize_rows

        model.get_submodule(name).weight.copy_(quantize_rows(kept, Grid(2, 16)).dequantized())
        q = model(ids).logits.double().softmax(-1)
    assert found[2] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-3)
    assert 0 <= found[8] < found[2]


def test_several_numbers_of_bits_open_in_plain_transformers(tmp_path):
    model = opt()
    made = mixed(average_bits=4.0).finalize(model, context(model))
    assert len({layer.bits for layer in quantized_layers(made).values()}) > 1
    assert store.save(made, tmp_path / "a", chain=[], probe=IDS)["format"] == "pack-quantized"
    theirs = store.output_of(AutoModelForCausalLM.from_pretrained(tmp_path / "a"), IDS)
    ours = store.output_of(store.load(tmp_path / "a"), IDS)
    assert (theirs - ours).abs().max() <= 1e-3 * ours.abs().max()


def test_what_cannot_be_met_or_chosen_is_told():
    model = opt()
    (told,) = mixed(budget="10KB").preflight(model, context(model))
    assert "budget=10KB cannot be met: with 2 bits in every layer the file takes" in told
    assert mixed(budget="1MB").preflight(model, context(model)) == []
    for changes, words in (
        ({"average_bits": "null"}, "neither is set"),
        ({"budget": "lots"}, "lots is no size"),
        ({"budget": "0MB"}, "not above zero"),
        ({"average_bits": 1.5}, "below the fewest bits"),
        ({"bits": "[4]"}, "leaves nothing to choose"),
    ):
        with pytest.raises(LeanfitError, match=words):
            mixed(**changes)
    model.model.decoder.layers[0].fc1.weight.data[0, 0] = float("nan")
    with pytest.raises(LeanfitError, match="fc1 holds NaN"):
        mixed().finalize(model, context(model))


def test_the_first_samples_are_taken_across_batches():
    rows = torch.cat([batch["input_ids"] for batch in batches()])
    assert torch.equal(torch.cat([b["input_ids"] for b in first_samples(batches(), 5)]), rows[:5])
    assert torch.equal(torch.cat([b["input_ids"] for b in first_samples(batches(), 50)]), rows)
