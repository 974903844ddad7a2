"""What is gathered from a layer's inputs, against a hooked forward pass; the inverse's factor, against the inverse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.errors import LeanfitError
from pipeline.layers.blockwise import segments
from pipeline.layers.hessian import collect, damping_facts, input_rows, inverse_factor
from pipeline.layers.select import select
from pipeline.models.architecture import describe
from tests.tiny import llama, opt
from tests.tiny import uneven_batches as batches


def inputs_of(model, name):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0].flatten(0, -2).double()))
    with torch.no_grad():
        for batch in batches():
            model.eval()(**batch)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("build", [opt, llama])
@pytest.mark.parametrize("full", [True, False])
def test_sums_are_those_of_a_hooked_forward_pass(build, full):
    model = build()
    layers = select(model, describe(model)).layers
    found = {}
    for segment in segments(model, describe(model), layers, batches(), "cpu"):
        found.update(collect(segment, segment.layers, full=full))
    assert sorted(found) == sorted(layers)
    for name in layers:
        x = inputs_of(model, name)
        want = x.t() @ x / len(x) if full else x.square().mean(0)
        got = found[name].mean()
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
        assert found[name].tokens == 5 * 16


@pytest.mark.parametrize(("build", "inputs"), [(opt, 4), (llama, 4)])
def test_layers_that_read_the_same_tensor_share_their_sums(build, inputs):
    model = build()
    layers = select(model, describe(model)).layers
    segment = next(segments(model, describe(model), layers, batches(), "cpu"))
    found = collect(segment, segment.layers, full=True)
    # query, key and value; output; up (and gate); down
    assert len({id(sums) for sums in found.values()}) == inputs
    query, key, value = (next(sums for name, sums in found.items() if part in name) for part in ("q_p", "k_p", "v_p"))
    assert query is key is value


class Writes(nn.Module):
    """Gives two layers one memory, with other values in it."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = x.clone()
        first = self.one(x)
        return first + self.two(x.mul_(2))


@pytest.mark.parametrize("inference", [False, True])
def test_a_tensor_that_was_written_to_in_between_is_another(inference):
    model, x = Writes(), torch.randn(8, 4)
    if inference:
        with torch.inference_mode():
            x = torch.randn(8, 4)
    segment = next(segments(model, describe(model), ["one", "two", "never"], [{"x": x}], "cpu"))
    found = collect(segment, segment.layers, full=True)
    one, two = (found[name].mean() for name in ("one", "two"))
    torch.testing.assert_close(two, 4 * one)
    assert "never" not in found


def test_infinite_inputs_are_an_error_that_names_the_layer():
    model = Writes()
    x = torch.tensor([[1.0, 2.0, float("inf"), 0.0]])
    segment = next(segments(model, describe(model), ["one"], [{"x": x}], "cpu"))
    with pytest.raises(LeanfitError, match=r"inputs of one hold NaN or infinity"):
        collect(segment, ["one"], full=True)["one"].mean()


CONVOLUTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)},
    {"kernel_size": (5, 4), "padding": "same", "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "valid", "stride": 2},
    {"kernel_size": 1, "padding": "same"},
    {"kernel_size": 3, "padding": 1, "groups": 3},
    {"kernel_size": 3, "padding": "same", "groups": 6},
    {"kernel_size": (3, 5), "padding": (2, 1), "stride": 2, "padding_mode": "reflect"},
    {"kernel_size": 4, "padding": "same", "padding_mode": "circular"},
]


@pytest.mark.parametrize("geometry", CONVOLUTIONS, ids=str)
def test_a_kernel_times_the_patches_is_the_convolution(geometry):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(6, 12, bias=False, **geometry), torch.randn(3, 6, 9, 8)
    rows = torch.cat(list(input_rows(layer, x)))
    weight = layer.weight.flatten(1).view(layer.groups, 12 // layer.groups, -1)
    got = torch.einsum("tgc,goc->tgo", rows.view(len(rows), layer.groups, -1), weight).flatten(1)
    want = layer(x).permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.cat(list(input_rows(layer, x[0]))), rows[: len(rows) // 3])


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 12), seed=st.integers(0, 10**6), damping=st.sampled_from([0.001, 0.01, 1.0]))
def test_the_factor_is_that_of_the_inverse(size, seed, damping):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * size, size, generator=generator, dtype=torch.float64)
    hessian = x.t() @ x
    before = hessian.clone()
    factor, used = inverse_factor(hessian, damping)
    assert used == damping
    assert torch.equal(hessian, before)
    assert torch.equal(factor, factor.triu())
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    torch.testing.assert_close(factor.t() @ factor, inverse)
    torch.testing.assert_close(factor, torch.linalg.cholesky(inverse, upper=True))


def test_a_singular_hessian_is_damped_until_it_is_not():
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    factor, used = inverse_factor(x.t() @ x, 0.0)
    assert used > 0
    assert torch.isfinite(factor).all()
    negative = -torch.eye(4)
    factor, used = inverse_factor(negative + 3 * torch.ones(4, 4), 0.01)  # eigenvalues -1, -1, -1, 11: raised twice
    assert used == pytest.approx(1.0)


def test_inputs_that_are_always_zero_stay_independent():
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 0
    for damping in (0.0, 0.01):
        factor, used = inverse_factor(x.t() @ x, damping)
        assert used == damping
        assert not factor[2, 3]
        assert not factor[:2, 2].any()
    assert torch.equal(inverse_factor(torch.zeros(3, 3), 0.0)[0].triu(1), torch.zeros(3, 3))


def test_dampings_are_told_by_layer():
    assert damping_facts({"a": 0.01, "b": 0.1}, 0.01) == {"damping_largest": 0.1, "damping_raised": {"b": 0.1}}
    assert damping_facts({}, 0.01) == {"damping_largest": 0.01, "damping_raised": {}}
