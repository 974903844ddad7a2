"""Runs on several ranks and nodes that something befalls: they end soon, say why, and can be resumed elsewhere."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from benchmarks.control_group import control_group
from pipeline import checkpoints
from pipeline.app import main
from pipeline.heartbeat import unpack

pytestmark = pytest.mark.started  # processes are found by their command lines and environments
ROOT = Path(__file__).resolve().parent.parent
SOON = 30
"""Seconds in which all of a run must be gone."""
TINY = [
    "model=gpt_nano", "model.layers=1", "data.sequence_length=32", "data.evaluation_tokens=1024", "trainer=smoke",
    "trainer.batch_size=8", "trainer.log_every=1", "trainer.checkpoint_every=2", "trainer.evaluate_every=0",
    "optimizer.schedule=constant", "optimizer.warmup_steps=0", "device=cpu",
]  # fmt: skip
ENDLESS = "trainer.max_steps=1000000"
MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


class Program:
    """`run.py` as a process of its own."""

    def __init__(self, directory: Path, *words: str, **variables: str) -> None:
        self.directory = directory
        command = [sys.executable, str(ROOT / "run.py"), *words]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, **MPI, "OMP_NUM_THREADS": "1", **variables},
        )  # fmt: skip

    def ends(self, within: float = SOON) -> tuple[int, str]:
        """Exit code, and the last line it says."""
        _, told = self.process.communicate(timeout=within)
        return self.process.returncode, "".join(told.strip().splitlines()[-1:])

    def trains(self, beyond: int = 0) -> None:
        """Wait until a step after `beyond` is saved."""
        deadline = time.monotonic() + 400
        while step_of(self.directory) <= beyond:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.2)


@contextmanager
def started(directory: Path, *words: str, **variables: str) -> Iterator[Program]:
    program = Program(directory, *words, **variables)
    try:
        yield program
    finally:
        program.process.kill()
        program.process.communicate()
        assert gone(directory), processes_of(directory)


def step_of(directory: Path) -> int:
    """The step of the last checkpoint; 0 without one."""
    last = directory / "checkpoints" / "last.ckpt"
    return checkpoints.step(last) if checkpoints.exists(last) else 0


def processes_of(directory: Path) -> dict[int, str]:
    """Living processes, launchers and ranks too, whose command line or environment names the run's directory."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                said = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                if str(directory).encode() in said and "Z" not in (entry / "stat").read_text().split(")")[1][:3]:
                    found[int(entry.name)] = said.partition(b"\0\0")[0].decode().replace("\0", " ")[:300]
            except OSError:  # it is gone, or another user's
                continue
    return found


def gone(directory: Path, within: float = SOON) -> bool:
    deadline = time.monotonic() + within
    while processes_of(directory) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not processes_of(directory)


def rank_process(directory: Path, rank: int) -> int:
    beat = unpack((directory / f".beats-00-train-{rank}").read_bytes())
    assert beat is not None
    return beat.process


def rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@pytest.mark.slow
def test_two_nodes_train_as_one_device_and_end_together_when_a_launcher_is_killed(tmp_path: Path) -> None:
    """Then the run goes on elsewhere: started by mpirun, where there is one, until the program itself is killed; on
    four ranks, until it is preempted; and on a single one to its end."""
    one, run = tmp_path / "one", tmp_path / "two"
    assert main([*TINY, "trainer.max_steps=20", f"hydra.run.dir={one}"]) == 0
    port = 15000 + free_port() % 10000
    nodes = [*TINY, ENDLESS, "parallelism=ddp", "parallelism.devices=1", "parallelism.nodes=2"]
    by_hand = [f"parallelism.rendezvous=127.0.0.1:{port}", "parallelism.node_rank=0"]
    by_slurm = {  # as srun --nodes=2 --ntasks-per-node=1 has them on the second node
        "SLURM_JOB_ID": str(port - 15000), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
    }  # fmt: skip
    where = f"hydra.run.dir={run}"
    with started(run, *nodes, *by_hand, where) as leader, started(run, *nodes, where, **by_slurm) as follower:
        leader.trains(beyond=20)
        (agent,) = (
            n for n, words in processes_of(run).items() if "distributed.run" in words and "node_rank=1" in words
        )
        os.kill(agent, signal.SIGKILL)
        code, told = leader.ends()
        assert code == 1
        assert "stage 'train' on 2 devices of 2 nodes: node 1" in told
        assert "what started the ranks was killed by SIGKILL" in told
        assert follower.ends() == (1, f"node 0: {told.removeprefix('error: ').partition(' (log:')[0]}")
        assert gone(run)
    expected = [float(row["loss"]) for row in rows(one)]
    assert [float(row["loss"]) for row in rows(run)[:20]] == pytest.approx(expected, rel=1e-5)

    step = step_of(run)
    launcher = "mpirun" if shutil.which("mpirun") else "torchrun"
    onto = ["parallelism.nodes=1", "parallelism.rendezvous=null", "parallelism.node_rank=null"]
    with started(run, f"resume={run}", *onto, "parallelism.devices=2", f"parallelism.launcher={launcher}") as program:
        program.trains(beyond=step)
        assert any(launcher in words or "distributed.run" in words for words in processes_of(run).values())
        program.process.kill()
        assert program.ends()[0] == -signal.SIGKILL
        assert gone(run)

    step = step_of(run)
    four = [*onto, "parallelism.devices=4", "parallelism.launcher=torchrun", "trainer.checkpoint_every=1000000"]
    with started(run, f"resume={run}", *four) as program:
        while not rows(run) or int(rows(run)[-1]["step"]) < step + 3:
            time.sleep(0.2)
        program.process.send_signal(signal.SIGTERM)
        assert program.ends() == (143, f"stopped by SIGTERM (resume={run})")
        assert gone(run)
    assert step_of(run) > step, "the step under way was not saved"
    step = step_of(run)
    alone = ["parallelism=single", f"trainer.max_steps={step + 2}", "trainer.checkpoint_every=2"]
    assert main([f"resume={run}", *alone]) == 0
    steps = [int(row["step"]) for row in rows(run)]
    assert steps == list(range(1, step + 3))


