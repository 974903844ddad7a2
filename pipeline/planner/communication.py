"""How long the ranks of a fit spend on sending in an optimizer step, before it runs: bytes over the link, and a start
for each collective.

Ring algorithms send 2 (N - 1) / N of the bytes of a sum from each of N ranks, and half of that of a gather or a scatter
(Patarasuk and Yuan, 2009, doi:10.1016/j.jpdc.2008.09.002). Which collectives there are follows from what each strategy
does (`sent`); rates and starts are assumed, as the ranks are seldom here. On a GPU sums of gradients and gathers of
weights travel while others compute, and only what computing does not cover counts; the sums of tensor parallelism are
waited for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from pipeline.fitting import micro_batch_size
from pipeline.models.architecture import describe
from pipeline.parallelism.base import Parallelism
from pipeline.schema import RunConfig

BUCKET = 25 * 2**20
"""Bytes of gradients that `ddp` sums at once: torch's default."""
LINKS = {"cuda": 200e9, "cpu": 2e9, "mps": 2e9, "tpu": 100e9}
"""Bytes a second between devices of one machine: assumed."""
STARTS = {"cuda": 2e-5, "cpu": 2e-4, "mps": 2e-4, "tpu": 2e-5}
"""Seconds that a collective between them takes to begin, whatever it sends: assumed."""
NETWORK, NETWORK_START = 10e9, 5e-5
"""Between machines: assumed."""
POWERSGD_WORTH = 2
"""Matrices that get less than so many times smaller are sent whole: torch's default."""


@dataclass(frozen=True)
class Sums:
    """Activations that tensor parallelism sums over its ranks: how often, and bytes for a micro batch of one sample."""

    count: int = 0
    bytes: int = 0

    def and_one(self, more: int) -> Sums:
        return Sums(self.count + 1, self.bytes + more)


@dataclass(frozen=True, kw_only=True)
class Model:
    """What of a model is sent: bytes of its weights and of the gradients of those that are trained, of them all and of
    those in blocks."""

    weights: int
    gradients: int
    block_weights: int
    block_gradients: int
    trained: tuple[torch.Size, ...]
    """Shapes of what is trained."""
    units: int
    """What `fsdp` gathers at once: each block, and all else."""
    forward: Sums
    backward: Sums


def sent_of(model: nn.Module, forward: Sums, backward: Sums) -> Model:
    """`model` may be on the meta device."""
    blocks = describe(model).blocks
    inside = {id(weight) for block in blocks for weight in model.get_submodule(block.name).parameters()}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return Model(
        weights=sum(weight.nbytes for weight in model.parameters()),
        gradients=sum(weight.nbytes for weight in trained),
        block_weights=sum(weight.nbytes for weight in model.parameters() if id(weight) in inside),
        block_gradients=sum(weight.nbytes for weight in trained if id(weight) in inside),
        trained=tuple(weight.shape for weight in trained),
        units=len(blocks) + 1,
        forward=forward,
        backward=backward,
    )


class Traffic(NamedTuple):
    """What a rank sends: bytes, in so many collectives, among `span` neighbouring ranks at most."""

    bytes: float = 0.0
    starts: float = 0.0
    span: int = 1


class Sent(NamedTuple):
    """What a rank sends in a step: of weights and gradients, between replicas of shards (others may compute during
    both), and of activations, which are waited for."""

    shards: Traffic = Traffic()
    replicas: Traffic = Traffic()
    activations: Traffic = Traffic()


