"""How the ranks of a distributed fit are started: torchrun on `pipeline.worker`, in the run directory.

The command line is never replayed in the ranks: under `-m` that would rerun the whole sweep in each of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pipeline import environment
from pipeline.chain import Stage
from pipeline.errors import LeanfitError
from pipeline.fitting import Fitted
from pipeline.schema import RunConfig


def figures_file(run_dir: Path, stage: Stage) -> Path:
    """Where rank 0 leaves what the fit did."""
    return run_dir / f".fitted-{stage.directory}.json"


def error_file(run_dir: Path, stage: Stage) -> Path:
    """Where the first rank that fails says why."""
    return run_dir / f".failed-{stage.directory}.txt"


def launch(config: RunConfig, stage: Stage, run_dir: Path, *, resume: bool) -> Fitted:
    """Fit `stage` in `parallelism.devices` processes and wait. Raises LeanfitError when a rank fails."""
    figures, failure = figures_file(run_dir, stage), error_file(run_dir, stage)
    for leftover in (figures, failure):
        leftover.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        f"--nproc_per_node={config.parallelism.devices}",
        *("-m", "pipeline.worker", str(run_dir), stage.name, "resume" if resume else "fresh"),
    ]
    threads = max(1, (os.cpu_count() or 1) // config.parallelism.devices)
    variables = {"OMP_NUM_THREADS": str(threads), **environment.child()}
    with (run_dir / "run.log").open("ab") as log:
        shown = subprocess.DEVNULL if config.sweep else None
        code = subprocess.run(command, env=variables, stdout=shown, stderr=log, check=False).returncode
    if code or not figures.is_file():
        why = failure.read_text(encoding="utf-8") if failure.is_file() else f"torchrun ended with {code}"
        raise LeanfitError(f"stage '{stage.name}' on {config.parallelism.devices} devices: {why}")
    fitted = Fitted.read(figures)
    figures.unlink()
    return fitted
