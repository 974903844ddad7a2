"""A pass through a model on fake tensors in which blocks that are alike are computed once.

A transformer of 32 blocks is one block 32 times. While `folded` is entered, the first block of a kind runs, and what
the account sees meanwhile is its pattern; the others give tensors of the same shapes and nothing else. `unrolled` then
puts the pattern where they ran, in the forward pass and in the backward pass. So the time does not grow with the
depth, and blocks of any class will do.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from pipeline.layers.depth import INDICES
from pipeline.layers.linear import WeightOnlyLinear
from pipeline.planner.live import Block, Event, Live, Timeline, wraps
from pipeline.planner.workspaces import WORKSPACES

Around = Callable[[nn.Module, bool, bool], None]
"""(block, whether it is the backward pass, whether the block begins): what else happens there."""
AFTER = "_leanfit_after"
"""Attribute of what a block gave: what is to be done when its gradient is there, before that block's backward pass."""


class Account(Live):  # type: ignore[no-untyped-call]
    """`Live` that knows moments of a step instead of operators' names, and storages that count in part."""

    moment = ""

    def guest(self, size: float, kind: str) -> Tensor:
        """So many bytes, for as long as the tensor lives."""
        made = torch.empty(int(size), dtype=torch.uint8)
        self.hold([made], kind)
        return made

    def _note(self, tensor: Tensor, operator: str, kind: str) -> Block | None:
        return super()._note(tensor, self.moment, kind)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if wraps(types):
            return NotImplemented
        return super().__torch_dispatch__(func, types, args, kwargs)


