"""A model over several devices: weights in shards (FSDP2), matrix products in parts (tensor parallelism), or both.

Plans are read from the architecture's description, so any model of a known layout has one. Fully sharded: Zhao et al.,
2023 (arXiv:2304.11277), as torch's `fully_shard`; a block's weights are gathered when it runs and let go after. Tensor
parallel: Shoeybi et al., 2019 (arXiv:1909.08053); queries, keys, values and the way up are split by rows of the weight,
the way back by columns, one sum over the devices an attention and one a feed-forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement
from torch.optim import Optimizer

from pipeline import checkpoints
from pipeline.layers.lora import held_tensors
from pipeline.models.base import Architecture, Attention

HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "num_key_value_heads", "num_kv_heads")
"""Attributes of attention modules that say how many heads they see; a rank sees its part."""


class Columns(ColwiseParallel):
    """Splits a linear layer by rows of its weight, and so the columns of what comes out.

    Of an adapter's factors beside it (layers/lora.py), B has the weight's rows and A stays whole.
    """

    PLACEMENTS: ClassVar[dict[str, Placement]] = {
        "weight": Shard(0), "bias": Shard(0), "lora_A": Replicate(), "lora_B": Shard(0), "lora_magnitude": Shard(0),
    }  # fmt: skip

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        place_parameters(module, device_mesh, self.PLACEMENTS)


class Rows(RowwiseParallel):
    """Splits a linear layer by columns of its weight, as what goes in is; what comes out is summed.

    Of an adapter's factors beside it, A has the weight's columns and B stays whole: what is summed then is of its rank.
    """

    PLACEMENTS: ClassVar[dict[str, Placement]] = {
        "weight": Shard(1), "bias": Replicate(), "lora_A": Shard(1), "lora_B": Replicate(),
        "lora_magnitude": Replicate(),
    }  # fmt: skip

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        place_parameters(module, device_mesh, self.PLACEMENTS)


class Heads(SequenceParallel):
    """A norm of each head for itself, given a device's heads [batch, ...]: its gradient is of all of them, a sum over
    devices. Along which of the dimensions in front they are split says nothing to it."""

    def __init__(self) -> None:
        super().__init__(sequence_dim=1, use_local_output=True)


def place_parameters(layer: nn.Module, mesh: DeviceMesh, placements: Mapping[str, Placement]) -> None:
    """The layer's own parameters over the one-dimensional `mesh`, each as its name says, in place."""
    for name, parameter in list(layer.named_parameters(recurse=False)):
        spread = distribute_tensor(parameter.detach(), mesh, [placements[name]])
        layer.register_parameter(name, nn.Parameter(spread, parameter.requires_grad))


def tensor_parallel_plan(architecture: Architecture) -> dict[str, Columns | Rows]:
    """{name of a linear layer: how it is split}; what is not named stays whole on each device."""
    plan: dict[str, Columns | Rows] = {}
    for block in architecture.blocks:
        if attention := block.attention:
            for name in (attention.query, attention.key, attention.value):
                plan[name] = Columns()
            plan[attention.output] = Rows()
        if (feed_forward := block.feed_forward) and not feed_forward.fused:
            plan[feed_forward.up] = Columns()
            if feed_forward.gate:
                plan[feed_forward.gate] = Columns()
            plan[feed_forward.down] = Rows()
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
            if between := _between_projections(modules, attention):
                why = "over all heads, of which a device has its own alone"
                problems[f"{said}: attention has a {between} between its projections, {why}; {fix}"] = None
        if (feed_forward := block.feed_forward) and not feed_forward.fused:
            width = getattr(modules[feed_forward.up], "out_features", 0)
            if width % size:
                problems[f"{said}: a feed-forward of {width} does not divide over {size} devices; {fix}"] = None
    odd = [name for name in tensor_parallel_plan(architecture) if type(modules[name]) is not nn.Linear]
    if odd:
        kind = type(modules[odd[0]]).__name__
        problems[f"{said}: '{odd[0]}' is a {kind}, and only plain linear layers can be split; {fix}"] = None
    return list(problems)


def _between_projections(modules: Mapping[str, nn.Module], attention: Attention) -> str | None:
    """The class of what has weights inside of attention and cannot be split; None: nothing has.

    A norm over all heads (OLMo 2) has another mean on each device.
    """
    norms = _head_norms(modules, attention)
    inside = {name: module for name, module in _inside(modules, attention).items() if name not in norms}
    return next((type(module).__name__ for module in inside.values()), None)


