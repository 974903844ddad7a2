"""What every parallelism choice offers: how many devices, the Lightning strategy on a rank, what it does to a model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from lightning.pytorch.strategies import Strategy
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from pipeline.models.base import Architecture

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
GatherDtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of one fit find each other: a host that all of them reach, and a port on it.

    `variables`: what they must find in their environment besides, where it is not that of the launcher.
    """

    host: str
    port: int
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What a rank holds of a model in training, for the planner.

    `weights`, `gradients`, `state`: over how many ranks each is spread; 1: it is whole on each. `gathers`: weights are
    put together a block at a time, in `gathered_in`, and gradients summed in `summed_in` (None: the weights' dtype);
    with `keeps` they stay from the forward pass to the backward pass. `copies`: then the sums are summed once more,
    between copies of the shards. `on_host`: what of all that is spread lies in the host's memory. `buckets`: gradients
    are copied into buffers to be sent, or with "views" live in them; `sent_in`: and copies in that dtype are on their
    way. `bucket`: elements of DeepSpeed's one buffer for gradients. `master`: the optimizer steps a spread copy of the
    weights. `whole_below`: where DeepSpeed spreads weights, those of fewer elements are whole on each rank besides.
    `leaves_out`: after so many steps what is sent lacks something, which is kept for the next step, as large as the
    gradients.
    """

    weights: int = 1
    gradients: int = 1
    state: int = 1
    gathers: bool = False
    gathered_in: GatherDtype | None = None
    summed_in: GatherDtype | None = None
    keeps: bool = False
    copies: bool = False
    on_host: Literal["nothing", "state", "all"] = "nothing"
    buckets: Literal["none", "views", "copies"] = "none"
    sent_in: GatherDtype | None = None
    bucket: int | None = None
    master: bool = False
    whole_below: int = 0
    leaves_out: int | None = None


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """A `parallelism` choice."""

    distributed: ClassVar[bool]
    """Whether a fit runs in ranks of its own, processes that `command` starts."""
    sharded: ClassVar[bool] = False
    """Whether a rank holds a part of the model."""
    passes_on: ClassVar[bool] = False
    """Whether a first SIGTERM is for what `command` starts, which asks its ranks to stop; else it is for the ranks."""
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

    @property
    def holding(self) -> Holding:
        """What a rank holds of what its group of `tensor_ranks` shares; all of it, unless the choice says otherwise."""
        return Holding()

    @property
    def saves(self) -> Literal["whole", "gathered", "parts", "engine"]:
        """How a checkpoint is written, for the planner: the first rank has it whole, or it is put together there; each
        rank writes its part; or an engine has ways of its own."""
        return "whole"

    @property
    def joins_store(self) -> bool:
        """Whether the ranks expect torch's TCPStore to be there already where they meet."""
        return False

    @property
    def needs_followers(self) -> bool:
        """Whether the program itself is started on each of several nodes, not only its ranks (`pipeline.nodes`)."""
        return False

    @property
    def own_node(self) -> int:
        """Which node this is; 0 does all that is not a fit."""
        return 0

    def command(self, worker: Sequence[str], meeting: Meeting) -> list[str]:
        """A command line that starts the ranks of a fit and ends, with 0 where all went well, when all of them have.

        `worker` is the command of one rank, which finds its place by `place`. Where this command is stopped by SIGTERM
        it takes its ranks along within 20 seconds; where the process `LEANFIT_PARENT` is gone they end by themselves.
        """
        raise NotImplementedError

    def clean(self, run_dir: Path, process: int) -> None:
        """Remove the files that `command`, which was this process, leaves where it is killed."""

    def place(self, environ: Mapping[str, str]) -> dict[str, str]:
        """In a rank: what its environment lacks of torchrun's variables (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR,
        MASTER_PORT ...), which everything after this reads."""
        return {}

    def environment(self) -> ClusterEnvironment:
        """Where Lightning reads a process's place among the ranks. Left to itself it would take that of a SLURM job or
        an MPI program in which one process, or a launcher of ranks, was started."""
        from lightning.fabric.plugins.environments.lightning import LightningEnvironment
        from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

        return TorchElasticEnvironment() if self.distributed else LightningEnvironment()

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
