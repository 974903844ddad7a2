"""`device=cpu`: the processor. Several 'devices' are several processes that share its cores."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pipeline.device.base import Device, Kind
from pipeline.device.system_memory import machine_memory
from pipeline.registry import register

PROCESSES_PER_CORE = 4
"""Beyond it processes do nothing but wait for each other; up to it they are slow but good for trying a strategy out."""


@register("device", "cpu")
@dataclass(frozen=True, kw_only=True)
class CPU(Device):
    def kind(self) -> Kind:
        return "cpu"

    def problems(self, devices: int) -> list[str]:
        limit = PROCESSES_PER_CORE * cores()
        if devices <= limit:
            return []
        return [
            f"parallelism.devices={devices}: device={self.name} has {cores()} cores here; "
            f"use at most {limit} processes ({PROCESSES_PER_CORE} a core)"
        ]

    def description(self) -> str:
        count = cores()
        return f"{processor()}, {count} core{'s' if count != 1 else ''}"

    def installed(self) -> int | None:
        return machine_memory()


def cores() -> int:
    """Cores that this process may use, which a container or a scheduler can make fewer than the machine's."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


def processor() -> str:
    """The processor's name as its maker gives it, or the architecture where the system does not tell."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        told = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        if told.returncode == 0 and told.stdout.strip():
            return told.stdout.strip()
    return platform.processor() or platform.machine()
