"""Ranks that hang: who is told apart from those that wait for it, and from a step that is merely slow."""

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.heartbeat import Beats, Watch

ROOT = Path(__file__).resolve().parent.parent


class Ranks:
    """Ranks of which only the counts exist."""

    def __init__(self, directory: Path, count: int) -> None:
        self.beats = [Beats(directory / f"beats-{rank}") for rank in range(count)]
        self.files = [beats.path for beats in self.beats]
        for beats in self.beats:
            beats.on_train_start()

    def step(self, *ranks: int, until: str = "on_train_batch_end") -> None:
        for rank in ranks or range(len(self.beats)):
            for part in ("on_train_batch_start", "on_before_backward", "on_after_backward", "on_train_batch_end"):
                getattr(self.beats[rank], part)()
                if part == until:
                    break


def test_the_rank_that_the_others_wait_for_is_named(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 3)
    watch = Watch(ranks.files, timeout=600)
    for second in range(5):
        ranks.step()
        assert watch.hung(float(second)) is None
    ranks.step(1, until="on_train_batch_start")
    ranks.step(0, 2, until="on_before_backward")
    assert watch.hung(5.0) is None
    assert watch.hung(24.9) is None
    assert watch.hung(25.0) == "rank 1 hung: no step for 20 s (trainer.rank_timeout=600)"


def test_a_slow_step_is_given_what_slow_steps_took(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    watch = Watch(ranks.files, timeout=600)
    ranks.step(until="on_train_batch_start")
    assert watch.hung(0.0) is None
    ranks.step()
    assert watch.hung(5.0) is None
    ranks.step(0, until="on_train_batch_start")
    ranks.step(1, until="on_before_backward")
    assert watch.hung(10.0) is None
    assert watch.hung(109.0) is None
    assert str(watch.hung(110.0)).startswith("rank 0 hung: no step for 100 s")


@pytest.mark.parametrize("until", ["on_before_backward", "on_train_batch_end"])
def test_where_none_is_behind_or_a_checkpoint_may_be_saved_the_timeout_counts(until: str, tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    watch = Watch(ranks.files, timeout=60)
    ranks.step(until=until)
    if until == "on_train_batch_end":
        ranks.step(1, until="on_train_batch_start")
    assert watch.hung(0.0) is None
    assert watch.hung(59.0) is None
    who = "a rank" if until == "on_before_backward" else "rank 0"
    assert watch.hung(60.0) == f"{who} hung: no step for 60 s (trainer.rank_timeout=60)"


def test_ranks_that_have_not_begun_or_are_done_are_not_looked_at(tmp_path: Path) -> None:
    nothing = Watch([tmp_path / "none", tmp_path / "empty"], timeout=1)
    (tmp_path / "empty").touch()
    assert nothing.hung(0.0) is None
    assert nothing.hung(100.0) is None
    ranks = Ranks(tmp_path, 2)
    watch = Watch(ranks.files, timeout=60)
    ranks.step()
    assert watch.hung(0.0) is None
    for beats in ranks.beats:
        beats.on_train_end()
    assert watch.hung(1000.0) is None
    assert [file.exists() for file in ranks.files] == [False, False]


def test_a_rank_is_ended_even_where_it_is_stopped(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"])
    process.send_signal(signal.SIGSTOP)
    (tmp_path / "beats").write_bytes(struct.pack("qqq", process.pid, 1, 1))
    watch = Watch([tmp_path / "beats"], timeout=1)
    assert watch.hung(0.0) is None
    assert watch.hung(1.0) is not None
    watch.kill()
    assert process.wait(timeout=10) == -signal.SIGKILL
    watch.kill()  # gone already


@pytest.mark.slow
def test_a_run_with_a_rank_that_hangs_ends_names_it_and_can_be_resumed(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    settings = ["model=gpt_nano", "trainer=smoke", "data.evaluation_tokens=1024", "device=cpu", "parallelism=ddp"]
    more = ["trainer.max_steps=100000", "trainer.checkpoint_every=2", "trainer.rank_timeout=10"]
    command = [sys.executable, str(ROOT / "run.py"), *settings, *more, f"hydra.run.dir={directory}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        last = directory / "checkpoints" / "last.ckpt"
        deadline = time.monotonic() + 200
        while not last.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        pids = [struct.unpack("qqq", (directory / f".beats-00-train-{rank}").read_bytes())[0] for rank in range(2)]
        os.kill(pids[1], signal.SIGSTOP)
        stopped = time.monotonic()
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert time.monotonic() - stopped < 40
    assert process.returncode == 1
    assert re.search(r"stage 'train' on 2 devices: (rank 1|a rank) hung: no step for \d+ s", told), told
    assert json.loads((directory / "result.json").read_text())["status"] == "failed"
    for pid in pids:
        assert not Path(f"/proc/{pid}").exists()
    assert last.is_file()
