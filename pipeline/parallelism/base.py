"""What every parallelism choice offers: how many devices, the Lightning strategy on a rank, what it does to a model."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from pipeline.models.base import Architecture

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
GatherDtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """A `parallelism` choice."""

    distributed: ClassVar[bool]
    """Whether a fit runs in workers of its own, started by torchrun."""
    sharded: ClassVar[bool] = False
    """Whether a rank holds a part of the model."""
    name: str
    devices: Annotated[int, Ge(1)]
    nodes: Annotated[int, Ge(1)]

    def problems(self) -> list[str]:
        """What is wrong with these settings that types and ranges cannot say. Must not import torch."""
        return []

    @property
    def ranks(self) -> int:
        """Processes on all nodes together."""
        return self.devices * self.nodes

    @property
    def tensor_ranks(self) -> int:
        """Ranks that work on the same samples, each on a part of every layer."""
        return 1

    @property
    def data_ranks(self) -> int:
        """Ranks, or groups of them, that work on samples of their own."""
        return max(1, self.ranks // self.tensor_ranks)

    @abstractmethod
    def strategy(self, device: str) -> Strategy:
        """The Lightning strategy, built on the rank that uses it."""

    def begin(self, wrapped: nn.Module) -> None:
        """Called on each rank before the first step, with the model as the strategy has wrapped it."""

    def shape_problems(self, model: nn.Module, architecture: Architecture) -> list[str]:
        """Why a model of these shapes (on the meta device) cannot be spread so."""
        return []

    def shard(self, model: nn.Module, architecture: Architecture, mesh: DeviceMesh) -> None:
        """Spread `model` over `mesh` (dimensions data_parallel x tensor_parallel), in place; only where `sharded`."""


def backend(name: str, device: str) -> str:
    """The communication library between copies of `device`. Raises ConfigError where there is none."""
    if device not in BACKENDS:
        raise ConfigError(
            f"parallelism={name}: device={device} has no communication backend; "
            "use parallelism=single, or device=cpu or device=cuda"
        )
    return BACKENDS[device]
