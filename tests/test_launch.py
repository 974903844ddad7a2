"""What watches over the launcher of ranks: time that does not count, launchers that do not end by themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import launch, walk
from pipeline.composing import compose
from pipeline.errors import ConfigError, LeanfitError
from pipeline.heartbeat import Beat, Phase, Watch, pack
from pipeline.interrupts import lives
from pipeline.parallelism.base import Meeting
from pipeline.walk import stages_of
from tests.parallelism.test_strategies import choice

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"


class Asked(Watch):
    """A watch that never sees anything, and remembers when it was asked."""

    def __init__(self) -> None:
        super().__init__(lambda: [], 600)
        self.times: list[float] = []

    def hung(self, now: float | None = None) -> str | None:
        self.times.append(now or 0.0)
        return None


def supervise(command: list[str], watch: Watch, log: Path, told: Any = lambda: None) -> tuple[int, str | None]:
    asked = log.with_name("asked")
    with log.open("ab") as file:
        return launch.supervise(command, dict(os.environ), subprocess.DEVNULL, file, watch, told, asked)


def test_time_in_which_the_program_itself_was_stopped_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumping = iter(range(0, 10**9, 10_000))
    monkeypatch.setattr(launch, "time", SimpleNamespace(monotonic=lambda: float(next(jumping))))
    watch = Asked()
    assert supervise(["sleep", "1"], watch, tmp_path / "log") == (0, None)
    assert 0 < watch.times[-1] <= 10 * launch.POLL * len(watch.times)


def test_what_is_told_ends_the_launcher_and_the_ranks_that_it_does_not(tmp_path: Path) -> None:
    rank = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.DEVNULL)
    watch = Watch(lambda: [pack(Beat(rank.pid, 1, Phase.STEP))], 600)
    code, why = supervise(["sleep", "60"], watch, tmp_path / "log", lambda: "node 1 is gone")
    assert (code, why) == (-signal.SIGTERM, "node 1 is gone")
    assert rank.wait(timeout=5) == -signal.SIGKILL


def test_ranks_that_a_killed_launcher_leaves_are_ended(tmp_path: Path) -> None:
    rank = subprocess.Popen(["sleep", "60"])
    watch = Watch(lambda: [pack(Beat(rank.pid, 1, Phase.STEP))], 600)
    code, _ = supervise(["sh", "-c", "sleep 1; kill -9 $$"], watch, tmp_path / "log")
    assert code == -signal.SIGKILL
    assert rank.wait(timeout=5) == -signal.SIGKILL
    assert watch.launcher not in (0, rank.pid), "a signal may stop it, too"


def test_what_a_killed_launcher_leaves_in_a_group_of_its_own_is_ended(tmp_path: Path) -> None:
    """As Ray's services, which are no ranks."""
    service = "sleep 60 & echo $! > $0; sleep 1; kill -9 $$"
    command = ["setsid", "sh", "-c", service, str(tmp_path / "service")]
    assert supervise(command, Asked(), tmp_path / "log")[0] == -signal.SIGKILL
    service_process = int((tmp_path / "service").read_text())
    deadline = time.monotonic() + 5
    while lives(service_process) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not lives(service_process)


def test_a_signal_asks_the_ranks_first_and_gives_them_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE)
    assert rank.stdout is not None
    rank.stdout.readline()
    watch = Watch(lambda: [pack(Beat(rank.pid, 1, Phase.STEP))], 600)
    monkeypatch.setattr(launch, "GRACE", 1.0)

    def stop(*_: Any) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, stop)
    threading.Timer(1.5, os.kill, [os.getpid(), signal.SIGTERM]).start()
    started = time.monotonic()
    try:
        with pytest.raises(SystemExit):
            supervise(["sleep", "60"], watch, tmp_path / "log")
        assert (tmp_path / "asked").exists(), "for ranks on other machines"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert rank.wait(timeout=5) == -signal.SIGKILL, "it ignores SIGTERM, so it was given a second and killed"
    assert 2 < time.monotonic() - started < 15
    rank.stdout.close()


