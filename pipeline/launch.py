"""How the ranks of a distributed fit are started and watched: `parallelism.command` on `pipeline.worker`.

The command line is never replayed in the ranks: under `-m` that would rerun the whole sweep in each of them.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from pipeline import environment
from pipeline.chain import Stage
from pipeline.device.cpu import cores
from pipeline.device.system_memory import oom_kills, suspicion
from pipeline.errors import ConfigError, LeanfitError
from pipeline.fitting import Fitted
from pipeline.heartbeat import Watch, read_files
from pipeline.interrupts import PARENT, ended_with_parent, parent
from pipeline.nodes import Call, Follower, Leader, address
from pipeline.parallelism.base import Meeting, Parallelism
from pipeline.preemption import stop_file
from pipeline.schema import RunConfig

HANDED_ON = ("OMP_NUM_THREADS", *environment.WAITING, *environment.FOLDERS, "PYTHONPATH", PARENT)
"""Variables that a rank on another machine must be given."""
POLL = 0.5
"""Seconds between two looks at the ranks."""
GRACE = 13.0
"""Seconds for ranks that are told to stop, to end their step and save it."""


def figures_file(run_dir: Path, stage: Stage) -> Path:
    """Where rank 0 leaves what the fit did."""
    return run_dir / f".fitted-{stage.directory}.json"


def error_file(run_dir: Path, stage: Stage) -> Path:
    """Where the first rank that fails says why."""
    return run_dir / f".failed-{stage.directory}.txt"


def beat_file(run_dir: Path, stage: Stage, rank: int) -> Path:
    """Where a rank counts its steps."""
    return run_dir / f".beats-{stage.directory}-{rank}"


def launch(config: RunConfig, stage: Stage, run_dir: Path, *, resume: bool, nodes: Leader | None = None) -> Fitted:
    """Fit `stage` on all devices of all nodes and wait.

    Raises:
        ConfigError: what only the model itself shows was found on a rank.
        LeanfitError: a rank, or a node, failed.
    """
    parallelism = config.parallelism
    figures, failure = figures_file(run_dir, stage), error_file(run_dir, stage)
    for leftover in (figures, failure):
        leftover.unlink(missing_ok=True)
    here = range(parallelism.devices if nodes else parallelism.ranks)
    try:
        with meeting(parallelism) as place:
            if nodes is not None:
                nodes.begin(stage.name, resume, place)
            ranks = Ranks(config, stage, run_dir, here, nodes.beats if nodes else list)
            code, ended = ranks.run(place, resume, nodes.trouble if nodes else lambda: None)
        if code or not figures.is_file():
            why = ended or ranks.killed() or (nodes.last_words() if nodes else None)
            if nodes is not None:
                nodes.stop()
            said = failure.read_text(encoding="utf-8") if failure.is_file() else None
            if not why and said and (wrong := re.fullmatch(r"rank \d+: ConfigError: (.+)", said, re.DOTALL)):
                raise ConfigError(wrong[1].splitlines())  # as on one device, where it is found by this process
            why = why or said or f"the ranks ended with exit code {code}, and did not say why"
            count = f"{parallelism.ranks} devices" + (f" of {parallelism.nodes} nodes" if parallelism.nodes > 1 else "")
            raise LeanfitError(f"stage '{stage.name}' on {count}: {why}")
        return Fitted.read(figures)
    finally:  # rank 0 may be done where another one fails
        for leftover in (figures, failure):
            leftover.unlink(missing_ok=True)


def follow(config: RunConfig, stages: list[Stage], follower: Follower) -> tuple[int, str]:
    """On another node than the first: start the ranks of each fit that node 0 begins, until it ends: how it did.

    Raises:
        LeanfitError: node 0 is gone.
    """
    while (end := follower.ended()) is None and (place := follower.board.get("place")) is None:
        time.sleep(POLL / 2)
    if end is not None:
        return end
    follower.look(place)
    while (end := follower.ended()) is None:
        if (call := follower.called()) is not None:
            stage = next(stage for stage in stages if stage.name == call.stage)
            serve(config, stage, Path(place["directory"]), call, follower)
        time.sleep(POLL / 2)
    return end


def serve(config: RunConfig, stage: Stage, run_dir: Path, call: Call, follower: Follower) -> None:
    """This node's part of a fit."""
    devices = config.parallelism.devices
    first = follower.node * devices
    ranks = Ranks(config, stage, run_dir, range(first, first + devices))

    def told() -> str | None:
        return "ended by node 0" if follower.report(ranks.beats()) else None

    why: str | None = f"node {follower.node} was stopped"
    try:
        code, ended = ranks.run(Meeting(call.host, call.port), call.resume, told)
        why = ranks.killed() or ended if code else None
    except KeyboardInterrupt:
        why = "stopped by SIGINT"
        raise
    except SystemExit as error:
        why = f"stopped by {signal.Signals(int(error.code or 0) - 128).name}"
        raise
    finally:
        follower.done(why)


