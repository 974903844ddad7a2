"""Losses that are sums over rows of logits, computed from a slice of the rows at a time.

Of logits in 16 bits, torch's cross-entropy holds a copy in float32, its log-softmax and two gradients: 14 bytes a logit
at the peak (16 where they are float32). Nothing between the logits and their gradient is needed for longer than its row
is: here each slice is computed in float32, and again in the backward pass, so that beside the logits only their
gradient is held, 4 bytes a logit (8), and a slice's worth. It is quicker, too, since slices stay in a processor's
cache. As in Liger Kernel (Hsu et al., 2024, arXiv:2410.10989), but by torch's operators on any device, and with the
gradient rounded once, after a loss scale has been applied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.layers.quantize import at_least_float32

IGNORED = -100
"""A target whose row counts nothing."""
SLICES = 16
"""At most, so that a slice is small beside the logits and its start costs little."""
SMALLEST = 2**20
"""Logits of a slice, at least, 4 MiB in float32: fewer are quicker computed once than twice."""


class Criterion(Protocol):
    """Nats of `targets` int64 [N] (-100: left out) under logits [N, V], summed, or their mean; a scalar."""

    def __call__(self, logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor: ...


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Nats of `targets` int64 [N] (-100: left out) under `logits` [N, V]: "mean" over those that count, or "sum".

    A scalar in float32 (float64 where the logits are). Gradients are those of torch's cross-entropy, to the bit.
    """
    total = sum_over_rows(_nats, logits, targets)
    return total / (targets != IGNORED).sum() if reduction == "mean" else total


def whole_cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """The same from all rows at once: what a compiler makes one kernel of, which holds no more."""
    return functional.cross_entropy(at_least_float32(logits), targets, ignore_index=IGNORED, reduction=reduction)


def sum_over_rows(function: Callable[..., Tensor], logits: Tensor, *beside: Tensor) -> Tensor:
    """The sum of what `function` gives for slices of `logits` [N, ...] and of each of `beside` [N, ...].

    Args:
        function: of one slice of each, its sum over the slice's rows, a scalar; differentiable in the first, and
            without random numbers, as it runs twice.
        beside: what no gradient is wanted of.
    """
    if logits.numel() <= SMALLEST:
        return function(logits, *beside)
    return cast(Tensor, _SumOverRows.apply(function, logits, *beside))  # type: ignore[no-untyped-call]


class _SumOverRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return torch.stack([function(*parts) for parts in _slices(tensors)]).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("a loss computed in slices has no second derivative (create_graph=True)")
        logits, *beside = ctx.saved_tensors
        found = torch.empty_like(logits)
        for place, part, *others in _slices([found, logits, *beside]):
            leaf = part.detach().requires_grad_()
            with torch.enable_grad():
                total = ctx.function(leaf, *others)
            place.copy_(torch.autograd.grad(total, leaf, gradient)[0])
        return None, found, *(None for _ in beside)


def _slices(tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Each of the tensors [N, ...] cut alike, by what the first holds."""
    first = tensors[0]
    rows = max(-(-len(first) // SLICES), SMALLEST * len(first) // first.numel(), 1)
    return list(zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True))


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    return whole_cross_entropy(logits, targets, "sum")
