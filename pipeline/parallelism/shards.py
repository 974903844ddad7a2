"""Tensors of which each rank holds a part (torch's DTensor), beside tensors that are whole on each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement


def is_sharded(parameters: Iterable[Tensor]) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in parameters)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds; changes to it in place are changes to `tensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def place_gradients(weights: Iterable[nn.Parameter]) -> None:
    """Sum gradients that come as one part of a sum from each rank, as those of weights do that are whole on each."""
    for weight in weights:
        if isinstance(weight.grad, DTensor) and isinstance(weight, DTensor):
            weight.grad = weight.grad.redistribute(placements=weight.placements)


def part_of(whole: Tensor, like: DTensor) -> Tensor:
    """Of `whole`, equal on all ranks, what belongs to this rank's part of `like`; dimensions of size 1 stay."""
    placements = [
        placement if placement.is_replicate() or whole.size(placement.dim) == like.size(placement.dim) else Replicate()  # type: ignore[attr-defined]
        for placement in like.placements
    ]
    mesh = like.device_mesh
    spread = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return spread.redistribute(placements=placements).to_local()


def as_part_of(
    part: Tensor, like: DTensor, shape: torch.Size | None = None, placements: Sequence[Placement] | None = None
) -> DTensor:
    """A tensor spread as `like` is, of which this rank holds `part`; `shape`, `placements`: others than those of
    `like`."""
    shape = like.shape if shape is None else shape
    placements = like.placements if placements is None else placements
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, like.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def square_sums(spread: DTensor, dim: int) -> Tensor:
    """Sums of squares along a dimension, which stays with size 1; whole, equal on all ranks."""
    dim %= spread.ndim
    sums = torch.linalg.vector_norm(spread.to_local(), dim=dim, keepdim=True).square_()
    placements = list(spread.placements)
    for number, placement in enumerate(placements):
        if getattr(placement, "dim", None) == dim:
            dist.all_reduce(sums, group=spread.device_mesh.get_group(number))
            placements[number] = Replicate()
    shape = torch.Size(1 if number == dim else size for number, size in enumerate(spread.shape))
    return as_part_of(sums, spread, shape, placements).full_tensor()


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, a scalar equal on all devices; shards and whole tensors may be mixed.

    Squares are summed in float32 at least: in float16 those of 65,520 ones are infinite, those of small gradients 0.
    """
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    sums: dict[Any, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        if isinstance(gradient, DTensor):
            # Of two dimensions that split the same rows, one is a strided shard, which is_shard() does not count.
            split = tuple(i for i, placement in enumerate(gradient.placements) if not placement.is_replicate())
            sums[gradient.device_mesh, split].append(_square_sum(gradient.to_local(), wide))
        else:
            sums[None].append(_square_sum(gradient, wide))
    total = torch.zeros((), dtype=wide, device=gradients[0].device)
    for where, squares in sums.items():
        part = torch.stack(squares).sum()
        if where is not None:
            mesh, split = where
            for dimension in split:
                dist.all_reduce(part, group=mesh.get_group(dimension))
        total += part
    return total.sqrt()


def _square_sum(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor)
    return norm.to(dtype).square()


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Scales all gradients alike so that their 2-norm is at most `limit`, as `torch.nn.utils.clip_grad_norm_` does."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    factor = (limit / (total_norm(gradients) + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local(gradient).mul_(factor.to(gradient.dtype))
