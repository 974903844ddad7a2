"""Stepping while the backward pass runs, one weight at a time, with rounding by chance."""

import copy

import pytest
import torch
from torch import nn

from pipeline.optimizers.stepping import step_in_backward, step_one_by_one, stochastic_bfloat16
from tests.optimizers.test_optimizers import choice
from tests.tiny import opt

IDS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
NAMES = ["adamw", "adamw8bit", "adafactor", "sgd", "muon"]


def trained(model, optimizer, steps=4, after=lambda model: None):
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for _ in range(steps):
        logits = model(input_ids=IDS, use_cache=False).logits
        nn.functional.cross_entropy(logits.flatten(0, 1).float(), IDS.flatten()).backward()
        after(model)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return model


@pytest.mark.parametrize("name", NAMES)
def test_weights_stepped_in_the_backward_pass_end_up_the_same(name):
    plain, early = opt(), opt()
    trained(plain, choice(name).build(plain, 1e-2))
    optimizer = choice(name).build(early, 1e-2)
    remove = step_in_backward(optimizer)

    def no_gradient_is_left(model):
        assert all(weight.grad is None for weight in model.parameters())

    trained(early, optimizer, after=no_gradient_is_left)
    for (label, one), other in zip(plain.named_parameters(), early.parameters(), strict=True):
        assert torch.equal(one, other), label
    remove()
    early(input_ids=IDS, labels=IDS).loss.backward()
    assert all(weight.grad is not None for weight in early.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_state_made_in_the_backward_pass_is_an_ordinary_one(name):
    early = opt()
    optimizer = choice(name).build(early, 1e-2)
    remove = step_in_backward(optimizer)
    trained(early, optimizer, steps=2)
    remove()
    plain = copy.deepcopy(early)
    other = choice(name).build(plain, 1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    trained(early, optimizer, steps=1)
    trained(plain, other, steps=1)
    for one, two in zip(early.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", NAMES)
def test_one_by_one_is_the_same_step(name):
    together, single = opt(), opt()
    trained(together, choice(name).build(together, 1e-2))
    optimizer = choice(name).build(single, 1e-2)
    step_one_by_one(optimizer, stochastic=False)
    trained(single, optimizer)
    for one, two in zip(together.parameters(), single.parameters(), strict=True):
        assert torch.equal(one, two)


def test_rounding_by_chance_takes_a_neighbour_and_is_right_on_average():
    torch.manual_seed(0)
    value = torch.tensor([1.0 + 2**-10, -3.0 - 2**-9, 1.5, 0.0, float("inf"), float("nan")])
    rounded = torch.stack([stochastic_bfloat16(value) for _ in range(4000)]).float()
    assert set(rounded[:, 0].tolist()) == {1.0, 1.0 + 2**-7}
    assert set(rounded[:, 1].tolist()) == {-3.0, -3.0 - 2**-6}
    torch.testing.assert_close(rounded[:, :2].mean(0), value[:2], rtol=0, atol=2e-3)
    assert (rounded[:, 2] == 1.5).all()
    assert (rounded[:, 3] == 0.0).all()
    assert rounded[:, 4].isinf().all()
    assert rounded[:, 5].isnan().all()


@pytest.mark.parametrize("name", NAMES)
def test_steps_too_small_for_bfloat16_count_with_rounding_by_chance_alone(name):
    def moved(stochastic):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 4, bias=False)).bfloat16()
        for weight in model.parameters():
            nn.init.ones_(weight)
        kind = {"adafactor": 1e-4, "sgd": 1e-4}.get(name, 1e-4)
        optimizer = choice(name, weight_decay=0.0).build(model, kind)
        if stochastic:
            step_one_by_one(optimizer, stochastic=True)
        for _ in range(40):
            for weight in model.parameters():
                weight.grad = torch.ones_like(weight)
            optimizer.step()
        assert all(weight.dtype == torch.bfloat16 for weight in model.parameters())
        return (1 - model[-1].weight.float()).mean().item()

    assert moved(False) == 0.0
    assert moved(True) > 1e-3


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_state_of_bfloat16_weights_stays_bfloat16(name):
    model = opt().bfloat16()
    optimizer = choice(name).build(model, 1e-3)
    step_one_by_one(optimizer, stochastic=True)
    trained(model, optimizer, steps=2)
    for weight in model.parameters():
        moments = [v for v in optimizer.state[weight].values() if isinstance(v, torch.Tensor) and v.ndim]
        assert moments
        assert all(value.dtype == torch.bfloat16 for value in moments)


@pytest.mark.parametrize(("weights", "gradients"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("stochastic", [False, True])
def test_gradients_may_be_held_in_another_dtype(weights, gradients, stochastic):
    model = opt().to(weights)
    for weight in model.parameters():
        weight.grad_dtype = gradients
    optimizer = choice("adamw").build(model, 1e-2)
    step_one_by_one(optimizer, stochastic=stochastic)
    losses = []

    def check(model):
        assert {weight.grad.dtype for weight in model.parameters()} == {gradients}
        losses.append(model(input_ids=IDS, labels=IDS).loss.item())

    trained(model, optimizer, steps=12, after=check)
    assert {weight.dtype for weight in model.parameters()} == {weights}
    assert losses[-1] < losses[0] - 0.05


def seen_by_the_hook_that_averages(weight, optimizer):
    """How often a hook that is put on as DistributedDataParallel does is run in two steps."""
    seen = []
    accumulator = weight.view_as(weight).grad_fn.next_functions[0][0]
    accumulator.register_hook(lambda *_: seen.append(1))
    for _ in range(2):
        weight.square().sum().backward()
        optimizer.step()
    return len(seen)


def test_a_weight_that_is_rounded_by_chance_keeps_the_hook_that_averages_its_gradient():
    weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    step_one_by_one(optimizer, stochastic=True)
    assert seen_by_the_hook_that_averages(weight, optimizer) == 2
