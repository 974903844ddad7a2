"""What an optimizer holds between steps, and while it steps: asked of the optimizer itself, on fake tensors.

Of weights of one shape one is stepped, twice, since the first step makes the state. A step that takes a large weight
slice by slice is broken off: the first slices show what it holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pipeline.memory.measure import storages
from pipeline.planner.live import Inner, Live

OPERATORS = 120
"""After so many for a weight a step is broken off. Muon takes 60."""
ALIKE = 4
"""Weights by which is seen whether all are stepped at once."""
Shape = tuple[int, torch.Size, torch.dtype, torch.dtype]
"""(number of the optimizer's group, shape, dtype, dtype of the gradient)."""


@dataclass(frozen=True)
class Stepped:
    """Bytes. `state`: sizes of its tensors, of all weights; `at_work`: beside it, while all weights are stepped;
    `alone`: while one weight is, by the weight's id. `tensors`: shapes and dtypes of its state, by its id, in the order
    of the optimizer."""

    state: Sequence[int]
    at_work: int
    alone: Mapping[int, int]
    tensors: Mapping[int, Sequence[tuple[torch.Size, torch.dtype]]]


def gradient_dtype(weight: Tensor) -> torch.dtype:
    return weight.grad_dtype or weight.dtype


def stepped(
    optimizer: torch.optim.Optimizer, local: Callable[[torch.Size], torch.Size], inner: Inner | None
) -> Stepped:
    """To be called in a FakeTensorMode, on an optimizer of fake weights, which is used up.

    Args:
        local: shape of the part of a weight that is stepped here.
        inner: see `Live`.
    """
    groups = optimizer.param_groups
    shapes: dict[int, Shape] = {
        id(weight): (number, local(weight.shape), weight.dtype, gradient_dtype(weight))
        for number, group in enumerate(groups)
        for weight in group["params"]
    }
    counts = Counter(shapes.values())
    samples = {shape: _sample(shape) for shape in counts}
    state: list[int] = []
    alone: dict[Shape, int] = {}
    tensors: dict[Shape, list[tuple[torch.Size, torch.dtype]]] = {}
    for shape, sample in samples.items():
        with _only(optimizer, groups, {sample: shape[0]}):
            _step(optimizer, inner, OPERATORS)
            alone[shape] = _step(optimizer, inner, OPERATORS)
        made = _tensors(optimizer.state[sample])
        tensors[shape] = [(tensor.shape, tensor.dtype) for tensor in made]
        sizes = [storage.nbytes() for storage in storages(made)]
        state += counts[shape] * sizes
    # Whether weights are stepped at once or in turn, when what one held may be let go as the next one has made its own.
    largest = max(alone, key=lambda shape: alone[shape])
    with _only(optimizer, groups, {_sample(largest): largest[0] for _ in range(ALIKE)}):
        _step(optimizer, inner, ALIKE * OPERATORS)
        work = _step(optimizer, inner, ALIKE * OPERATORS)
    if work > (ALIKE - 1) * alone[largest] > 0:
        work = sum(counts[shape] * size for shape, size in alone.items())
    return Stepped(
        state,
        work,
        {weight: alone[shape] for weight, shape in shapes.items()},
        {weight: tensors[shape] for weight, shape in shapes.items()},
    )


def _sample(shape: Shape) -> nn.Parameter:
    _, size, dtype, gradient = shape
    weight = nn.Parameter(torch.empty(size, dtype=dtype))
    weight.grad_dtype = gradient
    weight.grad = torch.empty(size, dtype=gradient)
    return weight


@contextmanager
def _only(
    optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]], weights: dict[nn.Parameter, int]
) -> Iterator[None]:
    """While entered, `optimizer` has just `weights`: {weight: number of its group}."""
    optimizer.param_groups = [
        {**group, "params": chosen}
        for number, group in enumerate(groups)
        if (chosen := [weight for weight, place in weights.items() if place == number])
    ]
    try:
        yield
    finally:
        optimizer.param_groups = groups


def _step(optimizer: torch.optim.Optimizer, inner: Inner | None, limit: int) -> int:
    """The bytes that a step holds beside weights, gradients and state."""
    watched = _Watch(inner, limit)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    watched.hold([*weights, *(weight.grad for weight in weights)], "held")
    watched.hold(_tensors([optimizer.state[weight] for weight in weights]), "held")
    before = watched.timeline.peak().bytes
    with suppress(_Enough), watched:
        optimizer.step()
    return watched.timeline.peak().bytes - before


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Enough(Exception):
    """Ends a step."""


class _Watch(Live):  # type: ignore[no-untyped-call]
    """`Live` for so many operators."""

    def __init__(self, inner: Inner | None, limit: int) -> None:
        super().__init__(inner)
        self.left = limit

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.left -= 1
        if self.left < 0:
            raise _Enough
        return super().__torch_dispatch__(func, types, args, kwargs)
