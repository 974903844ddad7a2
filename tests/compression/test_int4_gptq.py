"""GPTQ: against the column loop of the paper, against rounding to nearest, and on whole models."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.compression.int4 import quantize_int4
from pipeline.compression.int4_gptq import Int4Gptq, quantize_gptq
from pipeline.errors import LeanfitError
from pipeline.layers.gptq import gptq_quantize
from pipeline.layers.quantize import Grid, find_scales, quantize_rows
from pipeline.layers.quantized import quantized_layers
from pipeline.layers.select import select
from pipeline.layers.sparsity import set_mask
from pipeline.models.architecture import describe
from tests import tiny
from tests.tiny import efficientnet, image_batches, opt, token_batches


def gptq(**changes):
    usual = {
        "bits": 4, "group_size": 16, "symmetric": True, "damping": 0.01, "activation_order": True, "block_size": 128,
        "ignore": (),
    }  # fmt: skip
    return Int4Gptq(name="int4_gptq", **{**usual, **changes})


def llama():
    return tiny.odd_llama(layers=2)


def context(model, batches):
    return tiny.context(model, batches=batches)


def correlated(tokens, columns, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns // 2, columns, generator=generator, dtype=dtype)
    x = torch.randn(tokens, columns // 2, generator=generator, dtype=dtype) @ mix
    return x + 0.3 * torch.randn(tokens, columns, generator=generator, dtype=dtype)


def problem(seed=0, rows=6, columns=24, tokens=100):
    x = correlated(tokens, columns, seed)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return weight, x.t() @ x / tokens


def naive(weight, hessian, grid, damping, activation_order, mask=None):
    """OBQ's column loop, with the inverse of what is left of the Hessian computed anew for each column."""
    rows, columns = weight.shape
    scale, zero = find_scales(weight, grid)
    size = grid.group_size or columns
    w, integers = weight.clone(), torch.zeros(rows, columns)
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(columns, dtype=hessian.dtype)
    order = sorted(range(columns), key=lambda j: -float(hessian[j, j])) if activation_order else list(range(columns))
    while order:
        inverse = torch.linalg.inv(damped[order][:, order])
        j = order[0]
        for row in range(rows):
            step = scale[row, j // size]
            offset = zero[row, j // size] if zero is not None else 0
            q = torch.clamp(torch.round(w[row, j] / step) + offset, grid.low, grid.high)
            if mask is not None and not mask[row, j]:
                q = torch.tensor(float(offset))
            integers[row, j] = q
            w[row, order] -= (w[row, j] - (q - offset) * step) / inverse[0, 0] * inverse[0]
        order = order[1:]
    return integers.to(torch.int8)


@pytest.mark.parametrize("activation_order", [True, False])
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(4, 8, True), (3, None, False), (2, 6, False)])
@pytest.mark.parametrize("masked", [False, True])
def test_integers_are_those_of_the_papers_column_loop(activation_order, bits, group_size, symmetric, masked):
    weight, hessian = problem()
    mask = None
    if masked:
        mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(5)) > 0.4
        weight *= mask
    grid = Grid(bits, group_size, symmetric)
    want = naive(weight, hessian, grid, 0.01, activation_order, mask)
    assert not torch.equal(want, quantize_rows(weight, grid).integers)
    for block_size in (1, 5, 128):
        found = gptq_quantize(weight, hessian, grid, 0.01, block_size, activation_order, mask)
        assert torch.equal(found.quantized.integers, want)
        assert found.damping == 0.01


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.sampled_from([4, 3, 2]), symmetric=st.booleans(), order=st.booleans())
def test_the_output_is_always_closer_than_with_rounding_to_nearest(seed, bits, symmetric, order):
    x = correlated(256, 64, seed, torch.float32)
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))
    grid = Grid(bits, 16, symmetric)
    found = gptq_quantize(weight, x.t() @ x / len(x), grid, activation_order=order).quantized.dequantized()
    nearest = quantize_rows(weight, grid).dequantized()
    assert ((found - weight) @ x.t()).norm() < 0.9 * ((nearest - weight) @ x.t()).norm()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6), bits=st.sampled_from([2, 3, 4, 8]), symmetric=st.booleans(), order=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)  # fmt: skip
def test_independent_inputs_give_rounding_to_nearest(seed, bits, symmetric, order, dtype):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 32, generator=generator).to(dtype)
    grid = Grid(bits, 8, symmetric)
    wide = torch.promote_types(dtype, torch.float32)
    hessian = torch.diag(torch.rand(32, generator=generator) + 0.1).to(wide)
    want = quantize_rows(weight, grid)
    for h in (hessian, torch.eye(32, dtype=wide), torch.zeros(32, 32, dtype=wide)):
        found = gptq_quantize(weight, h, grid, activation_order=order).quantized
        assert torch.equal(found.integers, want.integers)
        assert torch.equal(found.scale, want.scale)
        assert symmetric or torch.equal(found.zero_point, want.zero_point)


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_is_the_change_of_the_output(masked):
    weight, hessian = problem(3)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(5)) > 0.5 if masked else None
    weight = weight * mask if masked else weight
    found = gptq_quantize(weight, hessian, Grid(3, 8), damping=0.05, mask=mask)
    change = found.quantized.dequantized() - weight
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    assert found.loss == pytest.approx(float((change @ damped @ change.t()).trace()))


