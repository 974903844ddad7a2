"""AWQ: never further off than rounding to nearest, better where channels differ, exact against naive errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from pipeline.artifact import store
from pipeline.composing import compose
from pipeline.compression.int4 import quantize_int4
from pipeline.compression.int4_awq import quantize_int4_awq
from pipeline.errors import LeanfitError
from pipeline.layers import awq
from pipeline.layers.awq import awq_scales, search_ranges, squared_errors
from pipeline.layers.quantize import Grid, quantize_rows
from pipeline.layers.quantized import quantized_layers
from pipeline.layers.select import select, split_experts
from pipeline.layers.sparsity import mask_of, set_mask
from pipeline.models.architecture import describe
from tests.compression.test_int8_smoothquant import llama_norms, opt_norms, strong, with_outliers
from tests.compression.test_int8_static import IDS, batches
from tests.tiny import context, efficientnet, mixtral, opt
from tests.tiny import odd_llama as llama


def names(model):
    return select(model, describe(model)).layers


def quantized(model, bits=4, symmetric=True, data=None, **settings):
    return quantize_int4_awq(
        model, names(model), describe(model), data or batches(), 16, bits, symmetric, **{"n_grid": 10, **settings}
    )


@pytest.mark.parametrize("build", [opt, llama])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (2, True), (3, False)])
def test_no_block_is_further_off_than_rounded_to_nearest(build, bits, symmetric):
    _, detail = quantized(strong(build()), bits, symmetric)
    for block in detail["blocks"].values():
        assert 0 < block["relative_error"] <= block["relative_error_nearest"]


def mixture(factor=1.0):
    """A mixture's experts as linear layers; what norms give out is `factor` times as large in every ninth channel."""
    torch.manual_seed(0)
    made = split_experts(mixtral(num_key_value_heads=2))
    for name, parameter in made.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
        elif "layernorm" in name:
            parameter.data[::9] *= factor
    return made.eval()


@pytest.mark.parametrize("bits", [4, 2])
def test_no_block_of_a_mixture_is_further_off_than_rounded_to_nearest(bits):
    made, detail = quantized(mixture(), bits)
    for block in detail["blocks"].values():
        assert 0 < block["relative_error"] <= block["relative_error_nearest"]
    assert detail["not_scaled"] == {}
    assert {name for name, p in made.named_parameters() if "gate" in name} == {
        f"model.layers.{n}.mlp.gate.weight" for n in (0, 1)
    }


def test_where_a_few_channels_matter_most_a_mixture_is_closer_and_its_router_takes_their_scales_over():
    """Block by block: what the next router makes of a change is another expert, or nothing."""
    router = mixture(12.0).model.layers[0].mlp.gate.weight.detach()
    made, detail = quantized(mixture(12.0))
    first = detail["blocks"]["model.layers.0"]
    assert first["relative_error"] < 0.5 * first["relative_error_nearest"]
    assert "model.layers.0.post_attention_layernorm -> mlp.gate, mlp.experts" in detail["scaled"]
    moved = made.model.layers[0].mlp.gate.weight.detach() / router
    assert (moved[0] != 1).any()
    torch.testing.assert_close(moved, moved[:1].expand_as(moved))


@pytest.mark.parametrize(("build", "norms"), [(opt, opt_norms), (llama, llama_norms)])
def test_where_a_few_channels_matter_most_outputs_are_closer(build, norms):
    def model():
        torch.manual_seed(0)
        made = strong(build())
        for norm in norms():  # large activations that meet ordinary weights
            made.get_submodule(norm).weight.data[::9] *= 12
        return made

    want = model()(**batches()[0]).logits
    nearest = quantize_int4(model(), names(model()), 16)(**batches()[0]).logits
    made, detail = quantized(model())
    assert (made(**batches()[0]).logits - want).norm() < 0.9 * (nearest - want).norm()
    assert detail["pairs_scaled"] > 0


def test_the_first_blocks_error_is_what_a_plain_forward_gives():
    model = strong(opt())
    block = model.model.decoder.layers[0]
    calls = []
    handle = block.register_forward_hook(lambda m, a, k, out: calls.append((a, k, out)), with_kwargs=True)
    for batch in batches():
        model(**batch, use_cache=False)  # a cache would be filled further when the block is called again
    handle.remove()
    want = [(out[0] if isinstance(out, tuple) else out).detach() for _, _, out in calls]
    made, detail = quantized(model)
    block = made.model.decoder.layers[0]
    with torch.no_grad():
        found = [block(*a, **k) for a, k, _ in calls]
    found = [out[0] if isinstance(out, tuple) else out for out in found]
    error = sum(float((a - b).square().sum()) for a, b in zip(found, want, strict=True))
    norm = sum(float(b.square().sum()) for b in want)
    told = detail["blocks"]["model.decoder.layers.0"]["relative_error"]
    assert error / norm == pytest.approx(told, rel=1e-3)


