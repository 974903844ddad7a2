"""How the ranks of a distributed fit are started: torchrun on `pipeline.worker`, in the run directory.

The command line is never replayed in the ranks: under `-m` that would rerun the whole sweep in each of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pipeline.chain import Stage
from pipeline.errors import LeanfitError
from pipeline.fitting import Fitted
from pipeline.schema import RunConfig


def launch(config: RunConfig, stage: Stage, run_dir: Path, *, resume: bool) -> Fitted:
    """Fit `stage` in `parallelism.devices` processes and wait. Raises LeanfitError when a rank fails."""
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