@pytest.mark.parametrize("symmetric", [True, False])
def test_pruned_weights_stay_zero_and_the_others_make_up_for_them(symmetric):
    weight, hessian = problem(2, rows=16, columns=64)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    weight *= mask
    grid = Grid(3, 16, symmetric)
    found = gptq_quantize(weight, hessian, grid, mask=mask).quantized.dequantized()
    assert not found[~mask].any()
    nearest = quantize_rows(weight, grid).dequantized()
    errors = [float(((w - weight) @ hessian @ (w - weight).t()).trace()) for w in (found, nearest)]
    assert errors[0] < 0.9 * errors[1]
    # Quantizing as if nothing were pruned, and pruning again, is worse.
    again = gptq_quantize(weight, hessian, grid).quantized.dequantized() * mask
    assert errors[0] < float(((again - weight) @ hessian @ (again - weight).t()).trace())


def test_inputs_that_are_always_zero_are_rounded_to_nearest_and_fewer_tokens_than_inputs_will_do():
    weight, _ = problem()
    x = correlated(9, 24, 4)
    x[:, [3, 20]] = 0
    hessian = x.t() @ x / 9
    grid = Grid(4, 8)
    for damping in (0.01, 0.0):
        found = gptq_quantize(weight, hessian, grid, damping)
        assert found.damping == damping if damping else found.damping > 0
        nearest = quantize_rows(weight, grid).integers
        assert torch.equal(found.quantized.integers[:, [3, 20]], nearest[:, [3, 20]])
        assert not torch.equal(found.quantized.integers, nearest)


@pytest.mark.parametrize("build", [opt, llama])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_model_is_closer_to_its_float_form_than_rounded_to_nearest(build, bits):
    model, rounded, batches = build(), build(), token_batches(8)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    with torch.no_grad():
        want = model(input_ids=ids).logits
    method = gptq(bits=bits)
    seen = context(model, batches)
    assert method.preflight(model, seen) == []
    layers = method.layers(model, seen)
    made = method.finalize(model, seen)
    detail = {**method.detail(made, seen), **seen.facts}
    assert detail["layers"] == len(layers) == len(quantized_layers(made))
    assert detail["damping_largest"] == 0.01
    assert detail["damping_raised"] == {}
    assert detail["rounded_to_nearest"] == []
    quantize_int4(rounded, layers, 16, bits)
    with torch.no_grad():
        errors = [float((m(input_ids=ids).logits - want).norm()) for m in (made, rounded)]
    assert errors[0] < 0.9 * errors[1]


def test_convolutions_are_quantized_too_and_depthwise_ones_rounded_and_said():
    model, rounded, batches = efficientnet(), efficientnet(), image_batches()
    layers = select(model, describe(model)).layers
    depthwise = [name for name in layers if getattr(model.get_submodule(name), "groups", 1) > 1]
    x = torch.cat([batch["pixel_values"] for batch in batches])
    want = model(pixel_values=x).logits
    method, seen = gptq(bits=4, group_size=4), context(model, batches)
    made = method.finalize(model, seen)
    quantize_int4(rounded, layers, 4, 4)
    assert seen.facts["rounded_to_nearest"] == depthwise
    assert depthwise
    for name in layers:
        same = torch.equal(made.get_submodule(name).integers(), rounded.get_submodule(name).integers())
        assert same or name not in depthwise
    with torch.no_grad():
        errors = [float((m(pixel_values=x).logits - want).norm()) for m in (made, rounded)]
    assert errors[0] < errors[1]


def test_masks_of_earlier_pruning_survive():
    model, batches = opt(), token_batches(2)
    masks = {}
    for name in select(model, describe(model)).layers:
        layer = model.get_submodule(name)
        masks[name] = torch.rand(layer.weight.shape) > 0.5
        set_mask(layer, masks[name])
    made = gptq().finalize(model, context(model, batches))
    for name, layer in quantized_layers(made).items():
        assert layer.sparse
        assert not layer.dequantized()[~masks[name]].any()


def test_a_singular_hessian_is_told_by_layer():
    model = opt()
    # 8 tokens for 32 inputs and no damping: nothing can be inverted as it is.
    batches = [{"input_ids": torch.arange(8).view(1, 8)}]
    method, seen = gptq(damping=0.0), context(model, batches)
    made = method.finalize(model, seen)
    assert seen.facts["damping_largest"] > 0
    assert set(seen.facts["damping_raised"]) == set(quantized_layers(made))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model, batches = opt().to(dtype), token_batches(2)
    made = gptq().finalize(model, context(model, batches))
    layer = made.model.decoder.layers[1].fc2
    assert layer.weight_scale.dtype == dtype
    assert torch.isfinite(made(**batches[0]).logits).all()


def test_nan_weights_and_no_layers_are_errors():
    model, batches = opt(), token_batches(1)
    model.model.decoder.layers[1].fc2.weight.data[3, 4] = float("nan")
    with pytest.raises(LeanfitError, match=r"model\.decoder\.layers\.1\.fc2.*NaN"):
        gptq().finalize(model, context(model, batches))
    assert not quantized_layers(model)
    with pytest.raises(LeanfitError, match="no layer"):
        quantize_gptq(opt(), [], batches, describe(model), 16)


def test_a_bias_of_infinity_upstream_is_told_by_the_layer_it_reaches():
    model, batches = opt(), token_batches(1)
    model.model.decoder.layers[0].fc1.bias.data[0] = float("inf")
    with pytest.raises(LeanfitError, match=r"inputs of model\.decoder\.layers\.0\.fc2 hold NaN or infinity"):
        gptq().finalize(model, context(model, batches))