def test_trials_run_on_the_first_tokens_alone_but_hessians_take_all(monkeypatch):
    def found(*data):
        ran = []
        model = strong(opt())
        model.model.decoder.layers[0].register_forward_hook(lambda *_: ran.append(None))
        detail = quantized(model, data=list(data))[1]
        return len(ran), detail["blocks"]["model.decoder.layers.0"]

    first = batches()[0]
    second = {"input_ids": first["input_ids"].flip(1).contiguous()}
    monkeypatch.setattr(awq, "SEARCH_TOKENS", first["input_ids"].numel())
    runs_of_one, one = found(first)
    runs_of_two, two = found(first, second)
    assert runs_of_two == runs_of_one + 2  # observed once, handed on once
    assert two["relative_error_nearest"] == one["relative_error_nearest"]
    assert two["relative_error"] != one["relative_error"]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4]), st.booleans(), st.sampled_from([1, 2]))
def test_narrowed_ranges_never_raise_a_rows_error(seed, bits, symmetric, blocks):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(6, 16, generator=generator)
    x = torch.randn(blocks, 40, 16, generator=generator) * torch.rand(16, generator=generator) * 5 + 1
    gram = x.transpose(1, 2) @ x / 40
    grid = Grid(bits, 8, symmetric)
    shrink = search_ranges(rows, grid, gram, 20, 0.5)
    assert shrink.shape == (6, 2)
    assert shrink.min() >= 0.5 - 1e-6
    assert shrink.max() <= 1
    before, after = ((quantize_rows(rows, grid, s).dequantized() - rows) for s in (1.0, shrink))
    naive = [
        (d.view(blocks, -1, 16) @ x.transpose(1, 2)).square().mean(-1).flatten() for d in (before, after)
    ]  # fmt: skip
    torch.testing.assert_close(squared_errors(after, gram), naive[1], rtol=1e-3, atol=1e-5)
    assert (naive[1] <= naive[0] * (1 + 1e-4) + 1e-6).all()


def test_scales_are_the_papers():
    inputs = torch.tensor([1.0, 4.0, 0.25])
    scales = awq_scales(inputs, [], Grid(4, None), 0.5, duo_scaling=False)
    torch.testing.assert_close(scales, inputs.sqrt() / (2.0 * 0.5) ** 0.5)
    assert torch.equal(awq_scales(inputs, [], Grid(4, None), 0.0, duo_scaling=False), torch.ones(3))
    dead = awq_scales(torch.tensor([0.0, 1.0]), [], Grid(4, None), 1.0, duo_scaling=False)
    assert torch.isfinite(dead).all()
    assert (dead > 0).all()


def test_convolutions_are_clipped_where_nothing_can_be_scaled():
    model = efficientnet()
    x = {"pixel_values": torch.randn(4, 1, 16, 16)}
    before = model(**x).logits
    nearest = quantize_int4(efficientnet(), names(model), None)(**x).logits
    made, detail = quantize_int4_awq(model, names(model), describe(model), [x], None)
    assert detail["pairs_scaled"] == 0
    assert (made(**x).logits - before).norm() <= (nearest - before).norm() * 1.001


def test_a_model_without_norms_before_linear_layers_is_refused():
    model = efficientnet()
    method = compose(["compression=int4_awq", "compression.int4_awq.group_size=null"]).chain["int4_awq"]
    (told,) = method.preflight(model, context(model))
    assert told.endswith("the model has no norm in front of linear layers to scale; choose int4")


def test_duo_scaling_is_never_worse_than_nearest_either():
    _, detail = quantized(strong(llama()), duo_scaling=True)
    assert all(b["relative_error"] <= b["relative_error_nearest"] for b in detail["blocks"].values())


@pytest.mark.parametrize("symmetric", [True, False])
def test_masked_weights_stay_zero(symmetric):
    model = with_outliers(strong(opt()), opt_norms(), 10.0)
    pruned = {}
    for name in names(model):
        layer = model.get_submodule(name)
        set_mask(layer, mask_of(layer.weight.detach().abs(), 0.5, "2:4"))
        pruned[name] = layer.weight == 0
    made, _ = quantized(model, symmetric=symmetric)
    for name, layer in quantized_layers(made).items():
        assert layer.sparse
        assert not layer.dequantized()[pruned[name]].any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_plain_transformers_opens_it(tmp_path):
    made = quantized(strong(llama()))[0].eval()
    assert store.save(made, tmp_path / "a", chain=[], probe=IDS)["format"] == "pack-quantized"
    want = AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()(**IDS).logits
    assert torch.equal(store.load(tmp_path / "a")(**IDS).logits, made(**IDS).logits)
    assert ((made(**IDS).logits - want).abs().max() / want.abs().max()) < 1e-3


def test_a_nan_weight_is_named():
    model = opt()
    model.model.decoder.layers[1].fc2.weight.data[3, 4] = float("nan")
    with pytest.raises(LeanfitError, match=r"layers\.1\.fc2.*NaN"):
        quantized(model)
    assert not quantized_layers(model)