@pytest.mark.slow
def test_a_sharded_run_with_a_stopped_rank_ends_and_goes_on_on_one_device_until_ctrl_c(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(run, *TINY, ENDLESS, "parallelism=fsdp", f"hydra.run.dir={run}") as program:
        program.trains()
        os.kill(rank_process(run, 1), signal.SIGSTOP)
        code, told = program.ends()
        assert code == 1
        assert "stage 'train' on 2 devices: rank 1 hung: a signal has stopped it" in told
        assert gone(run)
    assert json.loads((run / "result.json").read_text())["status"] == "failed"
    step = step_of(run)
    with started(run, f"resume={run}", "parallelism=single", "trainer.checkpoint_every=1000000") as program:
        while int(rows(run)[-1]["step"]) < step + 3:
            time.sleep(0.2)
        program.process.send_signal(signal.SIGINT)
        assert program.ends() == (130, f"stopped by SIGINT (resume={run})")
    assert step_of(run) >= step + 3


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named_and_leaves_nothing_behind(tmp_path: Path) -> None:
    run, temporary = tmp_path / "run", tmp_path / "temporary"
    temporary.mkdir()
    place = [f"hydra.run.dir={run}"]
    with started(run, *TINY, ENDLESS, "parallelism=ddp", *place, TMPDIR=str(temporary)) as program:
        program.trains()
        os.kill(rank_process(run, 1), signal.SIGKILL)
        code, told = program.ends()
        assert code == 1
        # That it was for want of memory is suspected where another process is killed for that, as in the test below.
        assert "stage 'train' on 2 devices: rank 1 was killed by SIGKILL" in told
        assert gone(run)
    assert not list(temporary.iterdir())


@pytest.mark.slow
def test_a_rank_that_the_system_kills_for_want_of_memory_is_named_with_what_was_planned(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with ExitStack() as held:
        try:
            group = held.enter_context(control_group(2**20))
        except OSError as error:
            pytest.skip(f"no control group can be made here: {error}")
        program = held.enter_context(started(run, *TINY, ENDLESS, "parallelism=ddp", f"hydra.run.dir={run}"))
        program.trains()
        (group / "cgroup.procs").write_text(str(rank_process(run, 1)))
        code, told = program.ends(120)
    assert code == 1
    assert "out of memory in train (stage 'train' on 2 devices: rank 1 was killed by SIGKILL (out of memory)" in told
    assert "planned were " in told


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs leanfit[ray]")
@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), [("ray", signal.SIGTERM), ("ray_fsdp", signal.SIGINT)])
def test_a_run_on_ray_that_is_stopped_saves_its_step_and_goes_on_on_one_device(
    tmp_path: Path, name: str, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    unsaved = "trainer.checkpoint_every=1000000"
    with started(run, *TINY, ENDLESS, f"parallelism={name}", unsaved, f"hydra.run.dir={run}") as program:
        while not (run / "metrics.csv").exists() or len(rows(run)) < 3:
            assert program.process.poll() is None, program.process.communicate()
            time.sleep(0.2)
        told = time.monotonic()
        os.killpg(program.process.pid, number)  # as a terminal's Ctrl-C, or Slurm, tells all that was started there
        assert program.ends() == (128 + number, f"stopped by {number.name} (resume={run})")
        assert gone(run, SOON - (time.monotonic() - told))
    step = step_of(run)
    assert step == int(rows(run)[-1]["step"]), "the step under way was not saved"
    assert not list(run.glob(".stop-*"))
    assert (
        main([f"resume={run}", "parallelism=single", f"trainer.max_steps={step + 2}", "trainer.checkpoint_every=2"])
        == 0
    )
    assert [int(row["step"]) for row in rows(run)] == list(range(1, step + 3))
