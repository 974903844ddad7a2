"""Wanda: against the formula with a sort, and on whole models."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.compression.wanda import Wanda, prune_wanda, wanda_scores
from pipeline.errors import LeanfitError
from pipeline.layers.select import select
from pipeline.layers.sparsity import rowwise_mask, set_mask
from pipeline.models.architecture import describe
from tests import tiny
from tests.tiny import efficientnet, llama, token_batches


def wanda(**changes):
    usual = {"sparsity": 0.5, "pattern": None, "schedule": "once", "steps": 0, "lr": None, "ignore": ()}
    return Wanda(name="wanda", **{**usual, **changes})


def opt():
    return tiny.opt(dropout=0.1)


def context(model, batches, steps=0):
    return tiny.context(model, steps=steps, batches=batches)


def inputs_of(model, name, batches):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0].clone()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return torch.cat(seen)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 17), sparsity=st.floats(0, 0.99), seed=st.integers(0, 10**6)
)  # fmt: skip
def test_each_row_loses_its_lowest_and_all_together_as_many_as_asked(rows, columns, sparsity, seed):
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    mask = rowwise_mask(scores, sparsity)
    assert int((~mask).sum()) == int(sparsity * rows * columns + 1e-6)
    for row, kept in zip(scores, mask, strict=True):
        gone = int((~kept).sum())
        assert abs(gone - sparsity * columns) < 1
        assert set(row[~kept].tolist()) == set(row.sort().values[:gone].tolist())


def test_rows_of_equal_scores_lose_equally_many():
    mask = rowwise_mask(torch.ones(4, 8), 0.5)
    assert (mask.sum(1) == 4).all()
    assert rowwise_mask(torch.zeros(3, 2, 2, 2), 0.25).shape == (3, 2, 2, 2)


@pytest.mark.parametrize("build", [opt, llama])
def test_the_first_block_is_pruned_by_weight_times_norm_of_input_row_by_row(build):
    model, dense, batches = build(), build(), token_batches()
    layers = select(model, describe(model)).layers
    prune_wanda(model, layers, 0.5, batches, describe(model))
    for name in [name for name in layers if ".layers.0." in name]:
        weight = dense.get_submodule(name).weight.detach()
        x = inputs_of(dense, name, batches).flatten(0, -2)
        score = weight.abs() * x.norm(dim=0)
        pruned = model.get_submodule(name).weight
        for row in range(len(weight)):
            gone = score[row].argsort()[: weight.shape[1] // 2]
            want = weight[row].clone()
            want[gone] = 0
            assert torch.equal(pruned[row], want)


def test_later_blocks_see_what_pruned_ones_give():
    model, batches = opt(), token_batches()
    dense = opt()
    layers = select(model, describe(model)).layers
    prune_wanda(model, layers, 0.5, batches, describe(model))
    name = "model.decoder.layers.1.self_attn.q_proj"
    dense.model.decoder.layers[0].load_state_dict(model.model.decoder.layers[0].state_dict(), strict=False)
    x = inputs_of(dense, name, batches).flatten(0, -2)
    score = dense.get_submodule(name).weight.detach().abs() * x.norm(dim=0)
    kept = model.get_submodule(name).weight_mask
    assert all(score[row][kept[row]].min() > score[row][~kept[row]].max() for row in range(len(kept)))


def test_small_weights_on_a_loud_input_are_kept():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    model[0].weight.data[:, 3] = 0.01
    x = torch.randn(64, 8)
    x[:, 3] *= 1000
    prune_wanda(model, ["0"], 0.5, [{"input": x}], describe(model))
    assert model[0].weight_mask[:, 3].all()
    assert not (model[0].weight == 0)[:, 3].any()


def test_n_of_m_keeps_the_highest_scores_of_each_group():
    model, dense, batches = opt(), opt(), token_batches()
    layers = select(model, describe(model)).layers
    prune_wanda(model, layers, 0.5, batches, describe(model), "2:4")
    name = layers[0]
    score = dense.get_submodule(name).weight.detach().abs() * inputs_of(dense, name, batches).flatten(0, -2).norm(dim=0)
    kept = model.get_submodule(name).weight_mask.view(-1, 4)
    for group, mask in zip(score.view(-1, 4), kept, strict=True):
        assert sorted(group[mask].tolist()) == group.sort().values[2:].tolist()


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_convolutions_score_by_channel_and_kernel_position(groups):
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 12, 3, stride=2, padding=1, groups=groups, bias=False)
    model, weight, x = nn.Sequential(layer), layer.weight.detach().clone(), torch.randn(4, 6, 7, 7)
    prune_wanda(model, ["0"], 0.5, [{"input": x[:2]}, {"input": x[2:]}], describe(model))
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    score = torch.zeros_like(weight)
    for out in range(12):
        for channel in range(6 // groups):
            source = out // (12 // groups) * (6 // groups) + channel
            for i in range(3):
                for j in range(3):
                    norm = padded[:, source, i : i + 7 : 2, j : j + 7 : 2].norm()
                    score[out, channel, i, j] = weight[out, channel, i, j].abs() * norm
    kept = layer.weight_mask.flatten(1)
    for row, mask in zip(score.flatten(1), kept, strict=True):
        assert row[mask].min() > row[~mask].max()
    assert int((~kept).sum()) == weight.numel() // 2
    assert torch.equal(layer.weight, weight * layer.weight_mask)


def test_scores_of_a_grouped_convolution_use_its_own_inputs():
    scores = wanda_scores(-torch.ones(4, 2), torch.tensor([1.0, 4.0, 9.0, 16.0]), groups=2)
    assert torch.equal(scores, torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0], [3.0, 4.0]]))


def test_a_classifier_reaches_its_sparsity_in_every_layer():
    model = efficientnet()
    batches = [{"pixel_values": torch.randn(4, 1, 16, 16)}]
    method, seen = wanda(sparsity=0.6), context(model, batches)
    made = method.finalize(method.prepare(model, seen), seen)
    detail = method.detail(made, seen)
    numel = {name: made.get_submodule(name).weight.numel() for name in detail["layer_names"]}
    for name, value in detail["sparsity_by_layer"].items():
        assert value == pytest.approx(int(0.6 * numel[name] + 1e-6) / numel[name])


def test_earlier_masks_stay_though_other_inputs_are_always_zero():
    layer = nn.Linear(8, 4, bias=False)
    model = nn.Sequential(layer)
    earlier = torch.ones(4, 8, dtype=torch.bool)
    earlier[:, :2] = False
    set_mask(layer, earlier.clone())
    x = torch.randn(16, 8)
    x[:, 2:5] = 0
    prune_wanda(model, ["0"], 0.5, [{"input": x}], describe(model))
    assert not layer.weight_mask[:, :2].any()
    assert (layer.weight_mask.sum(1) == 4).all()
    assert layer.weight_mask[:, 5:].all()


def test_pruning_in_training_leaves_the_mode_alone():
    model, batches = opt().train(), token_batches(1)
    prune_wanda(model, select(model, describe(model)).layers, 0.5, batches, describe(model))
    assert all(module.training for module in model.modules())


def test_a_gradual_schedule_looks_a_few_times():
    method = wanda(schedule="cubic", pattern="2:4", sparsity=None)
    model, batches = opt(), token_batches(1)
    seen = context(model, batches, steps=200)
    model = method.prepare(model, seen).train()
    (callback,) = method.callbacks(seen)
    assert callback.until / callback.every <= 8
    wrapper = nn.ModuleDict({"model": model})
    for step in (30, 80, callback.until):
        callback.prune(wrapper, callback.target(step))
    weight = method.finalize(model, seen).model.decoder.layers[0].fc1.weight
    assert ((weight.view(-1, 4) != 0).sum(1) == 2).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = opt().to(dtype)
    prune_wanda(model, select(model, describe(model)).layers, 0.5, token_batches(1), describe(model))
    assert float((model.model.decoder.layers[1].fc2.weight == 0).float().mean()) == 0.5


def test_nan_weights_no_layers_and_no_effect_are_errors():
    model, batches = opt(), token_batches(1)
    layers = select(model, describe(model)).layers
    with pytest.raises(LeanfitError, match="prunes not one weight of 12 layers"):
        prune_wanda(opt(), layers, 1e-5, batches, describe(model))
    with pytest.raises(LeanfitError, match="no layer"):
        prune_wanda(opt(), [], 0.5, batches, describe(model))
    model.model.decoder.layers[1].fc2.weight.data[3, 4] = float("nan")
    with pytest.raises(LeanfitError, match=r"model\.decoder\.layers\.1\.fc2.*NaN"):
        wanda().prepare(model, context(model, batches))