def test_a_second_signal_ends_ranks_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of Ray, that is: other launchers have ranks that look for the program."""
    rank = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE)
    assert rank.stdout is not None
    rank.stdout.readline()

    def first(*_: Any) -> None:
        raise KeyboardInterrupt

    def second(process: subprocess.Popen[bytes], *_: Any) -> None:
        process.kill()
        process.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "end", second)
    watch = Watch(lambda: [pack(Beat(rank.pid, 1, Phase.STEP))], 600)
    with pytest.raises(KeyboardInterrupt):
        supervise(["sleep", "60"], watch, tmp_path / "log", first)
    assert rank.wait(timeout=5) == -signal.SIGKILL
    rank.stdout.close()


def test_where_ranks_meet() -> None:
    with launch.meeting(choice("ddp")) as place:
        assert (place.host, place.variables) == ("127.0.0.1", {})
    with launch.meeting(choice("ddp", nodes=2, rendezvous="n1:29400", node_rank=0)) as place:
        assert place.host == "n1"
        assert place.port != 29400
    with launch.meeting(choice("ddp", launcher="mpirun")) as place:
        assert isinstance(place, Meeting)
        assert launch.TCPStore(place.host, place.port, is_master=False, wait_for_workers=False).num_keys() >= 0


@pytest.mark.parametrize(("name", "reads"), [("single", "LightningEnvironment"), ("ddp", "TorchElasticEnvironment")])
def test_a_process_inside_a_job_of_slurm_reads_its_place_from_what_started_it(
    name: str, reads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("SLURM_NTASKS", "SLURM_JOB_ID"):
        monkeypatch.setenv(variable, "2")
    assert type(choice(name).environment()).__name__ == reads


@pytest.mark.parametrize(("cores", "threads"), [(6, "3"), (1, "1")])
def test_ranks_share_the_cores_that_the_program_may_use(
    cores: int, threads: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container, or a job of a scheduler, these are fewer than the machine has."""
    given: dict[str, str] = {}

    def supervise(command: list[str], variables: dict[str, str], *_: Any) -> tuple[int, None]:
        given.update(variables)
        return 0, None

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(launch, "supervise", supervise)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config = compose(["parallelism=ddp", "parallelism.devices=2", "device=cpu"])
    launch.Ranks(config, stages_of(config)[0], tmp_path, range(2)).run(Meeting("127.0.0.1", 1), False, lambda: None)
    assert given["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize(
    ("said", "kind", "told"),
    [
        ("rank 1: ConfigError: a=1: wrong\nb=2: wrong too", ConfigError, "a=1: wrong\nb=2: wrong too"),
        ("rank 1: RuntimeError: lost", LeanfitError, "stage 'train' on 2 devices: rank 1: RuntimeError: lost"),
    ],
)
def test_a_mistake_in_the_config_that_a_rank_finds_is_one_as_on_a_single_device(
    said: str, kind: type[LeanfitError], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose(["parallelism=ddp", "parallelism.devices=2", "device=cpu"])
    stage = stages_of(config)[0]
    why, figures = str(launch.error_file(tmp_path, stage)), str(launch.figures_file(tmp_path, stage))
    both = f"Path({why!r}).write_text({said!r}); Path({figures!r}).write_text('{{}}')"  # rank 0 was done
    rank = f"import sys; from pathlib import Path; {both}; sys.exit(1)"
    monkeypatch.setattr(type(config.parallelism), "command", lambda *_: [sys.executable, "-c", rank])
    with pytest.raises(kind) as caught:
        launch.launch(config, stage, tmp_path, resume=False)
    assert type(caught.value) is kind
    assert str(caught.value) == told
    assert [file.name for file in tmp_path.iterdir()] == ["run.log"], "left in the run's directory"


@pytest.mark.parametrize(("compression", "resume"), [("powersgd", True), ("powersgd", False), ("none", True)])
def test_a_resumed_fit_says_what_powersgd_lost(
    compression: str, resume: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose(["parallelism=ddp", "parallelism.devices=2", f"parallelism.gradient_compression={compression}"])
    told: list[str] = []
    run: Any = SimpleNamespace(
        config=replace(config, resume=resume), directory=tmp_path, nodes=None, progress=SimpleNamespace(say=told.append)
    )
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    monkeypatch.setattr(walk, "launch", lambda *_, **__: None)
    monkeypatch.setattr(walk, "load_checkpoint", lambda *_: None)
    walk.run_fit(run, stages_of(config)[0], None, None)  # type: ignore[arg-type]
    assert told == (
        ["what powersgd left out of gradients is in no checkpoint: 10 steps with whole ones come first"]
        if compression == "powersgd" and resume
        else []
    )