def sent(config: RunConfig, model: Model) -> Sent:
    """`ddp` sums gradients once a step, in buckets. `fsdp` gathers each unit for the forward pass, those it let go of
    for the backward pass too, and sums gradients to shards, in each micro batch; then between replicas. Tensor
    parallelism sums what its layers give out, and the gradients of what goes into them; all else is of a rank's part.
    """
    ranks = config.parallelism
    _, accumulation = micro_batch_size(config)
    if not ranks.distributed or ranks.ranks == 1:
        return Sent()
    if not ranks.sharded:
        gradients = _compressed(ranks, model, config.precision.weight_dtype)
        return Sent(Traffic(2 * _share(ranks.ranks) * gradients, math.ceil(gradients / BUCKET), ranks.ranks))
    held, stored = ranks.holding, config.precision.weight_dtype
    if held.bucket is not None:  # DeepSpeed's
        gathers = 2 if held.weights > 1 else 1
        starts = gathers * model.units + accumulation * math.ceil(model.gradients / (held.bucket * stored.itemsize))
        spread = gathers * model.weights + accumulation * model.gradients
        return Sent(Traffic(_share(ranks.ranks) * spread, starts, ranks.ranks))
    activations = _tensor_parallel(config, model, accumulation)
    if ranks.data_ranks == 1:
        return Sent(activations=activations)
    gathers = 1 if held.keeps else 2
    replicas = ranks.data_ranks // held.weights
    # What is not in a block is whole on each tensor rank, is kept for the backward pass, and so gathered once.
    weights = model.weights - model.block_weights + gathers * model.block_weights / ranks.tensor_ranks
    weights *= _narrowed(held.gathered_in, stored)
    gradients = model.gradients - model.block_gradients + model.block_gradients / ranks.tensor_ranks
    gradients *= _narrowed(held.summed_in or held.gathered_in, stored)
    starts = gathers * (model.units - 1) + 1 + model.units
    moved = _share(held.weights) * (weights + gradients)
    within = Traffic(accumulation * moved, accumulation * starts, held.weights * ranks.tensor_ranks)
    if replicas == 1:
        return Sent(within, activations=activations)
    between = 2 * _share(replicas) * gradients / held.weights
    return Sent(within, Traffic(accumulation * between, accumulation * model.units, ranks.ranks), activations)


def seconds(config: RunConfig, model: Model, computing: float) -> float:
    """What communication adds to `computing` seconds of a step. Neighbouring ranks are on one machine."""
    kind = config.device.kind()

    def taken(traffic: Traffic) -> float:
        near = traffic.span <= config.parallelism.devices
        rate, start = (LINKS[kind], STARTS[kind]) if near else (NETWORK, NETWORK_START)
        return traffic.bytes / rate + traffic.starts * start

    shards, replicas, activations = map(taken, sent(config, model))
    covered = shards + replicas
    return activations + (max(0.0, covered - computing) if kind == "cuda" else covered)


def _tensor_parallel(config: RunConfig, model: Model, accumulation: int) -> Traffic:
    ranks = config.parallelism.tensor_ranks
    if ranks == 1:
        return Traffic()
    micro, _ = micro_batch_size(config)
    again = 0  # with checkpointing, but for the last sum of each block, which nothing in it needs
    if config.memory.activation_checkpointing == "full":
        again = model.forward.count - (model.units - 1)
    moved = model.forward.bytes * (1 + again / model.forward.count) + model.backward.bytes
    count = model.forward.count + again + model.backward.count
    return Traffic(accumulation * 2 * _share(ranks) * micro * moved, accumulation * count, ranks)


def _share(ranks: int) -> float:
    return (ranks - 1) / ranks


def _narrowed(sent_in: str | None, stored: torch.dtype) -> float:
    return 1.0 if sent_in is None else getattr(torch, sent_in).itemsize / stored.itemsize


def _compressed(ranks: Parallelism, model: Model, stored: torch.dtype) -> float:
    """Bytes of gradients as they are sent, warm."""
    kind = getattr(ranks, "gradient_compression", "none")
    if kind == "powersgd":
        whole = sum(shape.numel() for shape in model.trained)
        return model.gradients * sum(_factors(model.trained, getattr(ranks, "powersgd_rank", 1))) / max(1, whole)
    return model.gradients * _narrowed(None if kind == "none" else kind, stored)


def _factors(shapes: Iterable[torch.Size], rank: int) -> Iterator[int]:
    """Elements of each tensor's factors of `rank`, or of the tensor where they are not worth it."""
    for shape in shapes:
        rows = shape[0] if shape else 1
        columns = shape.numel() // max(1, rows)
        factors = rank * (rows + columns)
        yield factors if len(shape) > 1 and factors * POWERSGD_WORTH < shape.numel() else shape.numel()
