"""One rank of a distributed fit, and how ranks are started: torchrun on this module, with the run's frozen config.

The command line is never replayed in the ranks (under `-m` that would rerun the sweep in each of them): a rank reads what
the run directory says, fits one stage, and rank 0 leaves last.ckpt and the figures for the process that waits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from pipeline.chain import Stage, stages
from pipeline.errors import LeanfitError
from pipeline.schema import RunConfig


def launch(config: RunConfig, stage: Stage, run_dir: Path, *, resume: bool) -> object:
    """Fit `stage` in `parallelism.devices` processes and wait. Raises LeanfitError when a rank fails."""
    from pipeline.fitting import Fitted

    figures = run_dir / f"fitted-{stage.directory}.json"
    figures.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        f"--nproc_per_node={config.parallelism.devices}",
        *("-m", "pipeline.worker", str(run_dir), stage.name, "resume" if resume else "fresh"),
    ]
    threads = max(1, (os.cpu_count() or 1) // config.parallelism.devices)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    with (run_dir / "run.log").open("ab") as log:
        code = subprocess.run(command, env=environment, stdout=None, stderr=log, check=False).returncode
    if code or not figures.is_file():
        raise LeanfitError(f"stage '{stage.name}': a rank failed (exit {code}); see {run_dir / 'run.log'}")
    fitted = Fitted.read(figures)
    figures.unlink()
    return fitted
