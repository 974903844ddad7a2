"""8-bit state against the paper's definition, and the optimizer against float32 AdamW."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.optimizers.blockwise import AdamWBlockwise, decode, dynamic_map, encode
from tests.optimizers.test_optimizers import choice


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_has_256_values_denser_towards_zero(signed):
    values = dynamic_map(signed)
    assert len(values.unique()) == 256
    assert values.max() == 1.0
    assert 0.0 in values
    assert (values.min() < -0.99) if signed else (values.min() == 0.0)
    positive = values[values > 0]
    # The paper's bits: after the sign, as many zeros as the decade is below 1, a one, and a fraction of what is left.
    for decade in range(7):
        low, high = 10.0 ** (decade - 7), 10.0 ** (decade - 6)
        inside = positive[(positive > low) & (positive < high)]
        assert len(inside) == 2**decade * (1 if signed else 2)
        torch.testing.assert_close(
            inside.diff(), torch.full_like(inside[1:], (high - low) / len(inside)), rtol=1e-3, atol=0
        )


@given(st.integers(0, 10_000), st.integers(1, 700), st.sampled_from([16, 64, 256]), st.booleans())
@settings(deadline=None, max_examples=40)
def test_a_code_is_the_nearest_value_of_the_map(seed, count, block, signed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator) * 10.0 ** torch.randint(-6, 3, (count,), generator=generator)
    values = values if signed else values.abs()
    back = decode(*encode(values, block, signed), block, signed)
    for start in range(0, count, block):
        part, got = values[start : start + block], back[start : start + block]
        scale = part.abs().max()
        nearest = (part.unsqueeze(1) - scale * dynamic_map(signed)).abs().min(1).values
        # Codes are looked up by bfloat16 numbers, which lie up to 2^-8 off: neighbours may be swapped within that.
        assert ((got - part).abs() <= nearest + part.abs() * 2**-7 + 1e-30).all()


def test_zeros_stay_zeros_and_what_is_not_finite_is_not_hidden():
    assert torch.equal(decode(*encode(torch.zeros(40), 16, True), 16, True), torch.zeros(40))
    for bad in (float("nan"), float("inf")):
        values = torch.ones(32)
        values[3] = bad
        back = decode(*encode(values, 16, True), 16, True)
        assert back[:16].isnan().all()
        assert torch.equal(back[16:], torch.ones(16))


def regression(optimizer_of, dtype=torch.float32, steps=60):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
    data = torch.randn(256, 32)
    target = torch.sin(data @ torch.randn(32, 8))
    model, data, target = model.to(dtype), data.to(dtype), target.to(dtype)
    optimizer = optimizer_of(model)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(data) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, optimizer, losses


def test_it_trains_as_float32_adamw_does():
    _, _, reference = regression(lambda model: choice("adamw", weight_decay=0.1).build(model, 5e-3))
    _, _, losses = regression(lambda model: choice("adamw8bit", min_elements=0, weight_decay=0.1).build(model, 5e-3))
    assert reference[-1] < 0.5 * reference[0]
    assert losses[-1] == pytest.approx(reference[-1], rel=0.05)


def test_with_small_tensors_only_it_is_adamw():
    exact, _, _ = regression(lambda model: choice("adamw", implementation="plain").build(model, 5e-3), steps=10)
    same, _, _ = regression(lambda model: choice("adamw8bit", min_elements=10**6).build(model, 5e-3), steps=10)
    for one, other in zip(exact.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("columns", "blocks"), [(512, 2), (300, 2), (64, 1)])
def test_state_takes_two_bytes_a_parameter_and_two_scales_a_block_of_a_row(columns, blocks):
    weight = nn.Parameter(torch.randn(1000, columns))
    optimizer = choice("adamw8bit").build(nn.ParameterList([weight]), 1e-3)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    state = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    assert sum(value.nbytes for value in state) / weight.numel() == 2 + 8 * blocks / columns


def test_a_large_tensor_is_stepped_in_slices_as_it_would_be_whole(monkeypatch):
    def stepped(slice_elements):
        monkeypatch.setattr("pipeline.optimizers.blockwise.SLICE", slice_elements)
        torch.manual_seed(1)
        weight = nn.Parameter(torch.randn(130, 101))
        optimizer = AdamWBlockwise([weight], 1e-2, (0.9, 0.99), 1e-8, block=64, min_elements=0, weight_decay=0.1)
        for _ in range(3):
            weight.grad = torch.randn_like(weight)
            optimizer.step()
        return weight

    assert torch.equal(stepped(640), stepped(1 << 20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_optimizer_goes_on_bit_for_bit(dtype, tmp_path):
    def build(model):
        return choice("adamw8bit", min_elements=500).build(model, 5e-3)

    model, optimizer, _ = regression(build, dtype, steps=5)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    copy = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8)).to(dtype)
    resumed = build(copy)
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    copy.load_state_dict(weights)
    resumed.load_state_dict(state)
    for one, steps in ((model, optimizer), (copy, resumed)):
        for step in range(3):
            for number, weight in enumerate(one.parameters()):
                generator = torch.Generator().manual_seed(10 * step + number)
                weight.grad = torch.randn(weight.shape, generator=generator).to(dtype)
            steps.step()
    for first, second in zip(model.parameters(), copy.parameters(), strict=True):
        assert torch.equal(first, second)


def test_weights_that_are_not_contiguous_are_stepped_too():
    def stepped(weight):
        weight = nn.Parameter(weight)
        optimizer = choice("adamw8bit", min_elements=0).build(nn.ParameterList([weight]), 1e-2)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        return weight

    values = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stepped(values.t().contiguous().t()), stepped(values.clone()))
