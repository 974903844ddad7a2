"""Tensor parallelism within groups of devices, fully sharded data parallelism between them: a two-dimensional mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from pipeline.parallelism.base import GatherDtype, Holding
from pipeline.parallelism.tp import TensorParallel
from pipeline.registry import register

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from pipeline.models.base import Architecture


@register("parallelism", "fsdp_tp")
@dataclass(frozen=True, kw_only=True)
class ShardedTensorParallel(TensorParallel):
    """`tensor_parallel`: devices of a group, neighbours by rank; the rest as in `fsdp`."""

    tensor_parallel: Annotated[int, Ge(1)]
    reshard: bool
    offload: bool
    parameter_dtype: GatherDtype | None
    reduce_dtype: GatherDtype | None

    @property
    def tensor_ranks(self) -> int:
        return self.tensor_parallel

    @property
    def holding(self) -> Holding:
        parts = self.data_ranks
        return Holding(
            weights=parts, gradients=parts, state=parts, gathers=True, gathered_in=self.parameter_dtype,
            summed_in=self.reduce_dtype, keeps=not self.reshard, on_host="all" if self.offload else "nothing",
        )  # fmt: skip

    def problems(self) -> list[str]:
        if self.ranks % self.tensor_parallel == 0:
            return super().problems()
        near = [n for n in range(1, self.ranks + 1) if self.ranks % n == 0 and n < self.tensor_parallel][-1]
        return [
            *super().problems(),
            f"parallelism.tensor_parallel={self.tensor_parallel} does not divide {self.ranks} devices; "
            f"use parallelism.tensor_parallel={near}",
        ]

    def shard(self, model: nn.Module, architecture: Architecture, mesh: DeviceMesh) -> None:
        from pipeline.parallelism.sharding import dtype_of, shard_weights

        super().shard(model, architecture, mesh)
        shard_weights(
            model,
            architecture,
            mesh["data_parallel"],
            reshard=self.reshard,
            offload=self.offload,
            parameter_dtype=dtype_of(self.parameter_dtype),
            reduce_dtype=dtype_of(self.reduce_dtype),
        )
