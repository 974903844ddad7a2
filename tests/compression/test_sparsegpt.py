"""SparseGPT: against the column loop of the paper, against magnitude pruning, and on whole models."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.compression.magnitude import prune_magnitude
from pipeline.compression.sparsegpt import SparseGpt, prune_sparsegpt, sparsegpt_prune
from pipeline.errors import LeanfitError
from pipeline.layers.masks import GradualMasks
from pipeline.layers.select import select
from pipeline.layers.sparsity import n_of_m_mask, set_mask, unstructured_mask
from pipeline.models.architecture import describe
from tests import tiny
from tests.tiny import efficientnet, image_batches


def sparsegpt(**changes):
    usual = {
        "sparsity": 0.5, "pattern": None, "schedule": "once", "steps": 0, "lr": None, "ignore": (), "damping": 0.01,
        "block_size": 128,
    }  # fmt: skip
    return SparseGpt(name="sparsegpt", **{**usual, **changes})


def opt():
    return tiny.opt(dropout=0.1)


def llama():
    return tiny.odd_llama(layers=2)


def token_batches(count=8):
    return tiny.token_batches(count)


def context(model, batches, steps=0):
    return tiny.context(model, steps=steps, batches=batches)


def problem(seed=0, rows=6, columns=24, tokens=100, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns // 2, generator=generator, dtype=dtype)
    x = x @ torch.randn(columns // 2, columns, generator=generator, dtype=dtype)
    x += 0.3 * torch.randn(tokens, columns, generator=generator, dtype=dtype)
    return torch.randn(rows, columns, generator=generator, dtype=dtype), x.t() @ x / tokens


def naive(weight, hessian, sparsity, pattern, damping, block_size):
    """Columns in turn, the inverse of what is left of the Hessian anew for each; masks by w^2 / its first element."""
    rows, columns = weight.shape
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(columns, dtype=hessian.dtype)
    inverses = [torch.linalg.inv(damped[j:, j:]) for j in range(columns)]
    w, kept = weight.clone(), torch.ones(rows, columns, dtype=torch.bool)
    keep, group = map(int, pattern.split(":")) if pattern else (0, block_size)
    for j in range(columns):
        if j % group == 0:
            end = min(j + group, columns)
            scores = torch.stack([w[:, k] ** 2 / inverses[k][0, 0] for k in range(j, end)], 1)
            if pattern:
                for row in range(rows):
                    kept[row, j + scores[row].argsort()[: group - keep]] = False
            else:
                lowest = scores.flatten().argsort()[: int(sparsity * scores.numel())].tolist()
                for index in lowest:
                    kept[index // (end - j), j + index % (end - j)] = False
        for row in range(rows):
            if not kept[row, j]:
                w[row, j:] -= w[row, j] / inverses[j][0, 0] * inverses[j][0]
                w[row, j] = 0
    return w, kept


@pytest.mark.parametrize(
    ("sparsity", "pattern", "block_size"),
    [(0.5, None, 24), (0.5, None, 8), (0.25, None, 4), (0.75, None, 12), (0.5, "2:4", 24), (0.5, "4:8", 10)],
)
def test_weights_and_masks_are_those_of_the_papers_column_loop(sparsity, pattern, block_size):
    weight, hessian = problem()
    before = weight.clone()
    found = sparsegpt_prune(weight, hessian, sparsity, pattern, 0.01, block_size)
    want, kept = naive(weight, hessian, sparsity, pattern, 0.01, block_size)
    assert torch.equal(found.mask, kept)
    torch.testing.assert_close(found.weight, want)
    assert found.damping == 0.01
    assert torch.equal(weight, before)


def test_the_weights_of_a_layer_with_one_output_are_not_written_to():
    weight, hessian = problem(rows=1)
    before = weight.clone()
    found = sparsegpt_prune(weight, hessian, 0.5)
    assert torch.equal(weight, before)
    assert not torch.equal(found.weight, before)


def test_with_one_row_and_one_weight_to_prune_it_is_the_optimal_brain_surgeon():
    weight, hessian = problem(1, rows=1, columns=6)
    mask = torch.tensor([[False, True, True, True, True, True]])
    weight = weight * mask
    weight[0, 0] = 1.3  # the first goes: all the others can make up for it
    found = sparsegpt_prune(weight, hessian, 0.0, damping=0.0, mask=mask)
    rest = hessian[1:, 1:]
    want = weight[:, 1:] + weight[0, 0] * torch.linalg.solve(rest, hessian[1:, 0])
    torch.testing.assert_close(found.weight[:, 1:], want)
    assert found.weight[0, 0] == 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), sparsity=st.sampled_from([0.3, 0.5, 0.61]), block_size=st.sampled_from([4, 7, 128]))
def test_independent_inputs_give_magnitude_pruning_of_each_block(seed, sparsity, block_size):
    weight = torch.randn(10, 20, generator=torch.Generator().manual_seed(seed))
    found = sparsegpt_prune(weight, torch.eye(20), sparsity, None, block_size=block_size)
    assert int((~found.mask).sum()) == int(sparsity * 200 + 1e-6)
    assert torch.equal(found.weight, weight * found.mask)
    for start in range(0, 20, block_size):
        block, kept = weight[:, start : start + block_size].abs(), found.mask[:, start : start + block_size]
        assert block[~kept].max() < block[kept].min()
    pattern = sparsegpt_prune(weight, torch.eye(20), 0.5, "2:4", block_size=block_size)
    assert torch.equal(pattern.mask, n_of_m_mask(weight.abs(), 2, 4))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), pattern=st.sampled_from([None, "2:4"]))
def test_the_output_is_always_closer_than_with_magnitude_pruning(seed, pattern):
    weight, hessian = problem(seed, rows=16, columns=64, tokens=256, dtype=torch.float32)
    # A mask chosen at once for all columns, of inputs this redundant, may be worse: it costs each weight by itself.
    found = sparsegpt_prune(weight, hessian, 0.5, pattern, block_size=16).weight
    mask = unstructured_mask(weight.abs(), 0.5) if pattern is None else n_of_m_mask(weight.abs(), 2, 4)
    errors = [float(((w - weight) @ hessian @ (w - weight).t()).trace()) for w in (found, weight * mask)]
    assert errors[0] < 0.9 * errors[1]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), earlier=st.floats(0, 1), sparsity=st.floats(0, 0.99), block_size=st.integers(1, 30),
)  # fmt: skip
def test_earlier_masks_stay_and_count(seed, earlier, sparsity, block_size):
    weight, hessian = problem(seed)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) >= earlier
    mask[:, 20:] = True  # unevenly over the blocks
    found = sparsegpt_prune(weight * mask, hessian, sparsity, None, 0.01, block_size, mask)
    assert not (found.mask & ~mask).any()
    assert not found.weight[~found.mask].any()
    assert found.weight[found.mask].all()
    assert int((~found.mask).sum()) == max(int(sparsity * weight.numel() + 1e-6), int((~mask).sum()))


def test_n_of_m_within_earlier_masks():
    weight, hessian = problem()
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[:, 0:3] = False
    mask[:, 5] = False
    found = sparsegpt_prune(weight * mask, hessian, 0.5, "2:4", mask=mask)
    counts = found.mask.view(6, 6, 4).sum(-1)
    assert (counts[:, 0] == 1).all()
    assert (counts[:, 1:] == 2).all()
    with pytest.raises(ValueError, match="5 does not divide 24"):
        sparsegpt_prune(weight, hessian, 0.5, "2:5")


def test_singular_hessians_and_inputs_that_are_always_zero():
    weight, _ = problem()
    x = torch.randn(9, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, [3, 20]] = 0
    for damping in (0.01, 0.0):
        found = sparsegpt_prune(weight, x.t() @ x / 9, 0.5, damping=damping)
        assert torch.isfinite(found.weight).all()
        assert found.damping == damping if damping else found.damping > 0
        assert torch.equal((weight * found.mask)[:, [3, 20]], found.weight[:, [3, 20]])
    _, hessian = problem()
    hessian[[3, 20]] = hessian[:, [3, 20]] = 0
    assert not sparsegpt_prune(weight, hessian, 0.5, damping=0.0).mask[:, [3, 20]].any()
    nothing = sparsegpt_prune(weight, torch.zeros(24, 24, dtype=torch.float64), 0.5)
    assert torch.equal(nothing.mask, unstructured_mask(weight.abs(), 0.5))


@pytest.mark.parametrize("build", [opt, llama])
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_a_model_is_closer_to_its_dense_form_than_pruned_by_magnitude(build, pattern):
    model, simple, batches = build(), build(), token_batches()
    ids = torch.cat([batch["input_ids"] for batch in batches])
    with torch.no_grad():
        want = model(input_ids=ids).logits
    method, seen = sparsegpt(pattern=pattern), context(model, batches)
    layers = method.layers(model, seen)
    made = method.finalize(method.prepare(model, seen), seen)
    detail = {**method.detail(made, seen), **seen.facts}
    assert detail["layers"] == len(layers)
    assert all(abs(value - 0.5) < 0.001 for value in detail["sparsity_by_layer"].values())
    assert detail["damping_largest"] == 0.01
    assert detail["by_magnitude"] == []
    if pattern:
        assert ((made.get_submodule(layers[-1]).weight.view(-1, 4) != 0).sum(1) == 2).all()
    prune_magnitude(simple, layers, 0.5, pattern)
    with torch.no_grad():
        errors = [float((m(input_ids=ids).logits - want).norm()) for m in (made, simple)]
    assert errors[0] < 0.95 * errors[1]


def test_convolutions_are_pruned_too_and_depthwise_ones_by_magnitude_and_said():
    model, simple, batches = efficientnet(), efficientnet(), image_batches()
    layers = select(model, describe(model)).layers
    depthwise = [name for name in layers if getattr(model.get_submodule(name), "groups", 1) > 1]
    x = torch.cat([batch["pixel_values"] for batch in batches])
    want = model(pixel_values=x).logits
    method, seen = sparsegpt(), context(model, batches)
    made = method.finalize(method.prepare(model, seen), seen)
    prune_magnitude(simple, layers, 0.5)
    assert depthwise
    assert seen.facts["by_magnitude"] == depthwise
    for name in depthwise:
        assert torch.equal(made.get_submodule(name).weight, simple.get_submodule(name).weight)
    with torch.no_grad():
        errors = [float((m(pixel_values=x).logits - want).norm()) for m in (made, simple)]
    assert errors[0] < errors[1]


def test_a_gradual_schedule_prunes_during_training_and_leaves_the_mode_alone():
    model, batches = opt(), token_batches(2)
    method, seen = sparsegpt(sparsity=0.6, schedule="cubic"), context(model, batches, steps=100)
    model = method.prepare(model, seen).train()
    wrapper = nn.ModuleDict({"model": model})
    (callback,) = method.callbacks(seen)
    assert isinstance(callback, GradualMasks)
    assert callback.until / callback.every <= 8
    masks = None
    for step in (20, 50, callback.until):
        callback.prune(wrapper, callback.target(step))
        assert all(module.training for module in model.modules())
        now = model.model.decoder.layers[1].fc1.weight_mask.clone()
        assert masks is None or not (now & ~masks).any()
        masks = now
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.001)
    detail = method.detail(method.finalize(model, seen), seen)
    assert detail["sparsity"] == pytest.approx(0.6, abs=0.001)


def test_a_fit_that_is_resumed_after_its_last_pruning_tells_what_was_found_all_the_same():
    model, batches = opt(), token_batches(2)
    method, whole, resumed = sparsegpt(schedule="cubic"), *(context(model, batches, steps=4) for _ in range(2))
    (first,), (second,) = method.callbacks(whole), method.callbacks(resumed)
    first.prune(nn.ModuleDict({"model": method.prepare(model, whole)}), 0.5)
    second.load_state_dict(first.state_dict())
    assert resumed.facts == whole.facts
    assert "damping_largest" in resumed.facts


def test_masks_of_earlier_pruning_survive_and_a_second_time_prunes_further():
    model, batches = opt(), token_batches(2)
    layer = model.model.decoder.layers[0].fc1
    earlier = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(0)) > 0.3
    set_mask(layer, earlier.clone())
    layers = select(model, describe(model)).layers
    prune_sparsegpt(model, layers, 0.5, batches, describe(model))
    assert not (layer.weight_mask & ~earlier).any()
    assert float((layer.weight == 0).float().mean()) == 0.5
    prune_sparsegpt(model, layers, 0.75, batches, describe(model))
    assert float((layer.weight == 0).float().mean()) == 0.75


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model, batches = opt().to(dtype), token_batches(1)
    prune_sparsegpt(model, select(model, describe(model)).layers, 0.5, batches, describe(model))
    weight = model.model.decoder.layers[1].fc2.weight
    assert weight.dtype == dtype
    assert float((weight == 0).float().mean()) == 0.5


def test_nan_weights_no_layers_and_no_effect_are_errors():
    model, batches = opt(), token_batches(1)
    layers = select(model, describe(model)).layers
    with pytest.raises(LeanfitError, match="prunes not one weight of 12 layers"):
        prune_sparsegpt(opt(), layers, 1e-5, batches, describe(model))
    with pytest.raises(LeanfitError, match="no layer"):
        prune_sparsegpt(opt(), [], 0.5, batches, describe(model))
    model.model.decoder.layers[1].fc2.weight.data[3, 4] = float("nan")
    with pytest.raises(LeanfitError, match=r"model\.decoder\.layers\.1\.fc2.*NaN"):
        sparsegpt().prepare(model, context(model, batches))
    assert float((model.model.decoder.layers[0].fc1.weight == 0).float().mean()) == 0
