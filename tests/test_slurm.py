"""Ranks on a real Slurm cluster of two nodes, which may be one machine: docs/training.md says how to set that up."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.app import main
from tests.test_faults import ENDLESS, ROOT, SOON, TINY, gone, processes_of, rank_process, rows, step_of

TWO = ["parallelism=ddp", "parallelism.devices=1", "parallelism.nodes=2", "trainer.checkpoint_every=1000000"]


def nodes() -> int:
    """How many nodes of a cluster wait for jobs."""
    if not (shutil.which("sinfo") and shutil.which("srun")):
        return 0
    told = subprocess.run(["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"], capture_output=True, text=True, check=False)
    return len(set(told.stdout.split())) if told.returncode == 0 else 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.started,
    pytest.mark.skipif(nodes() < 2, reason="needs a running Slurm with two idle nodes (docs/training.md)"),
]


def started(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def trains(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Wait until that step is done."""
    deadline = time.monotonic() + 400
    while not (run / "metrics.csv").exists() or len(rows(run)) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)


def program(run: Path, *words: str) -> list[str]:
    return [sys.executable, str(ROOT / "run.py"), *TINY, ENDLESS, *TWO, *words, f"hydra.run.dir={run}"]


def losses(run: Path) -> list[float]:
    return [float(row["loss"]) for row in rows(run)]


def test_ranks_that_srun_starts_train_as_one_device_and_one_that_is_killed_is_named(tmp_path: Path) -> None:
    one, run = tmp_path / "one", tmp_path / "run"
    assert main([*TINY, "trainer.max_steps=4", f"hydra.run.dir={one}"]) == 0
    job = started("salloc", "-Q", "-N2", "-n2", *program(run, "parallelism.launcher=srun"))
    trains(job, run, 4)
    os.kill(rank_process(run, 1), signal.SIGKILL)
    _, told = job.communicate(timeout=SOON)
    assert "stage 'train' on 2 devices of 2 nodes: rank 1 was killed by SIGKILL" in told.splitlines()[-1]
    assert gone(run), processes_of(run)
    assert losses(run)[:4] == pytest.approx(losses(one), rel=1e-5)


def test_scancel_of_one_process_on_each_node_saves_the_step_on_all_of_them(tmp_path: Path) -> None:
    """Slurm signals every process of a step, and each passes that on to others."""
    run = tmp_path / "run"
    job = started("srun", f"--job-name={tmp_path.name}", "-N2", "--ntasks-per-node=1", *program(run))
    trains(job, run, 4)
    subprocess.run(["scancel", "--signal=TERM", f"--name={tmp_path.name}"], check=True)
    _, told = job.communicate(timeout=SOON)
    assert job.returncode == 143
    assert f"stopped by SIGTERM (resume={run})" in told.splitlines()
    assert gone(run), processes_of(run)
    step = step_of(run)
    assert step == int(rows(run)[-1]["step"]), "the step under way was not saved"
    alone = ["parallelism=single", "parallelism.nodes=1", f"trainer.max_steps={step + 2}"]
    assert main([f"resume={run}", *alone]) == 0
    assert [int(row["step"]) for row in rows(run)] == list(range(1, step + 3))
