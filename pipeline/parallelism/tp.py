"""Tensor parallelism: each matrix product of the blocks in parts over the devices.

Shoeybi et al., 2019 (arXiv:1909.08053). All ranks see the same samples; embeddings, norms and the head are whole on
each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.parallelism.launched import Launched
from pipeline.parallelism.mesh import OnMesh
from pipeline.registry import register

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from pipeline.models.base import Architecture


@register("parallelism", "tp")
@dataclass(frozen=True, kw_only=True)
class TensorParallel(OnMesh, Launched):
    """All devices form one group; heads and feed-forward widths must divide over it."""

    @property
    def tensor_ranks(self) -> int:
        return self.ranks

    def shape_problems(self, model: nn.Module, architecture: Architecture) -> list[str]:
        from pipeline.parallelism.sharding import tensor_parallel_problems

        said = f"parallelism={self.name} over {self.tensor_ranks} devices"
        return tensor_parallel_problems(model, architecture, self.tensor_ranks, said)

    def shard(self, model: nn.Module, architecture: Architecture, mesh: DeviceMesh) -> None:
        from pipeline.parallelism.sharding import split_tensors

        split_tensors(model, architecture, mesh["tensor_parallel"])
