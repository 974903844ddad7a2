"""What a machine must share with another for floats to be equal bit for bit."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Threads, processor and torch of this process, as JSON."""
    return {
        "threads": torch.get_num_threads(),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_cpu_name()}",
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
