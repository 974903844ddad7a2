"""A model over several devices: weights in shards (FSDP2), matrix products in parts (tensor parallelism), or both.

Plans are read from the architecture's description, so any model of a known layout has one. Fully sharded: Zhao et al.,
2023 (arXiv:2304.11277), as torch's `fully_shard`; a block's weights are gathered when it runs and let go after. Tensor
parallel: Shoeybi et al., 2019 (arXiv:1909.08053); queries, keys, values and the way up are split by rows of the weight,
the way back by columns, one sum over the devices an attention and one a feed-forward.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from pipeline import checkpoints
from pipeline.models.base import Architecture, Attention

HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "num_key_value_heads", "num_kv_heads")
"""Attributes of attention modules that say how many heads they see; a rank sees its part."""


def tensor_parallel_plan(architecture: Architecture) -> dict[str, ParallelStyle]:
    """{name of a linear layer: how it is split}; what is not named stays whole on each device."""
    plan: dict[str, ParallelStyle] = {}
    for block in architecture.blocks:
        if attention := block.attention:
            for name in (attention.query, attention.key, attention.value):
                plan[name] = ColwiseParallel()
            plan[attention.output] = RowwiseParallel()
        if feed_forward := block.feed_forward:
            plan[feed_forward.up] = ColwiseParallel()
            if feed_forward.gate:
                plan[feed_forward.gate] = ColwiseParallel()
            plan[feed_forward.down] = RowwiseParallel()
    return plan


def tensor_parallel_problems(model: nn.Module, architecture: Architecture, size: int, said: str) -> list[str]:
    """Why `model` cannot be split over `size` devices; `said` names the setting."""
    fix = "use parallelism=fsdp"
    if not any(block.attention or block.feed_forward for block in architecture.blocks):
        return [f"{said}: this model has no blocks of a known layout to split; {fix}"]
    modules, problems = dict(model.named_modules()), dict[str, None]()
    for block in architecture.blocks:
        if attention := block.attention:
            if attention.query == attention.key:
                problems[f"{said}: queries, keys and values are one layer in this model; {fix}"] = None
            counts = {attention.key_value_heads: "key-value heads", attention.heads: "heads"}
            for count, what in counts.items():
                if count % size:
                    near = [n for n in range(1, count + 1) if count % n == 0 and n <= size][-1]
                    problems[f"{said}: {count} {what} do not divide over {size} devices; use {near}, or {fix}"] = None
        if feed_forward := block.feed_forward:
            width = getattr(modules[feed_forward.up], "out_features", 0)
            if width % size:
                problems[f"{said}: a feed-forward of {width} does not divide over {size} devices; {fix}"] = None
    odd = [name for name in tensor_parallel_plan(architecture) if type(modules[name]) is not nn.Linear]
    if odd:
        kind = type(modules[odd[0]]).__name__
        problems[f"{said}: '{odd[0]}' is a {kind}, and only plain linear layers can be split; {fix}"] = None
    return list(problems)


def split_tensors(model: nn.Module, architecture: Architecture, mesh: DeviceMesh) -> None:
    """Tensor parallelism over the one-dimensional `mesh`, in place."""
    parallelize_module(model, mesh, tensor_parallel_plan(architecture))
    for block in architecture.blocks:
        if block.attention:
            module = model.get_submodule(_parent(block.attention))
            for name in HEAD_COUNTS:
                count = module.__dict__.get(name)
                if count in (block.attention.heads, block.attention.key_value_heads):
                    setattr(module, name, count // mesh.size())


def _parent(attention: Attention) -> str:
    """Name of the module that holds an attention's projections."""
    common = [a for a, b in zip(attention.query.split("."), attention.output.split("."), strict=False) if a == b]
    return ".".join(common)


def shard_weights(
    model: nn.Module,
    architecture: Architecture,
    mesh: DeviceMesh,
    *,
    reshard: bool,
    offload: bool,
    parameter_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
) -> None:
    """Fully sharded data parallelism, in place: each block a unit, and all else one.

    Args:
        mesh: one dimension; or two, replicas x shards (hybrid sharding).
        reshard: let go of a block's weights after its forward pass, and gather them again for the backward pass.
        offload: shards live in the host's memory (CUDA).
        parameter_dtype, reduce_dtype: in which weights are gathered and gradients summed; None: as they are.
    """
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=parameter_dtype, reduce_dtype=reduce_dtype),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    for block in architecture.blocks:
        fully_shard(model.get_submodule(block.name), reshard_after_forward=reshard, **options)
    fully_shard(model, reshard_after_forward=False, **options)


def dtype_of(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def is_sharded(parameters: Iterable[Tensor]) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in parameters)


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, a scalar equal on all devices; shards and whole tensors may be mixed."""
    sums: dict[Any, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        if isinstance(gradient, DTensor):
            # Of two dimensions that split the same rows, one is a strided shard, which is_shard() does not count.
            split = tuple(i for i, placement in enumerate(gradient.placements) if not placement.is_replicate())
            sums[gradient.device_mesh, split].append(gradient.to_local().square().sum())
        else:
            sums[None].append(gradient.square().sum())
    total = torch.zeros((), dtype=gradients[0].dtype, device=gradients[0].device)
    for where, squares in sums.items():
        part = torch.stack(squares).sum()
        if where is not None:
            mesh, split = where
            for dimension in split:
                dist.all_reduce(part, group=mesh.get_group(dimension))
        total += part
    return total.sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Scales all gradients alike so that their 2-norm is at most `limit`, as `torch.nn.utils.clip_grad_norm_` does."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    factor = (limit / (total_norm(gradients) + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local.mul_(factor.to(local.dtype))


class MeshStrategy(ModelParallelStrategy):
    """Keeps the former checkpoint until the new one is whole, in one file or in a directory of shards.

    Args:
        offload: shards stay in the host's memory, and what is whole on each rank goes to its device.
    """

    def __init__(self, *, offload: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self.offload = offload

    def model_to_device(self) -> None:
        if not self.offload:
            super().model_to_device()
            return
        assert self.model is not None
        # FSDP2 copies shards to the device itself, and refuses to start where it finds them there.
        self.model._apply(lambda tensor: tensor if isinstance(tensor, DTensor) else tensor.to(self.root_device))  # type: ignore[no-untyped-call]

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if not self._save_distributed_checkpoint:
            ParallelStrategy.save_checkpoint(self, checkpoint, filepath)
            return
        path = Path(self.broadcast(filepath))
        place = self.broadcast(checkpoints.fresh_directory(path) if self.global_rank == 0 else path)
        super().save_checkpoint(checkpoint, place)
        self.barrier()
        if self.global_rank == 0:
            checkpoints.publish(place, path)
        self.barrier()
