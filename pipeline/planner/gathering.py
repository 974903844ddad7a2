"""What the first rank holds while several write a checkpoint, beside what training keeps: by formula, from shapes.

    gathered  each tensor is put together on all ranks, one after the other, and stays on the first until all are
              written: weights, tied ones once for each name, then the optimizer's state (`sharding.MeshStrategy`)
    parts     each rank writes what it holds, after they have told each other what that is (torch's checkpoints of
              DTensors)
    engine    DeepSpeed's: weights that lie whole on each rank as they lie there, others copied one by one, and each
              tensor of the state put together (`zero.ZeroStrategy`)

Between processes on a CPU gloo has a copy of each tensor that it puts together. On a GPU a whole tensor is let go as
it has gone to the host, so that the largest one counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.layers.holding import Terms, largest
from pipeline.models.base import Architecture
from pipeline.parallelism.base import Parallelism
from pipeline.planner.ranks import COMMUNICATION, part, split_dimensions

CHECKPOINT = "checkpoint"
"""The kind of whole tensors on their way into a file."""
TOLD = 265
"""Bytes of a tensor in what a rank tells the others of its parts: names, shapes and offsets, pickled. Of `gpt_nano` 2
and 4 ranks told 263 to 270."""
SUMMED = torch.float32
"""dtype in which DeepSpeed's stages 1 and 2 sum a tensor of the state over the ranks, of which one has it."""


@dataclass(frozen=True)
class Spread:
    """A tensor of a checkpoint. `split`: along which dimension tensor parallelism splits it; None: it does not."""

    shape: torch.Size
    dtype: torch.dtype
    split: int | None = None

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """`named`: weights, each as often as it has names; `weights`: once. `state`: the optimizer's tensors, in its order.
    `trained`: the weights that it steps."""

    named: Sequence[Spread]
    weights: Sequence[Spread]
    trained: Sequence[Spread]
    state: Sequence[Spread]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        dimensions: Mapping[str, int],
        state: Mapping[int, Sequence[tuple[torch.Size, torch.dtype]]],
    ) -> Checkpoint:
        """`dimensions`: {name of a weight: along which it is split}. `state`: shapes and dtypes of a weight's, by its
        id."""
        once = dict(model.named_parameters())
        names = {id(weight): name for name, weight in once.items()}

        def spread(name: str) -> Spread:
            return Spread(once[name].shape, once[name].dtype, dimensions.get(name))

        return cls(
            [spread(names[id(weight)]) for _, weight in model.named_parameters(remove_duplicate=False)],
            [spread(name) for name in once],
            [spread(names[weight]) for weight in state],
            [Spread(*tensor, dimensions.get(names[weight])) for weight in state for tensor in state[weight]],
        )


def saving(
    parallelism: Parallelism,
    model: nn.Module,
    architecture: Architecture,
    state: Mapping[int, Sequence[tuple[torch.Size, torch.dtype]]],
    kept: Mapping[str, int],
    at_work: int = 0,
    *,
    on_cpu: bool,
) -> Terms:
    """Bytes by kind on the first rank when it holds most.

    Args:
        model: whole, on the meta device or of fake tensors.
        state: shapes and dtypes of the optimizer's tensors, of a whole weight, by the weight's id; in its order.
        kept: bytes by kind that a rank keeps between two steps.
        at_work: bytes that the optimizer takes beside its state while it steps this rank's parts.
    """
    dimensions = split_dimensions(model, architecture) if parallelism.tensor_ranks > 1 else {}
    checkpoint = Checkpoint.of(model, dimensions, state)
    written = {"gathered": gathered, "parts": in_parts, "engine": by_engine}[parallelism.saves]
    moments = [*written(parallelism, checkpoint, on_cpu)]
    if parallelism.saves != "engine" and not checkpoint.state and "gradients" not in kept:
        moments.append({**stepped_for_a_state(parallelism, checkpoint, on_cpu), "optimizer step": at_work})
    most = largest([{}, *moments])
    kinds = {kind: kept.get(kind, 0) + most.get(kind, 0) for kind in (*kept, *most)}
    return {kind: size for kind, size in kinds.items() if size}


