"""Settings of the process that must stand before torch is imported. A user's own values are left alone.

OMP_WAIT_POLICY, GOMP_SPINCOUNT: torch's threads spin while they wait for one another. With as many threads as cores,
one other busy process makes them spin against it: on two cores a training step took 32 times as long. Threads that
sleep at once, as PASSIVE has them, must be woken for each operator: a token of int8 decoding took twice as long. So
they spin for a while, then sleep (benchmarks/waiting.py). Only GNU's OpenMP, torch's on Linux, is told for how long.

TORCH_CPP_LOG_LEVEL: the memory profiler warns of each block that was allocated before it was started, on stderr.
The other two keep transformers' notices and bars out of what a run prints; what matters of them is checked by us.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

FOLDERS = ("LEANFIT_CONFIG_PATH", "LEANFIT_CONFIG_DIR")
"""What --config-path and --config-dir named: ranks compose the run's lock anew, and find its choices there."""
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
DEFAULTS = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "10000",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


CHATTY = ("torch.utils._pytree", "torchao")
"""Loggers that say, whenever transformers finds torchao, which of its GPU kernels do not load here."""


def prepare() -> None:
    """Set what is not set. Child processes inherit it, but for loggers' levels."""
    waiting = set(WAITING) if "OMP_WAIT_POLICY" in os.environ else set()
    for name in DEFAULTS.keys() - waiting:  # a user's policy is not overruled by a count, which would go first
        os.environ.setdefault(name, DEFAULTS[name])
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)


def child() -> dict[str, str]:
    """The environment of a child process that runs a module of this package, wherever it was started from."""
    root = str(Path(__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
