"""Ranks that hang: who is told apart from those that wait for it, and from a step that is merely slow."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.heartbeat import Beat, Beats, Phase, Watch, children, is_stopped, pack, read_files, unpack


class Ranks:
    """Ranks of which only the counts exist."""

    def __init__(self, directory: Path, count: int) -> None:
        self.beats = [Beats(directory / f"beats-{rank}") for rank in range(count)]
        self.files = [beats.path for beats in self.beats]
        self.watch = lambda timeout: Watch(lambda: read_files(self.files), timeout)
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
    watch = ranks.watch(600)
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
    watch = ranks.watch(600)
    ranks.step(until="on_train_batch_start")
    assert watch.hung(0.0) is None
    ranks.step()
    assert watch.hung(5.0) is None
    ranks.step(0, until="on_train_batch_start")
    ranks.step(1, until="on_before_backward")
    assert watch.hung(10.0) is None
    assert watch.hung(109.0) is None
    assert str(watch.hung(110.0)).startswith("rank 0 hung: no step for 100 s")


def test_a_first_step_may_take_much_longer_on_one_rank_than_on_others(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    watch = ranks.watch(600)
    ranks.step(0, until="on_train_batch_start")
    ranks.step(1, until="on_before_backward")
    assert watch.hung(0.0) is None
    assert watch.hung(599.0) is None
    assert str(watch.hung(600.0)).startswith("rank 0 hung: no step for 600 s")


def test_a_rank_that_does_not_come_up_is_named(tmp_path: Path) -> None:
    up = Beats(tmp_path / "beats-0")
    for first, limit in ((2.0, 60.0), (10.0, 200.0), (50.0, 600.0)):  # seconds until the first rank is there
        files = [tmp_path / "none yet"]
        watch = Watch(lambda files=files: read_files([*files, tmp_path / "beats-1"]), 600)  # type: ignore[misc]
        assert watch.hung(0.0) is None
        files[:] = [up.path]
        assert watch.hung(first) is None
        assert watch.hung(first + limit - 1) is None
        assert str(watch.hung(first + limit)).startswith(f"rank 1 did not come up, {limit:.0f} s after the first")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system does not tell a process's children")
def test_a_rank_that_does_not_come_up_is_ended_with_the_others(tmp_path: Path) -> None:
    script = "import subprocess as s, time; s.Popen(['sleep', '600']); print('up', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        launcher.stdout.readline()
        watch = Watch(lambda: read_files([tmp_path / "none"]), 600)
        watch.launcher = launcher.pid
        assert watch.hung(0.0) is None
        (rank,) = children(launcher.pid)
        os.kill(rank, signal.SIGSTOP)
        watch.kill()
        while Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)  # it has ended, and its parent has not asked yet
        launcher.kill()


def test_where_none_is_behind_the_timeout_counts(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    watch = ranks.watch(60)
    ranks.step()
    ranks.step(until="on_before_backward")
    assert watch.hung(0.0) is None
    assert watch.hung(59.0) is None
    assert watch.hung(60.0) == "a rank hung: no step for 60 s (trainer.rank_timeout=60)"


@pytest.mark.parametrize(
    "calls", [["on_train_batch_end"], ["on_save_checkpoint"], ["on_validation_start", "on_validation_batch_end"]]
)
def test_a_rank_that_stays_behind_while_it_loads_saves_or_validates_is_given_what_that_took(
    calls: list[str], tmp_path: Path
) -> None:
    ranks = Ranks(tmp_path, 2)
    watch = ranks.watch(600)
    for seconds in (0.0, 4.0):  # it took 4 seconds once
        for rank in ranks.beats:
            for call in calls:
                getattr(rank, call)()
        assert watch.hung(seconds) is None
    ranks.step(1, until="on_train_batch_start")
    assert watch.hung(5.0) is None
    assert watch.hung(84.9) is None
    assert watch.hung(85.0) == "rank 0 hung: no step for 80 s (trainer.rank_timeout=600)"


def test_ranks_that_have_not_begun_or_are_done_are_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    nothing = Watch(lambda: read_files([tmp_path / "none", tmp_path / "empty"]), timeout=1)
    assert nothing.hung(0.0) is None
    assert nothing.hung(100.0) is None
    begun = Beats(tmp_path / "begun")
    starting = Watch(lambda: read_files([begun.path]), timeout=1)
    assert starting.hung(0.0) is None
    assert starting.hung(100.0) is None
    ranks = Ranks(tmp_path, 2)
    watch = ranks.watch(60)
    ranks.step()
    assert watch.hung(0.0) is None
    ranks.beats[0].on_train_end()
    ranks.beats[1].on_exception()
    assert watch.hung(1000.0) is None
    assert watch.hung(2000.0) is None


def test_a_rank_that_a_signal_stopped_is_named_whatever_it_does_and_can_be_ended(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"])
    beats = [pack(Beat(process.pid, 1, Phase.IDLE)), pack(Beat(0, 7, Phase.STEP)), None]
    watch = Watch(lambda: beats, timeout=600)
    assert watch.hung(0.0) is None
    process.send_signal(signal.SIGSTOP)
    while not is_stopped(process.pid):
        pass
    assert watch.hung(1.0) is None
    assert watch.hung(10.9) is None
    assert watch.hung(11.0) == "rank 0 hung: a signal has stopped it, 10 s ago"
    watch.kill()
    assert process.wait(timeout=10) == -signal.SIGKILL
    watch.kill()  # gone already
    assert not is_stopped(process.pid)


def test_what_started_the_ranks_is_named_where_a_signal_stopped_it(tmp_path: Path) -> None:
    """It would never say that they have ended."""
    process = subprocess.Popen(["sleep", "60"])
    watch = Watch(lambda: [None], timeout=600)
    watch.launcher = process.pid
    process.send_signal(signal.SIGSTOP)
    while not is_stopped(process.pid):
        pass
    assert watch.hung(0.0) is None
    assert watch.hung(10.0) == "what started the ranks hung: a signal has stopped it, 10 s ago"
    process.kill()
    process.wait()


def test_a_rank_that_goes_on_after_a_pause_is_not_ended(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"])
    watch = Watch(lambda: [pack(Beat(process.pid, 1, Phase.IDLE))], timeout=600)
    try:
        for number, stopped, told in ((signal.SIGSTOP, True, None), (signal.SIGCONT, False, None)):
            process.send_signal(number)
            while is_stopped(process.pid) is not stopped:
                pass
            assert watch.hung(float(number)) is told
        assert watch.hung(1000.0) is None
    finally:
        process.kill()
        process.wait()


def test_a_rank_of_another_machine_is_not_taken_for_a_process_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Beats(tmp_path / "here")
    monkeypatch.setenv("LEANFIT_PARENT", "another-machine 17")
    Beats(tmp_path / "there")
    here, there = (unpack(written) for written in read_files([tmp_path / "here", tmp_path / "there"]))
    assert (here.process, there.process) == (os.getpid(), 0)