def gathered(parallelism: Parallelism, checkpoint: Checkpoint, on_cpu: bool) -> Iterator[Terms]:
    """Of a weight with several names one copy stays, when all are there."""
    yield from together(parallelism, checkpoint.named, 0, on_cpu)
    yield from together(parallelism, checkpoint.state, staying(parallelism, checkpoint, on_cpu), on_cpu)


def staying(parallelism: Parallelism, checkpoint: Checkpoint, on_cpu: bool) -> int:
    """Bytes of the weights that are put together and stay until all is written."""
    there = parallelism.saves == "gathered" and on_cpu
    return sum(put_together(parallelism, weight)[0] for weight in checkpoint.weights) if there else 0


def together(parallelism: Parallelism, tensors: Iterable[Spread], there: int, on_cpu: bool) -> Iterator[Terms]:
    """One tensor after the other, beside `there` bytes of others."""
    for tensor in tensors:
        whole, between = put_together(parallelism, tensor)
        if on_cpu:
            there += whole
            yield {CHECKPOINT: there, COMMUNICATION: between + whole}
        else:
            columns = tensor.split == 1  # which come one below the other, and are put side by side
            yield {CHECKPOINT: whole, COMMUNICATION: between or (whole if columns else 0)}


def put_together(parallelism: Parallelism, tensor: Spread) -> tuple[int, int]:
    """Bytes of a tensor that the ranks put together, rounded up to equal parts, and of what the group of tensor
    parallelism makes of it before; 0 for those that are whole on each rank."""
    ranks = parallelism.holding.weights
    if not tensor.shape or (ranks == 1 and tensor.split is None):
        return 0, 0
    rows = part(tensor.shape, ranks).numel() * tensor.dtype.itemsize
    return rows * ranks, rows if ranks > 1 and tensor.split is not None else 0


def in_parts(parallelism: Parallelism, checkpoint: Checkpoint, on_cpu: bool) -> Iterator[Terms]:
    """What the first rank tells, is told by all, itself among them, and gloo's copy."""
    tensors = len(checkpoint.named) + len(checkpoint.state)
    yield {COMMUNICATION: TOLD * tensors * (1 + (2 if on_cpu else 1) * parallelism.ranks)}


def stepped_for_a_state(parallelism: Parallelism, checkpoint: Checkpoint, on_cpu: bool) -> Terms:
    """An optimizer without state is stepped with gradients of zeros, unless there are some: it might make one."""
    ranks = parallelism.holding.weights
    own = (
        part(weight.shape, ranks).numel()
        * weight.dtype.itemsize
        // (1 if weight.split is None else parallelism.tensor_ranks)
        for weight in checkpoint.trained
    )
    return {CHECKPOINT: staying(parallelism, checkpoint, on_cpu), "gradients": sum(own)}


def by_engine(parallelism: Parallelism, checkpoint: Checkpoint, on_cpu: bool) -> Iterator[Terms]:
    """What the engine puts together is let go of as the next one is there. With stages 1 and 2 weights are whole; small
    ones are with stage 3, too, until they are written."""
    there = before = small = 0
    spread = parallelism.holding.weights > 1
    for weight in checkpoint.weights if spread else ():
        there += weight.bytes if on_cpu else 0
        made = 0 if weight.shape.numel() < parallelism.holding.whole_below else weight.bytes
        yield {CHECKPOINT: there, COMMUNICATION: before + made, "weights": -small}
        before = made
        small += weight.bytes - made
    before = 0
    for tensor in checkpoint.state:
        there += tensor.bytes if on_cpu else 0
        made = tensor.bytes if spread else tensor.shape.numel() * SUMMED.itemsize
        if on_cpu and (spread or tensor.dtype == SUMMED):  # it stays; gathered ones have gloo's copy beside them
            yield {CHECKPOINT: there, COMMUNICATION: made if spread else 0, "weights": -small}
        else:
            yield {CHECKPOINT: there, COMMUNICATION: before + made, "weights": -small}
            before = made
