"""AdamW, SGD and the learning rate over the steps, against the formulas and plain torch."""

import math

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic.type_adapter import TypeAdapter
from torch import nn

from pipeline.errors import ConfigError
from pipeline.optimizers.adamw import AdamW
from pipeline.optimizers.sgd import SGD
from pipeline.registry import conf_root, lookup


def choice(name, **changes):
    given_values = yaml.safe_load((conf_root() / "optimizer" / f"{name}.yaml").read_text()) | changes
    return TypeAdapter(lookup("optimizer", given_values["name"])).validate_python(given_values, strict=False)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm = nn.Embedding(10, 8), nn.LayerNorm(8)
        self.head, self.frozen = nn.Linear(8, 10), nn.Linear(8, 8)
        self.head.weight = self.embedding.weight
        self.frozen.requires_grad_(False)

    def forward(self, ids):
        return self.head(self.norm(self.frozen(self.embedding(ids))))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_matrices_decay_vectors_do_not_and_each_trained_parameter_counts_once(name):
    model = Tied()
    optimizer = choice(name, weight_decay=0.3).build(model, lr=0.01)
    decay, plain = optimizer.param_groups
    assert [id(weight) for weight in decay["params"]] == [id(model.embedding.weight)]
    assert {id(w) for w in plain["params"]} == {id(model.norm.weight), id(model.norm.bias), id(model.head.bias)}
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert decay["lr"] == plain["lr"] == 0.01


def test_a_model_with_vectors_only_gets_one_group():
    groups = choice("sgd").build(nn.ParameterList([nn.Parameter(torch.ones(3))]), lr=0.1).param_groups
    assert [group["weight_decay"] for group in groups] == [0.0]


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_nothing_to_train_is_an_error(name):
    with pytest.raises(ValueError, match="nothing to train"):
        choice(name).build(nn.ParameterList([nn.Parameter(torch.ones(3), requires_grad=False)]), lr=0.1)


def adamw_by_hand(weight, gradients, lr, betas, eps, decay):
    """Algorithm 2 of Loshchilov & Hutter, 2019, in float64."""
    weight, first, second = weight.double(), 0.0, 0.0
    for step, gradient in enumerate(gradients, start=1):
        weight = weight * (1 - lr * decay)
        first = betas[0] * first + (1 - betas[0]) * gradient.double()
        second = betas[1] * second + (1 - betas[1]) * gradient.double().square()
        mean, square = first / (1 - betas[0] ** step), second / (1 - betas[1] ** step)
        weight = weight - lr * mean / (square.sqrt() + eps)
    return weight


