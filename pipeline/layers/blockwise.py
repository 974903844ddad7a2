"""Calibration block by block: each part of a model is shown the activations that the parts before it now give.

    for segment in segments(model, architecture, layers, batches, device):
        norms = {name: ... for name in segment.layers}
        segment.observe({name: collect for ...})   # one pass of the calibration set through this block
        ...                                        # change the block's layers, in place
                                                   # the next block's inputs are then computed with the changed ones

Frantar et al., 2023 (arXiv:2210.17323) go through a model so. Only one block's working set is on the device at once;
the hidden states between blocks wait on the CPU, or in files where the weights do (layers/offload.py). A model without
a chain of blocks (or whose blocks are called in a way that is no chain) is one segment: itself. Layers outside of the
blocks come last, in a segment that is the whole model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from operator import methodcaller
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from pipeline.layers.offload import offload, place_of_model
from pipeline.layers.pulse import alike, pulse
from pipeline.models.base import Architecture

Batch = Mapping[str, Tensor]
Observer = Callable[[Tensor], None]


@dataclass
class Call:
    """Arguments of one call of a module, on the CPU."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def on(self, device: str) -> Call:
        return Call(*tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, self._parts()))

    def _parts(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.args, self.kwargs

    def with_hidden(self, hidden: Tensor) -> Call:
        """The same call with other hidden states: the first argument, by place or as `hidden_states`."""
        if self.args:
            return Call((hidden, *self.args[1:]), self.kwargs)
        return Call((), {**self.kwargs, "hidden_states": hidden})

    def sharing(self, other: Call) -> Call:
        """The call with tensors of `other` in place of its own where they are the same, but for the hidden states."""
        leaves, structure = tree_flatten(self._parts())
        others, alike = tree_flatten(other._parts())
        if alike != structure:
            return self
        pairs = zip(leaves, others, strict=True)
        shared = Call(*tree_unflatten([theirs if _equal(own, theirs) else own for own, theirs in pairs], structure))
        return shared.with_hidden(self.hidden) if isinstance(self.hidden, Tensor) else shared

    def first_row(self) -> Call:
        """The call with the first sample alone: of every tensor that has one for each sample, as the hidden states."""
        if not isinstance(self.hidden, Tensor):
            return self
        rows = len(self.hidden)
        cut = tree_map(lambda x: x[:1] if isinstance(x, Tensor) and x.ndim and len(x) == rows else x, self._parts())
        return Call(*cut)

    @property
    def hidden(self) -> Any:
        return self.args[0] if self.args else self.kwargs.get("hidden_states")


@dataclass
class Segment:
    """A part of the model that is calibrated at once: `layers` (full names) inside `module`, and its recorded calls."""

    name: str
    module: nn.Module
    layers: tuple[str, ...]
    root: nn.Module
    calls: list[Call] = field(repr=False)
    device: str

    def run(self, kept: bool = False) -> Iterator[Any]:
        """What the module, as it is now, gives for each recorded call; on the device, in eval mode, no gradients.

        `kept`: what is made of a call stays when the next one is run.
        """
        yield from run_calls(self.module.to(self.device), self.calls, self.device, kept)

    def run_first_row(self) -> Any:
        """What the module gives for the first sample alone: a cheap trial."""
        return next(replace(self, calls=[self.calls[0].first_row()]).run())

    def observe(self, observers: Mapping[str, Observer]) -> None:
        """One pass over the calibration set; `observers[name]` is given each input of the layer `name`, on the device.

        Layers that are given the same tensor (query, key, value) are given it in turn, so an observer that is the same
        object for all of them can skip what it has just seen.
        """
        with hooked(self.root, observers):
            for _ in self.run():
                pass


def run_calls(module: nn.Module, calls: Sequence[Call], device: str, kept: bool = False) -> Iterator[Any]:
    """What `module` gives for each call, on `device`, without gradients; `kept`: as with `Segment.run`."""
    for call in calls if kept else alike(calls):
        pulse()
        moved = call.on(device)
        with torch.no_grad():
            output = module(*moved.args, **moved.kwargs)
        yield output


@contextmanager
def hooked(root: nn.Module, observers: Mapping[str, Observer]) -> Iterator[None]:
    """Within the context `observers[name]` is given each input of the layer `name`."""

    def hook(observer: Observer) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: observer(args[0].detach())

    handles = [root.get_submodule(name).register_forward_pre_hook(hook(seen)) for name, seen in observers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def segments(
    model: nn.Module, architecture: Architecture, layers: Sequence[str], batches: Iterable[Batch], device: str
) -> Iterator[Segment]:
    """The segments of `model` that hold any of `layers`, in the order of the forward pass.

    The model is in eval mode while it is walked, and back in its own at the end. Change layers in place (or replace
    modules) before asking for the next segment.
    """
    training = model.training
    model.eval()
    try:
        yield from _segments(model, architecture, layers, list(batches), device)
    finally:
        model.train(training)


def _segments(
    model: nn.Module, architecture: Architecture, layers: Sequence[str], batches: list[Batch], device: str
) -> Iterator[Segment]:
    names = [block.name for block in architecture.blocks]
    inside = {name: tuple(layer for layer in layers if layer.startswith(f"{name}.")) for name in names}
    place = place_of_model(model)
    keep: Callable[[Tensor], Tensor] = methodcaller("cpu") if place is None else partial(offload, directory=place)
    chained = bool(batches) and any(inside.values()) and is_chain(model, names, batches[0], device)
    if chained:
        calls = _first_calls(model, names[0], batches, device, keep)
        last = max(index for index, name in enumerate(names) if inside[name])
        for index, name in enumerate(names[: last + 1]):
            segment = Segment(name, model.get_submodule(name), inside[name], model, calls, device)
            if segment.layers:
                yield segment
            if index < last:
                segment.module = model.get_submodule(name)  # it may have been replaced
                for number, output in enumerate(segment.run()):  # at once in place of the inputs, which go
                    calls[number] = calls[number].with_hidden(keep(hidden_of(output)))
                    del output  # the last would stay while the next block is worked on, whatever `keep` has made of it
    done = {layer for found in inside.values() for layer in found} if chained else set()
    rest = tuple(layer for layer in layers if layer not in done)
    if rest:
        calls = [Call((), model_inputs(model, batch, "cpu")) for batch in batches]
        yield Segment("", model, rest, model, calls, device)


def model_inputs(model: nn.Module, batch: Batch, device: str | torch.device) -> dict[str, Any]:
    """A batch as the model takes it, on `device`; language models are not to build a cache."""
    quiet = {"use_cache": False} if "input_ids" in batch and hasattr(model, "config") else {}
    return {**{name: in_dtype_of(model, tensor).to(device) for name, tensor in batch.items()}, **quiet}


def in_dtype_of(model: nn.Module, value: Tensor) -> Tensor:
    """`value`, if it is of floats (images), in the dtype of the model's weights: its first layer takes no other."""
    if not value.is_floating_point():
        return value
    weights = (tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point())
    return value.to(next(weights, value.dtype))


class _StopForwardError(Exception):
    pass


def _first_calls(
    model: nn.Module, first: str, batches: Sequence[Batch], device: str, keep: Callable[[Tensor], Tensor]
) -> list[Call]:
    """How the model calls its first block, for each batch; the rest of the forward pass is not run.

    Hidden states are put away by `keep`. Other arguments that are the same in all calls (masks, rotary positions) are
    held once.
    """
    calls: list[Call] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Call(args, kwargs).on("cpu")
        call = call.with_hidden(keep(call.hidden)) if isinstance(call.hidden, Tensor) else call
        calls.append(call.sharing(calls[0]) if calls else call)
        raise _StopForwardError

    handle = model.get_submodule(first).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model.to(device)
        for batch in batches:
            try:
                with torch.no_grad():
                    model(**model_inputs(model, batch, device))
            except _StopForwardError:
                continue
    finally:
        handle.remove()
    return calls


def is_chain(model: nn.Module, names: Sequence[str], batch: Batch, device: str = "cpu") -> bool:
    """Whether each block is called once, with the output of the one before and the same other arguments."""
    seen: list[tuple[str, Call, Any]] = []

    def record(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs, output: seen.append((name, Call(args, kwargs), output))

    handles = [model.get_submodule(n).register_forward_hook(record(n), with_kwargs=True) for n in names]
    try:
        model.to(device)
        with torch.no_grad():
            model(**model_inputs(model, {name: tensor[:1] for name, tensor in batch.items()}, device))
    finally:
        for handle in handles:
            handle.remove()
    if [name for name, _, _ in seen] != list(names):
        return False
    for (_, before, output), (_, after, _) in itertools.pairwise(seen):
        if hidden_of(output) is not after.hidden or not _same_rest(before, after):
            return False
    return True


def _equal(one: Any, other: Any) -> bool:
    tensors = isinstance(one, Tensor) and isinstance(other, Tensor)
    return tensors and one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _same_rest(before: Call, after: Call) -> bool:
    if len(before.args) != len(after.args) or before.kwargs.keys() != after.kwargs.keys():
        return False
    pairs = [*zip(before.args[1:], after.args[1:], strict=True)]
    pairs += [(before.kwargs[key], after.kwargs[key]) for key in before.kwargs if key != "hidden_states"]
    return all(_alike(one, other) for one, other in pairs)


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or torch.equal(one, other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    return one is other or bool(one == other)


def hidden_of(output: Any) -> Tensor:
    """The first tensor of a module's output: itself, of a tuple, or the logits of a model."""
    return output if isinstance(output, Tensor) else cast(Tensor, output[0])