class Ranks:
    """The ranks of one fit that are on this machine, and in `elsewhere` what those of others count."""

    def __init__(
        self,
        config: RunConfig,
        stage: Stage,
        run_dir: Path,
        here: range,
        elsewhere: Callable[[], list[bytes | None]] = list,
    ) -> None:
        self.config, self.stage, self.run_dir, self.elsewhere = config, stage, run_dir, elsewhere
        self.files = [beat_file(run_dir, stage, rank) for rank in here]
        node = config.parallelism.own_node
        self.log = run_dir / (f"run-node{node}.log" if node else "run.log")
        self.told = ""
        self.oom_kills = oom_kills()

    def beats(self) -> list[bytes | None]:
        return read_files(self.files)

    def run(self, place: Meeting, resume: bool, told: Callable[[], str | None]) -> tuple[int, str | None]:
        """Start them and wait: (exit code, why they were ended before they did). `told`: why they should be."""
        config, parallelism = self.config, self.config.parallelism
        stop = stop_file(self.run_dir, self.stage)
        for file in (*self.files, stop):
            file.unlink(missing_ok=True)
        mode = "resume" if resume else "fresh"
        worker = [sys.executable, "-m", "pipeline.worker", str(self.run_dir), self.stage.name, mode]
        threads = max(1, cores() // parallelism.devices)
        variables = {"OMP_NUM_THREADS": str(threads), **environment.child(), PARENT: parent()}
        place = replace(place, variables={name: variables[name] for name in HANDED_ON if name in variables})
        watch = Watch(lambda: [*self.beats(), *self.elsewhere()], config.trainer.rank_timeout)
        start = self.log.stat().st_size if self.log.exists() else 0
        try:
            with self.log.open("ab") as log:
                shown = subprocess.DEVNULL if config.sweep else None
                command = parallelism.command(worker, place)
                asked = None if parallelism.passes_on else stop
                code, ended = supervise(command, variables, shown, log, watch, told, asked)
        finally:
            for file in (*self.files, stop):
                file.unlink(missing_ok=True)
            parallelism.clean(self.run_dir, watch.launcher)
        self.told = self.log.read_bytes()[start:].decode("utf-8", "replace")
        if code < 0 and ended is None:
            ended = f"what started the ranks was killed by {signal.Signals(-code).name}"
        return code, ended

    def killed(self) -> str | None:
        return killed(self.told, suspicion(self.oom_kills))


def supervise(
    command: list[str],
    variables: dict[str, str],
    shown: int | None,
    log: IO[bytes],
    watch: Watch,
    told: Callable[[], str | None],
    asked: Path | None,
) -> tuple[int, str | None]:
    """Run what starts the ranks to its end: (its exit code, why it was ended). Whatever stops this process stops them.

    Ranks are first asked: they end their step and save it. Those of this machine get a SIGTERM, those of others look
    for the file `asked`; without one, what starts them gets the SIGTERM, and passes it on. What is left of them after
    that is killed.
    """
    process = subprocess.Popen(command, env=variables, stdout=shown, stderr=log, preexec_fn=ended_with_parent())
    watch.launcher = process.pid
    clock, before = 0.0, time.monotonic()
    why = None
    try:
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=POLL)
            # Time in which this process itself was stopped (Ctrl-Z) does not count: the ranks were, too.
            now = time.monotonic()
            clock, before = clock + min(now - before, 10 * POLL), now
            if why is None and (why := watch.hung(clock) or told()):
                watch.kill()
                end(process, watch, 0)
        if process.returncode:
            watch.kill()  # a launcher that was killed itself leaves its ranks behind
        return process.returncode, why
    except BaseException:
        try:
            if asked is None:
                process.terminate()
            else:
                asked.touch()
                watch.signal(signal.SIGTERM)
            end(process, watch, GRACE)
        except BaseException:  # a second signal, for which those of Ray would train on for seconds
            watch.kill()
            raise
        raise
    finally:
        # Ray's services are in a group that what starts its ranks makes for itself, and outlive it by minutes if it was
        # killed. There is no such group where that, as torchrun, is in the group of this process.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def end(process: subprocess.Popen[bytes], watch: Watch, grace: float) -> None:
    """Wait for a launcher whose ranks are ending, then stop it, then kill it."""
    for act, seconds in ((process.poll, grace), (process.terminate, 5), (process.kill, 5)):
        act()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds)
            return
        watch.kill()


@contextlib.contextmanager
def meeting(parallelism: Parallelism) -> Iterator[Meeting]:
    """Where the ranks of a fit meet: a free port of this machine, with a store behind it where they expect one."""
    if parallelism.needs_followers:
        host, _ = address(parallelism)
    else:
        host = "127.0.0.1" if parallelism.nodes == 1 else socket.gethostname()
    if parallelism.joins_store:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        yield Meeting(host, store.port)
        del store
        return
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    yield Meeting(host, port)


def killed(told: str, suspicion: str) -> str | None:
    """Which rank a signal ended, from the launcher's report: the others only say that a connection was lost.

    `suspicion` is added to SIGKILL, which the system sends for want of memory, as others may for reasons of their own.
    """
    found = [
        *re.findall(r"rank\s*: (\d+).*?exitcode\s*: (-?\d+)", told, re.DOTALL),  # torchrun
        *re.findall(r"process rank (\d+) with PID .*? exited on\s+signal ()(\d+)", told, re.DOTALL),  # Open MPI
    ]
    # srun, until it ends the others itself; its words for a signal are those of strsignal(3).
    by_srun = re.split(r"srun: .*(?:Terminating StepId|Job step aborted)", told)[0]
    signals = {signal.strsignal(number): str(int(number)) for number in signal.Signals}
    for rank, words in re.findall(r"srun: error: \S+: tasks? (\d+)[\d,-]*: ([A-Z][A-Za-z ]*[a-z])", by_srun):
        if words == "Out Of Memory":
            return f"rank {rank} was killed by SIGKILL (out of memory)"
        if words in signals:
            found.append((rank, "", signals[words]))
    for rank, *code in found:
        number = -int(code[0]) if code[0] else int(code[1])
        if number > 0 and number != signal.SIGTERM:  # with which a launcher itself stops the ranks that are left
            name = signal.Signals(number).name
            return f"rank {rank} was killed by {name}" + (suspicion if name == "SIGKILL" else "")
    return None