@pytest.mark.parametrize("implementation", ["auto", "fused", "foreach", "plain"])
@pytest.mark.parametrize(("shape", "decay"), [((4, 3), 0.2), ((4,), 0.0)])
def test_adamw_follows_the_papers_algorithm(implementation, shape, decay):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape))
    start, gradients = weight.detach().clone(), [torch.randn(shape) for _ in range(5)]
    optimizer = choice("adamw", implementation=implementation, weight_decay=0.2, betas=[0.8, 0.9], eps=1e-6).build(
        nn.ParameterList([weight]), lr=0.05
    )
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    expected = adamw_by_hand(start, gradients, 0.05, (0.8, 0.9), 1e-6, decay)
    assert torch.allclose(weight.double(), expected, atol=1e-6)


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_with_momentum_follows_its_formula(nesterov):
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = choice("sgd", nesterov=nesterov, momentum=0.9, weight_decay=0.1).build(
        nn.ParameterList([weight]), lr=0.05
    )
    by_hand, velocity = torch.ones(2, 2), torch.zeros(2, 2)
    for gradient in (torch.eye(2), torch.full((2, 2), 0.5), -torch.eye(2)):
        weight.grad = gradient.clone()
        optimizer.step()
        gradient = gradient + 0.1 * by_hand
        velocity = 0.9 * velocity + gradient
        by_hand = by_hand - 0.05 * (gradient + 0.9 * velocity if nesterov else velocity)
    assert torch.allclose(weight, by_hand, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_auto_takes_the_fused_kernel_for_every_float_on_the_cpu(dtype):
    optimizer = choice("adamw").build(nn.ParameterList([nn.Parameter(torch.ones(2, 2, dtype=dtype))]), lr=0.1)
    assert all(group["fused"] for group in optimizer.param_groups)


def test_weights_without_a_fused_kernel_get_the_plain_loop_or_an_error_if_it_was_demanded():
    weight = nn.Parameter(torch.ones(2, 2, device="meta"))
    optimizer = choice("adamw").build(nn.ParameterList([weight]), lr=0.1)
    assert [(group["fused"], group["foreach"]) for group in optimizer.param_groups] == [(False, False)]
    with pytest.raises(ConfigError, match=r"optimizer\.implementation=fused.*use optimizer\.implementation=auto"):
        choice("adamw", implementation="fused").build(nn.ParameterList([weight]), lr=0.1)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_kind_that_copies_the_gradients_is_not_used_unasked(name):
    groups = choice(name).build(nn.Linear(2, 2), lr=0.1).param_groups
    assert not any(group["foreach"] for group in groups)


def test_warm_up_rises_in_a_straight_line_and_ends_at_the_peak():
    factor = choice("adamw", warmup_steps=4, schedule="constant").factor
    assert [factor(step, 100) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_warm_up_takes_at_most_a_tenth_of_the_steps():
    factor = choice("adamw", warmup_steps=20, schedule="constant").factor
    assert [factor(step, 20) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert factor(0, 5) == 1.0


@pytest.mark.parametrize(("schedule", "middle"), [("cosine", 0.55), ("linear", 0.55)])
def test_decay_starts_at_one_is_half_way_in_the_middle_and_ends_at_the_minimum(schedule, middle):
    factor = choice("adamw", warmup_steps=0, schedule=schedule, min_lr_ratio=0.1).factor
    assert factor(0, 100) == 1.0
    assert factor(50, 100) == pytest.approx(middle)
    assert factor(100, 100) == pytest.approx(0.1)
    assert factor(1000, 100) == pytest.approx(0.1)
    assert factor(25, 100) == pytest.approx(0.1 + 0.9 * (0.75 if schedule == "linear" else (1 + math.sqrt(0.5)) / 2))


@given(
    step=st.integers(0, 400), steps=st.integers(1, 300), warmup=st.integers(0, 100), ratio=st.floats(0, 1),
    schedule=st.sampled_from(["constant", "cosine", "linear"]),
)  # fmt: skip
@settings(deadline=None)
def test_the_factor_is_positive_at_the_start_never_above_one_and_falls_after_warm_up(
    step, steps, warmup, ratio, schedule
):
    factor = choice("adamw", warmup_steps=warmup, schedule=schedule, min_lr_ratio=ratio).factor
    assert 0 < factor(0, steps) <= 1
    assert 0 <= factor(step, steps) <= 1
    if step >= warmup:
        assert factor(step + 1, steps) <= factor(step, steps) + 1e-12


def test_the_schedule_drives_torchs_scheduler_from_start_to_end():
    settings_of_the_run = choice("adamw", warmup_steps=2, schedule="linear", min_lr_ratio=0.0)
    optimizer = settings_of_the_run.build(nn.ParameterList([nn.Parameter(torch.ones(2))]), 0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: settings_of_the_run.factor(step, 20))
    rates = []
    for _ in range(20):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:3] == pytest.approx([0.5 / 3, 1.0 / 3, 0.5])
    assert rates[-1] == pytest.approx(0.5 / 18)


def test_nesterov_without_momentum_is_a_problem():
    assert choice("sgd").problems() == []
    assert "optimizer.nesterov=true" in choice("sgd", momentum=0.0).problems()[0]
    assert choice("sgd", momentum=0.0, nesterov=False).problems() == []


@pytest.mark.parametrize(
    ("cls", "name", "changes"),
    [
        (AdamW, "adamw", {"lr": 0}), (AdamW, "adamw", {"betas": [0.9]}), (AdamW, "adamw", {"betas": [0.9, 1.0]}),
        (AdamW, "adamw", {"eps": 0.0}), (AdamW, "adamw", {"implementation": "please"}),
        (AdamW, "adamw", {"schedule": "cosin"}),
        (AdamW, "adamw", {"min_lr_ratio": 1.5}), (SGD, "sgd", {"momentum": 1.0}), (SGD, "sgd", {"warmup_steps": -1}),
    ],
)  # fmt: skip
def test_settings_of_wrong_type_or_range_do_not_decode(cls, name, changes):
    assert lookup("optimizer", name) is cls
    with pytest.raises(ValidationError):
        choice(name, **changes)
