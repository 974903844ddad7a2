"""Fully sharded data parallelism: weights, gradients and optimizer state in shards, gathered a block at a time.

Zhao et al., 2023 (arXiv:2304.11277); ZeRO stage 3 of Rajbhandari et al., 2020 (arXiv:1910.02054). torch's FSDP2 through
Lightning's ModelParallelStrategy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from pipeline.parallelism.base import GatherDtype, Holding
from pipeline.parallelism.launched import Launched
from pipeline.parallelism.mesh import OnMesh
from pipeline.registry import register

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from pipeline.models.base import Architecture


@dataclass(frozen=True, kw_only=True)
class FullySharded(OnMesh):
    """`replicas`: copies of the sharded model, between which gradients are averaged (hybrid sharding).

    `reshard`: a block's gathered weights are let go after its forward pass. `offload`: shards live in the host's
    memory. `parameter_dtype`, `reduce_dtype`: in which weights are gathered and computed with, and gradients summed.
    """

    replicas: Annotated[int, Ge(1)]
    reshard: bool
    offload: bool
    parameter_dtype: GatherDtype | None
    reduce_dtype: GatherDtype | None

    @property
    def holding(self) -> Holding:
        parts = self.ranks // self.replicas
        return Holding(
            weights=parts, gradients=parts, state=parts, gathers=True, gathered_in=self.parameter_dtype,
            summed_in=self.reduce_dtype, keeps=not self.reshard, copies=self.replicas > 1,
            on_host="all" if self.offload else "nothing",
        )  # fmt: skip

    def problems(self) -> list[str]:
        if self.ranks % self.replicas:
            near = [n for n in range(1, self.ranks + 1) if self.ranks % n == 0 and n < self.replicas][-1]
            said = f"parallelism.replicas={self.replicas}"
            return [
                *super().problems(),
                f"{said} does not divide {self.ranks} devices; use parallelism.replicas={near}",
            ]
        return super().problems()

    def shard(self, model: nn.Module, architecture: Architecture, mesh: DeviceMesh) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        from pipeline.parallelism.sharding import dtype_of, shard_weights

        over = mesh["data_parallel"]
        if self.replicas > 1:
            sizes = (self.replicas, self.ranks // self.replicas)
            over = init_device_mesh(mesh.device_type, sizes, mesh_dim_names=("replicate", "shard"))
        shard_weights(
            model,
            architecture,
            over,
            reshard=self.reshard,
            offload=self.offload,
            parameter_dtype=dtype_of(self.parameter_dtype),
            reduce_dtype=dtype_of(self.reduce_dtype),
        )


@register("parallelism", "fsdp")
@dataclass(frozen=True, kw_only=True)
class FSDP(FullySharded, Launched):
    """Ranks of torchrun, srun or mpirun."""