class Like(NamedTuple):
    """What a tensor is like."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool


@dataclass
class Pattern:
    """What `block` did: numbers of events; and the leaves of its output, tensors as `Like`.

    `between`: what the block was given and what it gave, in both directions. Its likes have tensors of their own there,
    which of what they give (`gave`) are there at the end: some may be made long before, as attention's weights are.
    """

    block: nn.Module
    forward: range = range(0)
    began: int | None = None
    ended: int | None = None
    leaves: list[Any] = field(default_factory=list)
    spec: TreeSpec | None = None
    between: list[Block | None] = field(default_factory=list)
    gave: list[Block | None] = field(default_factory=list)

    def events(self, timeline: Timeline, backward: bool) -> dict[int, Event]:
        """What a like of the block adds to a pass, by the number of the event."""
        span = self.forward
        if backward:
            span = range(0) if self.began is None or self.ended is None else range(self.began, self.ended)
        apart = {id(block) for block in self.between}
        events = {number: timeline.events[number] for number in span}
        # A workspace is taken once, by whichever block comes first.
        return {n: event for n, event in events.items() if id(event[0]) not in apart and event[0].kind != WORKSPACES}

    def gives(self, timeline: Timeline) -> dict[int, Event]:
        """What the forward pass of a like makes of what it gives, by the number of the event."""
        gave = {id(block) for block in self.gave}
        return {n: timeline.events[n] for n in self.forward if id(timeline.events[n][0]) in gave}


@dataclass
class Folding:
    """The account of a folded pass.

    `around` is told where each block begins and ends, computed or not; what it does is done once. `within`: where the
    backward pass of one that is computed ends; what it does its likes do too.
    """

    account: Live
    around: Around = lambda *_: None
    within: Callable[[nn.Module], None] = lambda _: None
    patterns: dict[Any, Pattern] = field(default_factory=dict)
    repeats: list[tuple[int, Pattern, bool]] = field(default_factory=list)
    """(number of events before it, of which pattern, whether it is the backward pass)."""
    lent: list[Any] = field(default_factory=list)
    """Tensors whose end is told by a pattern."""

    def now(self) -> int:
        return len(self.account.timeline.events)

    def unrolled(self) -> Timeline:
        """The timeline as if every block had run. What is let go outside of blocks is let go of all of them; what a
        block lets go, as a cache that it makes longer, each lets go of its own."""
        folded = self.account.timeline
        events: list[Event] = []
        marks: list[tuple[int, str]] = []
        copies: Counter[int] = Counter()
        waiting, repeats = deque(folded.marks), deque(self.repeats)
        own = {number for _, pattern, backward in self.repeats for number in pattern.events(folded, backward)}
        for number in range(len(folded.events) + 1):
            while waiting and waiting[0][0] == number:
                marks.append((len(events), waiting.popleft()[1]))
            while repeats and repeats[0][0] == number:
                _, pattern, backward = repeats.popleft()
                does = pattern.events(folded, backward)
                for event in does.values():
                    copies[id(event[0])] += event[1]
                given = {} if backward else pattern.gives(folded)
                both = does | given
                events += (both[number] for number in sorted(both))
                events += ((block, -sign, ran) for block, sign, ran in given.values())  # the like's own come next
            for event in folded.events[number : number + 1]:
                block, sign, _ = event
                events += [event] * (1 + (copies.pop(id(block), 0) if sign < 0 and number not in own else 0))
        return Timeline(events, marks, folded.cuda)


@contextmanager
def folded(model: nn.Module, blocks: Sequence[str], folding: Folding) -> Iterator[None]:
    """While entered, of `blocks` (module names) that are alike and are given alike only the first is computed, in each
    pass through `model`: the next one finds caches longer, and packed what was packed."""
    modules = [model.get_submodule(name) for name in blocks]
    anew = model.register_forward_pre_hook(lambda *_: folding.patterns.clear())
    before = [block.__dict__.get("forward") for block in modules]
    for block, plain in zip(modules, before, strict=True):
        inner = plain or MethodType(type(block).forward, block)
        block.__dict__["forward"] = partial(_forward, folding, block, inner)
    try:
        yield
    finally:
        anew.remove()
        for block, plain in zip(modules, before, strict=True):
            del block.__dict__["forward"]
            if plain is not None:
                block.__dict__["forward"] = plain


def _forward(folding: Folding, block: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    leaves, spec = tree_flatten((args, kwargs))
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    key = (_kind(block), torch.is_grad_enabled(), str(spec), *(_alike(leaf) for leaf in leaves))
    folding.around(block, False, True)
    pattern = folding.patterns.get(key)
    if pattern is None:
        folding.patterns[key] = pattern = Pattern(block)
        out = _computed(folding, pattern, block, lambda: inner(*args, **kwargs), inputs)
    else:
        folding.repeats.append((folding.now(), pattern, False))
        anchor = torch.empty(0, requires_grad=any(like.requires_grad for like in _tensors(pattern)))
        made = iter(_StandIn.apply(folding, block, pattern, anchor, *inputs))  # type: ignore[no-untyped-call]
        assert pattern.spec is not None
        out = tree_unflatten([next(made) if isinstance(leaf, Like) else leaf for leaf in pattern.leaves], pattern.spec)
        _lend(folding, block, pattern.block)
    folding.around(block, False, False)
    return out


def _lend(folding: Folding, block: nn.Module, like: nn.Module) -> None:
    """Layers of `block` give their weights to a kernel, as those of `like` have: what that takes is in the pattern."""
    for layer, other in zip(block.modules(), like.modules(), strict=True):
        if not isinstance(layer, WeightOnlyLinear) or not isinstance(other, WeightOnlyLinear):
            continue
        if other.handed_over and not layer.handed_over:
            folding.lent.append(list(layer.buffers()))
            with folding.account.unnoted():
                layer.hand_over()


def _computed(
    folding: Folding, pattern: Pattern, block: nn.Module, forward: Callable[[], Any], inputs: list[Tensor]
) -> Any:
    """What the block gives; `pattern` learns what it does, now and in the backward pass."""
    started = folding.now()
    out = forward()
    pattern.forward = range(started, folding.now())
    leaves, pattern.spec = tree_flatten(out)
    pattern.leaves = [_alike(leaf) for leaf in leaves]
    block_of = folding.account.block
    pattern.gave = [block_of(tensor) for tensor in leaves if isinstance(tensor, Tensor)]
    pattern.between = [*map(block_of, inputs), *pattern.gave]
    left = sum(given.requires_grad for given in inputs)

    def begin(after: list[Callable[[Tensor], None]], gradient: Tensor) -> None:
        while after:  # first the block that comes after this one ends
            after.pop()(gradient)
        pattern.between.append(block_of(gradient))
        if pattern.began is None:
            folding.around(block, True, True)
            pattern.began = folding.now()

    def end(gradient: Tensor) -> None:
        nonlocal left
        pattern.between.append(block_of(gradient))
        left -= 1
        if left == 0:
            folding.within(block)
            pattern.ended = folding.now()
            folding.around(block, True, False)

    for given in inputs:
        if given.requires_grad:
            after = getattr(given, AFTER, None)
            if after is None:
                given.register_hook(end)  # type: ignore[no-untyped-call]
            else:
                after.append(end)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            later: list[Callable[[Tensor], None]] = []
            setattr(leaf, AFTER, later)
            leaf.register_hook(partial(begin, later))  # type: ignore[no-untyped-call]
    return out


def _tensors(pattern: Pattern) -> list[Like]:
    return [leaf for leaf in pattern.leaves if isinstance(leaf, Like)]


def _alike(leaf: Any) -> Any:
    """What two arguments of equal effect on memory have in common."""
    if isinstance(leaf, Tensor):
        return Like(leaf.shape, leaf.dtype, leaf.requires_grad)
    return leaf if leaf is None or isinstance(leaf, bool | int | float | str) else type(leaf)


def _kind(block: nn.Module) -> Any:
    """What blocks have in common that do alike: classes, shapes, switches (a rate counts as on or off), who watches."""
    found: list[Any] = []
    for name, module in block.named_modules():
        switches = {
            key: bool(value) if isinstance(value, float) else value
            for key, value in module.__dict__.items()
            if isinstance(value, bool | int | float | str) and key not in INDICES
        }
        tensors = [*module._parameters.items(), *module._buffers.items()]
        shapes = [(key, _alike(value)) for key, value in tensors]
        found.append((name, type(module), len(module._forward_hooks), *sorted(switches.items()), *shapes))
    return tuple(found)


class _StandIn(torch.autograd.Function):
    """Outputs like those of the pattern's block, connected to the inputs as the block's are."""

    @staticmethod
    def forward(
        ctx: Any, folding: Folding, block: nn.Module, pattern: Pattern, anchor: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.folding, ctx.block, ctx.pattern = folding, block, pattern
        ctx.save_for_backward(*inputs)  # they live until the backward pass, as with the block itself
        likes = _tensors(pattern)
        made = [torch.empty(like.shape, dtype=like.dtype) for like in likes]
        ctx.mark_non_differentiable(*(out for out, like in zip(made, likes, strict=True) if not like.requires_grad))
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        folding: Folding = ctx.folding
        folding.around(ctx.block, True, True)
        folding.repeats.append((folding.now(), ctx.pattern, True))
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[4:], strict=True)
        made = [torch.empty_like(given) if needs else None for given, needs in needed]
        if any(gradient is not None for gradient in made):
            folding.around(ctx.block, True, False)
        return (None, None, None, None, *made)
