"""Magnitude pruning: which weights go, what stays at zero, what is refused."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.composing import compose
from pipeline.compression.magnitude import Magnitude, prune_magnitude
from pipeline.errors import ConfigError, LeanfitError
from pipeline.layers.sparsity import masked_layers
from tests.tiny import context, opt
from tests.tiny import odd_llama as llama


def magnitude(**changes):
    usual = {"sparsity": 0.5, "pattern": None, "schedule": "once", "steps": 0, "lr": None, "ignore": ()}
    return Magnitude(name="magnitude", **{**usual, **changes})


def test_magnitude_prunes_each_layer_to_its_sparsity_and_spares_the_rest():
    model = opt()
    head = model.lm_head.weight.clone()
    method = magnitude(sparsity=0.7)
    made = method.finalize(method.prepare(model, context(model)), context(model))
    detail = method.detail(made, context(made))
    assert detail["layers"] == 12
    assert all(abs(value - 0.7) < 0.001 for value in detail["sparsity_by_layer"].values())
    assert torch.equal(made.lm_head.weight, head)


def test_magnitude_takes_n_of_m():
    model = opt()
    method = magnitude(pattern="2:4")
    made = method.finalize(method.prepare(model, context(model)), context(model))
    weight = made.model.decoder.layers[0].fc1.weight
    assert ((weight.view(-1, 4) != 0).sum(1) == 2).all()
    with torch.device("meta"):
        wide = llama()
    assert "32 does not divide" in magnitude(sparsity=0.5, pattern="16:32").preflight(wide, context(wide))[0]


@pytest.mark.parametrize(("pattern", "share"), [("2:5", 0.6), ("1:4", 0.75), ("2:4", 0.5)])
def test_a_pattern_says_by_itself_how_much_goes(pattern, share):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=40, intermediate_size=80, num_hidden_layers=1, num_attention_heads=2)
    )
    (told,) = magnitude(pattern=pattern, sparsity=0.9).problems()
    assert f"pattern={pattern} prunes {share:g} of the weights, compression.magnitude.sparsity says 0.9" in told
    method = magnitude(pattern=pattern, sparsity=None)
    assert method.problems() == []
    made = method.finalize(method.prepare(model, context(model)), context(model))
    detail = method.detail(made, context(made))
    assert detail["sparsity"] == pytest.approx(share)
    assert detail["sparsity_target"] == pytest.approx(share)


@pytest.mark.parametrize("pattern", ["abc", "", "2", "2:", "0:4", "2:4 ", "2:4:8", "-1:4", "100:200"])
def test_what_is_no_pattern_is_told_with_one_that_is(pattern):
    (told,) = magnitude(pattern=pattern).problems()
    assert told == f"compression.magnitude.pattern={pattern} must be N:M such as 2:4"


def test_a_pattern_on_a_schedule_keeps_fewer_of_each_block_step_by_step():
    method = magnitude(pattern="4:8", schedule="cubic", steps=10)
    assert method.problems() == []
    kept = [method.pattern_at(share) for share in (0.0, 0.1, 0.125, 0.3, 0.49, 0.5)]
    assert kept == [None, None, "7:8", "6:8", "5:8", "4:8"]


def test_an_ignore_that_leaves_nothing_is_named():
    model = opt()
    (told,) = magnitude(ignore=("*",)).preflight(model, context(model))
    assert told == "compression.link.ignore=[*]: no layer is left to work on; without it there are 12"


def test_magnitude_without_effect_is_an_error():
    assert "prunes nothing" in magnitude(sparsity=0.0).problems()[0]
    assert "sparsity=null prunes nothing" in magnitude(sparsity=None).problems()[0]
    assert "prunes nothing" in magnitude(pattern="4:4").problems()[0]
    assert magnitude().problems() == []
    model = opt()
    assert "not one weight" in magnitude(sparsity=1e-7).preflight(model, context(model))[0]
    with pytest.raises(LeanfitError, match="not one weight"):
        prune_magnitude(model, ["model.decoder.layers.0.fc1"], 1e-7)
    model.model.decoder.layers[0].fc1.weight.data[0, 0] = float("inf")
    with pytest.raises(LeanfitError, match="fc1"):
        prune_magnitude(model, ["model.decoder.layers.0.fc1"], 0.5)


def test_a_gradual_schedule_cut_short_is_an_error():
    model = opt()
    method = magnitude(schedule="cubic", steps=10)
    with pytest.raises(LeanfitError, match="short of"):
        method.finalize(method.prepare(model, context(model, steps=10)), context(model, steps=10))


def test_the_weights_that_stay_are_the_largest_of_their_layer():
    model = opt()
    layer = model.model.decoder.layers[0].fc1
    before = layer.weight.detach().clone()
    prune_magnitude(model, ["model.decoder.layers.0.fc1"], 0.25)
    order = before.abs().flatten().argsort()
    assert (layer.weight.flatten()[order[: order.numel() // 4]] == 0).all()
    assert torch.equal(
        layer.weight.flatten()[order[order.numel() // 4 :]], before.flatten()[order[order.numel() // 4 :]]
    )


def test_a_gradual_link_starts_with_masks_that_keep_everything():
    model = opt()
    method = magnitude(schedule="cubic", steps=10)
    prepared = method.prepare(model, context(model, steps=10))
    masks = [layer.weight_mask for _, layer in masked_layers(prepared)]
    assert len(masks) == 12
    assert all(mask.all() for mask in masks)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_gradual_schedule_without_steps_is_refused_with_both_ways_out(method):
    key = f"compression.{method}"
    with pytest.raises(ConfigError) as told:
        compose([f"compression={method}", f"{key}.schedule=cubic", f"{key}.steps=0"])
    assert told.value.problems == [
        f"{key}.schedule=cubic prunes over the link's own training, of which {key}.steps=0 leaves none; "
        f"give {key}.steps=STEPS, or choose {key}.schedule=once (command line)"
    ]


def test_a_gradual_schedule_is_among_the_facts():
    made = magnitude().prepare(opt(), context(opt()))
    assert "schedule" not in magnitude().detail(made, context(made))
    assert magnitude(schedule="cubic").detail(made, context(made))["schedule"] == "cubic"