def _head_norms(modules: Mapping[str, nn.Module], attention: Attention) -> list[str]:
    """Names of the norms of every head for itself (Qwen 3, Gemma 3): their weight is as long as a head."""
    size = getattr(modules[attention.query], "out_features", 0) // attention.heads
    return [
        name
        for name, module in _inside(modules, attention).items()
        if all(parameter.shape == (size,) for parameter in module.parameters(recurse=False))
    ]


def _inside(modules: Mapping[str, nn.Module], attention: Attention) -> dict[str, nn.Module]:
    """What has weights inside of attention beside its projections, by name."""
    parent = _parent(attention)
    projections = (attention.query, attention.key, attention.value, attention.output)
    return {
        name: module
        for name, module in modules.items()
        if name.startswith(f"{parent}.") and name not in projections and any(True for _ in module.parameters(False))
    }


def split_tensors(model: nn.Module, architecture: Architecture, mesh: DeviceMesh) -> None:
    """Tensor parallelism over the one-dimensional `mesh`, in place."""
    modules = dict(model.named_modules())
    attentions = [block.attention for block in architecture.blocks if block.attention]
    norms = {name: Heads() for attention in attentions for name in _head_norms(modules, attention)}
    parallelize_module(model, mesh, {**tensor_parallel_plan(architecture), **norms})
    for attention in attentions:
        module = model.get_submodule(_parent(attention))
        for name in HEAD_COUNTS:
            count = module.__dict__.get(name)
            if count in (attention.heads, attention.key_value_heads):
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

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Of weights that are tied, which are put together once a name, one copy goes into the file."""
        state = super().lightning_module_state_dict()
        assert self.model is not None
        first: dict[int, str] = {}
        for name, weight in self.model.named_parameters(remove_duplicate=False):
            if name in state:
                state[name] = state[first.setdefault(id(weight), name)]
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As `optimizer.state_dict()` would be on one device, on rank 0; or each rank's part, by the weights' names."""
        optimizer = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        whole = not self._save_distributed_checkpoint
        assert self.model is not None
        options = StateDictOptions(full_state_dict=whole, cpu_offload=True)
        state: dict[str, Any] = get_optimizer_state_dict(self.model, optimizer, options=options)
        if not whole or self.global_rank > 0:
            return state
        names = [name for group in state["param_groups"] for name in group["params"]]
        return renamed_state(state, {name: number for number, name in enumerate(names)})

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Weights and optimizer state, from one file of any number of devices or from shards; what else it holds."""
        path = Path(self.broadcast(checkpoint_path))
        module = self.lightning_module
        assert module is not None
        held, options = held_tensors(module), StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        if checkpoints.is_sharded(path):
            weights = {name: part for name, part in get_model_state_dict(module).items() if name not in held}
            load({"state_dict": weights}, storage_reader=FileSystemReader(path))
            set_model_state_dict(module, {**held, **weights})
            for number, optimizer in enumerate(self.optimizers):
                parts = {f"optimizer_{number}": get_optimizer_state_dict(module, optimizer)}
                load(parts, storage_reader=FileSystemReader(path))
                set_optimizer_state_dict(module, optimizer, own_kernels(parts[f"optimizer_{number}"], optimizer))
            return torch.load(path / checkpoints.EXTRA, map_location="cpu", weights_only=weights_only)  # type: ignore[no-any-return]
        checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
        set_model_state_dict(module, {**held, **checkpoint.pop("state_dict")}, options=options)
        called = {id(weight): name for name, weight in module.named_parameters()}
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            if not state["state"]:
                optimizer.load_state_dict(own_kernels(state, optimizer))
                continue
            ours = [called[id(weight)] for group in optimizer.param_groups for weight in group["params"]]
            saved = [number for group in state["param_groups"] for number in group["params"]]
            named = renamed_state(state, dict(zip(saved, ours, strict=True)))
            set_optimizer_state_dict(module, optimizer, own_kernels(named, optimizer), options=options)
        return checkpoint  # type: ignore[no-any-return]

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


def renamed_state(state: Mapping[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """An optimizer's state dict whose weights are called otherwise: {their names or numbers: what they become}."""
    return {
        "state": {names[key]: value for key, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[key] for key in group["params"]]} for group in state["param_groups"]
        ],
    }


def own_kernels(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """`state` with the kernels of `optimizer`: those that saved it may not step what is spread in another way."""
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        saved.update({name: group[name] for name in ("fused", "foreach") if name in group})
    return state
