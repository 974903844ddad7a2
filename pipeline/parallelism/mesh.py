"""What the strategies have in common that spread a model over a mesh of devices: Lightning's ModelParallelStrategy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pipeline.parallelism.base import Parallelism, backend

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy


@dataclass(frozen=True, kw_only=True)
class OnMesh(Parallelism):
    """`checkpoint`: `full` gathers weights and optimizer state on rank 0 and writes one file; with `sharded` each rank
    writes its own part into a directory, which any other number of devices, or one, can read."""

    sharded: ClassVar[bool] = True

    checkpoint: Literal["full", "sharded"]

    @property
    def saves(self) -> Literal["gathered", "parts"]:
        return "gathered" if self.checkpoint == "full" else "parts"

    def strategy(self, device: str) -> Strategy:
        """Raises ConfigError for a device between whose copies nothing can be sent."""
        from pipeline.parallelism.sharding import MeshStrategy

        offload = self.holding.on_host == "all"
        between = backend(self.name, device)
        if offload and device != "cpu":
            # Norms of gradients that lie in the host's memory are summed there.
            between = f"cpu:{backend(self.name, 'cpu')},{device}:{between}"
        return MeshStrategy(
            offload=offload,
            data_parallel_size=self.data_ranks,
            tensor_parallel_size=self.tensor_ranks,
            save_distributed_checkpoint=self.checkpoint == "sharded",
            process_group_backend=between,
        )
