"""Data parallelism whose ranks are workers of Ray Train, on a cluster that the run starts or one that is there.

Moritz et al., 2018 (arXiv:1712.05889). How the ranks train is `ddp`'s (here) or `fsdp`'s (`ray_fsdp`). Ray itself is
imported by `pipeline.ray_driver` alone, a process of its own.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.parallelism.base import Meeting, Parallelism
from pipeline.parallelism.ddp import DataParallel
from pipeline.registry import register

PACKAGES = ("ray", "pyarrow")
"""What Ray Train cannot be imported without; the extra brings them."""
SOCKETS = "/tmp"
"""Where a cluster of ours keeps its files: paths of sockets must be short, as TMPDIR need not be."""
STORAGE, SHOWN = ".ray", ".shown-"
"""In the run's directory: what Ray Train keeps, and (with the stage's name) what rank 0 shows."""


def prefix(process: int) -> str:
    """How the directory begins in which the cluster that `process` started keeps its files."""
    return f"leanfit-ray-{process}-"


@dataclass(frozen=True, kw_only=True)
class OnRay(Parallelism):
    """`address`: HOST:PORT of a cluster, whose nodes see the run directory under the same path; `auto`: the one of this
    machine, or of the variable RAY_ADDRESS; None: one is started, with as many CPUs as ranks, and stopped afterwards.
    """

    distributed: ClassVar[bool] = True
    passes_on: ClassVar[bool] = True

    address: str | None

    def problems(self) -> list[str]:
        found = super().problems()
        if any(importlib.util.find_spec(package) is None for package in PACKAGES):
            instead = "fsdp" if self.sharded else "ddp"
            found.append(
                f"parallelism={self.name} needs Ray Train: pip install 'leanfit[ray]', or use parallelism={instead}"
            )
        if self.address is not None and not re.fullmatch(r"auto|[^\s/]+:\d+", self.address):
            found.append(
                f"parallelism.address={self.address} is no cluster's; use HOST:PORT, auto, or null to start one"
            )
        if self.nodes > 1 and self.address is None:
            found.append(
                f"parallelism.nodes={self.nodes}: a cluster that the run starts is this machine; "
                "use parallelism.nodes=1, or parallelism.address=HOST:PORT"
            )
        return found

    def command(self, worker: Sequence[str], meeting: Meeting) -> list[str]:
        return [sys.executable, "-m", "pipeline.ray_driver", *worker[3:]]

    def clean(self, run_dir: Path, process: int) -> None:
        for leftover in (run_dir / STORAGE, *Path(SOCKETS).glob(f"{prefix(process)}*")):
            shutil.rmtree(leftover, ignore_errors=True)
        for shown in run_dir.glob(f"{SHOWN}*"):
            shown.unlink(missing_ok=True)

    def place(self, environ: Mapping[str, str]) -> dict[str, str]:
        return {"GROUP_RANK": environ["NODE_RANK"]}  # Ray sets the others


@register("parallelism", "ray")
@dataclass(frozen=True, kw_only=True)
class Ray(DataParallel, OnRay):
    """A copy of the model on each device, as in `ddp`."""
