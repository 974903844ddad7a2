"""How the ranks of a distributed fit are started: torchrun on `pipeline.worker`, in the run directory.

The command line is never replayed in the ranks: under `-m` that would rerun the whole sweep in each of them.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

from pipeline import environment
from pipeline.chain import Stage
from pipeline.errors import LeanfitError
from pipeline.fitting import Fitted
from pipeline.heartbeat import Watch
from pipeline.schema import RunConfig

PARENT = "LEANFIT_PARENT"
"""Environment variable: the process id that ranks watch."""


def figures_file(run_dir: Path, stage: Stage) -> Path:
    """Where rank 0 leaves what the fit did."""
    return run_dir / f".fitted-{stage.directory}.json"


def error_file(run_dir: Path, stage: Stage) -> Path:
    """Where the first rank that fails says why."""
    return run_dir / f".failed-{stage.directory}.txt"


def beat_file(run_dir: Path, stage: Stage, rank: int) -> Path:
    """Where a rank counts its steps."""
    return run_dir / f".beats-{stage.directory}-{rank}"


def launch(config: RunConfig, stage: Stage, run_dir: Path, *, resume: bool) -> Fitted:
    """Fit `stage` in `parallelism.devices` processes and wait. Raises LeanfitError when a rank fails."""
    figures, failure = figures_file(run_dir, stage), error_file(run_dir, stage)
    beats = [beat_file(run_dir, stage, rank) for rank in range(config.parallelism.devices)]
    for leftover in (figures, failure, *beats):
        leftover.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        f"--nproc_per_node={config.parallelism.devices}",
        *("-m", "pipeline.worker", str(run_dir), stage.name, "resume" if resume else "fresh"),
    ]
    threads = max(1, (os.cpu_count() or 1) // config.parallelism.devices)
    variables = {"OMP_NUM_THREADS": str(threads), **environment.child()}
    path = run_dir / "run.log"
    start = path.stat().st_size if path.exists() else 0
    with path.open("ab") as log:
        watch = Watch(beats, config.trainer.rank_timeout)
        code, hung = supervise(command, variables, subprocess.DEVNULL if config.sweep else None, log, watch)
    for beat in beats:
        beat.unlink(missing_ok=True)
    if code or not figures.is_file():
        told = path.read_bytes()[start:].decode("utf-8", "replace")
        said = failure.read_text(encoding="utf-8") if failure.is_file() else f"torchrun ended with {code}"
        why = hung or killed(told) or said
        raise LeanfitError(f"stage '{stage.name}' on {config.parallelism.devices} devices: {why}")
    fitted = Fitted.read(figures)
    figures.unlink()
    return fitted


def supervise(
    command: list[str], variables: dict[str, str], shown: int | None, log: IO[bytes], watch: Watch
) -> tuple[int, str | None]:
    """Run torchrun to its end: (its exit code, which rank hung). Whatever stops this process stops torchrun first,
    which stops its ranks."""
    variables = {**variables, PARENT: str(os.getpid())}
    process = subprocess.Popen(command, env=variables, stdout=shown, stderr=log)
    hung = None
    try:
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.5)
            if hung is None and (hung := watch.hung()):
                watch.kill()
        return process.returncode, hung
    except BaseException:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            watch.kill()
        raise


def killed(told: str) -> str | None:
    """Which rank a signal ended, from torchrun's report: the others only say that a connection was lost."""
    for rank, code in re.findall(r"rank\s*: (\d+).*?exitcode\s*: (-?\d+)", told, re.DOTALL):
        if int(code) < 0 and -int(code) != signal.SIGTERM:  # with which torchrun itself stops the ranks that are left
            name = signal.Signals(-int(code)).name
            return f"rank {rank} was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return None


def watch_parent() -> None:
    """In a rank: end when the process that started the fit is gone, however it ended."""
    parent = int(os.environ[PARENT])

    def watch() -> None:
        while True:
            try:
                os.kill(parent, 0)
            except OSError:
                os._exit(1)
            time.sleep(1)

    threading.Thread(target=watch, daemon=True).start()
