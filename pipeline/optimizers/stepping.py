"""How an optimizer steps, whichever it is: weight by weight, while the backward pass runs, with stochastic rounding,
from gradients of another dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def only(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> Iterator[None]:
    """While entered, `optimizer` has just the one of its weights, with the settings of the group it is in."""
    groups = optimizer.param_groups
    optimizer.param_groups = [
        {**group, "params": [weight]} for group in groups if any(one is weight for one in group["params"])
    ]
    try:
        yield
    finally:
        optimizer.param_groups = groups


def step_in_backward(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Steps each weight as soon as its gradient is there, and frees the gradient: they are never all held.

    As in Lv et al., 2023 (LOMO, arXiv:2306.09782), for any optimizer. The state stays the optimizer's own, so
    schedules and checkpoints do not notice. What needs all gradients at once (clipping, accumulation, loss scaling)
    cannot be had.

    Returns:
        A function that takes it off again.
    """

    def step(weight: nn.Parameter) -> None:
        with only(optimizer, weight):
            optimizer.step()
        weight.grad = None

    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    handles = [weight.register_post_accumulate_grad_hook(step) for weight in weights]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def step_one_by_one(optimizer: torch.optim.Optimizer, *, stochastic: bool) -> None:
    """From now on `optimizer.step` takes one weight at a time, its gradient in the dtype that the weight is updated in.

    So gradients may be held in another dtype than the weights (`weight.grad_dtype`): just one is converted at a time.

    Args:
        stochastic: bfloat16 weights are updated in float32 and rounded up or down by chance. A weight rounded to the
            nearest bfloat16 does not move at all where a step is less than half of its last place (1/256 of it), as
            most are; rounded by chance it moves as far on average (Gupta et al., 2015, arXiv:1502.02551; Zamirai et
            al., 2020, arXiv:2010.06192). State is kept in bfloat16, rounded to nearest.
    """

    def around(weight: nn.Parameter) -> AbstractContextManager[None]:
        wide = torch.float32 if stochastic and weight.dtype == torch.bfloat16 else weight.dtype
        return _updated_in(optimizer, weight, wide)

    step_each(optimizer, around)


def step_each(optimizer: torch.optim.Optimizer, around: Callable[[nn.Parameter], AbstractContextManager[None]]) -> None:
    """From now on `optimizer.step` takes one weight at a time, each within `around(weight)`; may be laid around again.

    Most optimizers step each weight by itself, so that this changes nothing else.
    """
    plain = optimizer.step

    def step(self: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for weight in [weight for group in self.param_groups for weight in group["params"]]:
            if weight.grad is not None:
                with only(self, weight), around(weight):
                    plain()
        return loss

    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]


@contextmanager
def in_place_of(optimizer: torch.optim.Optimizer, weight: nn.Parameter, other: nn.Parameter) -> Iterator[None]:
    """While entered, `optimizer`, which has just `weight`, has `other` instead, with the state.

    For what is stepped in another dtype or on another device: torch forgets the hooks of a weight that is given data of
    such, the one that averages its gradient over devices among them.
    """
    (group,) = optimizer.param_groups
    group["params"] = [other]
    optimizer.state[other] = optimizer.state.pop(weight, {})
    try:
        yield
    finally:
        optimizer.state[weight] = optimizer.state.pop(other)
        group["params"] = [weight]


@contextmanager
def _updated_in(optimizer: torch.optim.Optimizer, weight: nn.Parameter, dtype: torch.dtype) -> Iterator[None]:
    """While entered, `optimizer` steps `weight` with its gradient and its state in `dtype`."""
    assert weight.grad is not None
    wide = nn.Parameter(weight.detach().to(dtype))
    wide.grad = weight.grad.to(dtype)
    with in_place_of(optimizer, weight, wide):
        _convert_state(optimizer, wide, weight.dtype, dtype)
        yield
        wide.grad = None
        _convert_state(optimizer, wide, dtype, weight.dtype)
    if dtype != weight.dtype:
        weight.data.copy_(stochastic_bfloat16(wide.data))


def _convert_state(optimizer: torch.optim.Optimizer, weight: nn.Parameter, old: torch.dtype, new: torch.dtype) -> None:
    """Of the weight's state, what torch's optimizers make in the weight's dtype: as many dimensions as it has."""
    state = optimizer.state[weight]
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dtype == old != new and value.ndim == weight.ndim > 0:
            state[name] = value.to(new)


def stochastic_bfloat16(values: Tensor) -> Tensor:
    """bfloat16 of float32 `values`: the neighbour above or below, likelier the nearer; what is exact stays.

    Uses the generator of the values' device. Infinities and NaN are kept.
    """
    bits = values.view(torch.int32)
    noise = torch.randint_like(bits, 1 << 16)
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).bfloat16()
