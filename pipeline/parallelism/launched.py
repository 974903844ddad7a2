"""Choices whose ranks are processes, one a device, that torchrun, srun or mpirun starts from `pipeline.worker`.

torchrun starts the ranks of one machine; of several, each runs its own (`pipeline.nodes`). srun and mpirun know the
machines of their allocation, or of a host file, and start all ranks from one.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from pipeline.errors import LeanfitError
from pipeline.parallelism.base import Meeting, Parallelism

Launcher = Literal["torchrun", "srun", "mpirun"]

PLACES: dict[Launcher, tuple[tuple[str, ...], ...]] = {
    "torchrun": (("RANK", "LOCAL_RANK", "WORLD_SIZE"),),
    "srun": (("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),),
    # Open MPI, then MPICH and Intel MPI.
    "mpirun": (
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
    ),
}
"""Environment variables in which a rank finds its rank, its rank on its machine, and the number of ranks."""
MPI_SETTINGS = (
    # Open MPI (4, then 5) binds a rank to one core, which would then run all its threads; it starts no more ranks than
    # there are cores; and it leaves ranks one second from SIGTERM to SIGKILL. Other implementations do none of this.
    "OMPI_MCA_hwloc_base_binding_policy=none",
    "PRTE_MCA_hwloc_default_binding_policy=none",
    "OMPI_MCA_rmaps_base_oversubscribe=1",
    "PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe",
    "OMPI_MCA_odls_base_sigkill_timeout=15",
    "PRTE_MCA_odls_base_sigkill_timeout=15",
)


@dataclass(frozen=True, kw_only=True)
class Launched(Parallelism):
    """`launcher`: what starts the ranks. `devices` of each node.

    `rendezvous`, `node_rank`: where several nodes with torchrun meet (HOST:PORT of node 0), and which of them this is;
    None: as SLURM says.
    """

    distributed: ClassVar[bool] = True

    launcher: Launcher
    rendezvous: str | None
    node_rank: Annotated[int, Ge(0)] | None

    @property
    def joins_store(self) -> bool:
        return self.launcher != "torchrun"

    @property
    def needs_followers(self) -> bool:
        return self.launcher == "torchrun" and self.nodes > 1

    @property
    def own_node(self) -> int:
        if not self.needs_followers:
            return 0
        return int(os.environ["SLURM_NODEID"]) if self.node_rank is None else self.node_rank

    def problems(self) -> list[str]:
        if self.joins_store and not shutil.which(self.launcher):
            return [
                f"parallelism.launcher={self.launcher}: there is no {self.launcher} on PATH; "
                "install it, or use parallelism.launcher=torchrun"
            ]
        if self.needs_followers:
            return [*self._rendezvous_problems(), *self._node_problems()]
        if self.rendezvous is None and self.node_rank is None:
            return []
        return [
            f"parallelism.{'node_rank' if self.rendezvous is None else 'rendezvous'} is for several nodes that run "
            "torchrun; use parallelism.nodes=N parallelism.launcher=torchrun, or leave it out"
        ]

    def _rendezvous_problems(self) -> list[str]:
        said, nodes = self.rendezvous, f"parallelism.nodes={self.nodes}"
        if said is None:
            if "SLURM_JOB_NODELIST" in os.environ:
                return []
            return [f"{nodes} needs parallelism.rendezvous=HOST:PORT, where the others reach node 0, on each node"]
        host, _, port = said.rpartition(":")
        if host and port.isdecimal() and 0 < int(port) < 2**16:
            return []
        return [f"parallelism.rendezvous={said} must be HOST:PORT, such as {host or said}:29400"]

    def _node_problems(self) -> list[str]:
        nodes, environ = f"parallelism.nodes={self.nodes}", os.environ
        if self.node_rank is not None:
            if self.node_rank < self.nodes:
                return []
            return [f"parallelism.node_rank={self.node_rank}: {nodes} are numbered 0 to {self.nodes - 1}"]
        if "SLURM_JOB_ID" not in environ:
            return [f"{nodes} needs parallelism.node_rank=N, 0 to {self.nodes - 1}, another one on each node"]
        tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS", "1")
        if "SLURM_STEP_ID" in environ and tasks == environ.get("SLURM_STEP_NUM_NODES") == str(self.nodes):
            return []
        return [
            f"{nodes} needs one process on each node; start it by srun --nodes={self.nodes} --ntasks-per-node=1 "
            "python run.py ..., or once, with parallelism.launcher=srun"
        ]

    def command(self, worker: Sequence[str], meeting: Meeting) -> list[str]:
        if self.launcher == "torchrun":
            # Ranks write to this process's own streams: without a directory of logs, which would be left behind empty.
            logs = f"--log-dir={os.devnull}"
            torchrun = [sys.executable, "-m", "torch.distributed.run", logs, f"--nproc_per_node={self.devices}"]
            if self.nodes == 1:
                return [*torchrun, "--standalone", *worker[1:]]
            place = [f"--nnodes={self.nodes}", f"--node_rank={self.own_node}", "--rdzv_backend=static"]
            return [*torchrun, *place, f"--master_addr={meeting.host}", f"--master_port={meeting.port}", *worker[1:]]
        # `env` hands variables on in the same way with every implementation of MPI.
        variables = {**meeting.variables, "MASTER_ADDR": meeting.host, "MASTER_PORT": str(meeting.port)}
        rank = ["env", *(f"{name}={value}" for name, value in variables.items()), *worker]
        if self.launcher == "mpirun":
            return ["env", *MPI_SETTINGS, "mpirun", "-n", str(self.ranks), *rank]
        per_node = [f"--nodes={self.nodes}", f"--ntasks={self.ranks}", f"--ntasks-per-node={self.devices}"]
        # Where srun has started this program itself, ranks would wait for what its step holds, without end.
        return ["srun", *per_node, "--overlap", "--kill-on-bad-exit=1", *rank]

    def place(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Raises LeanfitError where the launcher's variables are missing."""
        if self.launcher == "torchrun":
            return {}
        found = [names for names in PLACES[self.launcher] if environ.keys() >= set(names)]
        if not found:
            known = " or ".join(names[0] for names in PLACES[self.launcher])
            raise LeanfitError(f"parallelism.launcher={self.launcher}: a rank was started without {known}")
        rank, local, world = (environ[name] for name in found[0])
        if int(world) != self.ranks:
            raise LeanfitError(f"parallelism.launcher={self.launcher} started {world} ranks instead of {self.ranks}")
        return {
            "RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": world, "GROUP_RANK": str(int(rank) // self.devices),
            "LOCAL_WORLD_SIZE": str(self.devices), "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip


def started_in_copies(environ: Mapping[str, str]) -> int:
    """How many times a launcher of ranks has started this very program; 1 where none has."""
    # SLURM_NTASKS is the job's where its script, or an interactive step of salloc, is one process.
    worlds = ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"]
    return max([1, *(int(environ[name]) for name in worlds if environ.get(name, "").isdecimal())])
