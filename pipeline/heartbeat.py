"""Notices a rank of a distributed fit that hangs: ranks count what they do, the process that started them looks.

Before a collective that a rank does not come to, all others wait without end, so that no rank counts on. The one that
hangs is then behind the others: they have done all that comes before the collective. Each rank writes its counts into a
file of its own, a few bytes in place, so that looking needs no collective either.
"""

from __future__ import annotations

import os
import signal
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback

from pipeline.interrupts import beside_parent

_FORMAT = "qqq"
STEP = 4
"""Beats of a step."""
STOPPED = 10.0
"""Seconds that the system may say of a rank that a signal has stopped it."""
PATIENCE = 20
"""How many times the longest pause of its kind so far a rank may be behind, and at least as many seconds as `GRACE`."""


class Phase(IntEnum):
    """What a rank does until it counts on."""

    IDLE = 0  # not yet, or no more, in the training loop
    STEP = 1
    BETWEEN = 2  # the next batch is loaded
    SAVE = 3
    VALIDATE = 4


GRACE = {Phase.STEP: 20.0, Phase.BETWEEN: 60.0, Phase.SAVE: 60.0, Phase.VALIDATE: 60.0}
"""Seconds. A step is over within 30; what reads and writes files may stall for a while on a busy network."""


class Beat(NamedTuple):
    """`process`: its id on this machine, 0 for one elsewhere. `done`: how many parts of steps it has behind it."""

    process: int
    done: int
    phase: Phase


class Beats(Callback):
    """In a rank: counts the parts of each step into `path`. To be the first callback."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        # Elsewhere the number would be some other process's.
        self.process = os.getpid() if beside_parent() else 0
        self._file: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._beat(Phase.IDLE)

    def _beat(self, phase: Phase) -> None:
        self.count += 1
        if self._file is not None:
            os.pwrite(self._file, pack(Beat(self.process, self.count, phase)), 0)

    def on_train_start(self, *_: Any) -> None:
        self._beat(Phase.BETWEEN)

    def on_train_batch_start(self, *_: Any) -> None:
        self._beat(Phase.STEP)

    def on_before_backward(self, *_: Any) -> None:
        self._beat(Phase.STEP)

    def on_after_backward(self, *_: Any) -> None:
        self._beat(Phase.STEP)

    def on_train_batch_end(self, *_: Any) -> None:
        self._beat(Phase.BETWEEN)

    def on_save_checkpoint(self, *_: Any) -> None:
        self._beat(Phase.SAVE)

    def on_validation_start(self, *_: Any) -> None:
        self._beat(Phase.VALIDATE)

    def on_validation_batch_end(self, *_: Any) -> None:
        self._beat(Phase.VALIDATE)

    def on_validation_end(self, *_: Any) -> None:
        self._beat(Phase.BETWEEN)

    def on_train_end(self, *_: Any) -> None:
        self._beat(Phase.IDLE)

    def on_exception(self, *_: Any) -> None:
        self._beat(Phase.IDLE)


class Watch:
    """In the process that started the ranks: whether one of them hangs. `read` gives what each has written, if it has.

    `timeout`: seconds without a count of any rank. A rank that is behind the others is given less: 20 times the longest
    pause of that kind that was seen, 20 seconds at least in a step and 60 elsewhere. One that does not come up while
    another has is given 20 times what that one took, 60 seconds at least. A rank that is not in its training loop is
    not looked at otherwise, but for one that a signal has stopped, as what started it may be.
    """

    def __init__(self, read: Callable[[], Sequence[bytes | None]], timeout: float) -> None:
        self.read, self.timeout = read, timeout
        self.launcher = 0
        """The process that started those of this machine; 0: not yet."""
        self.longest: dict[Phase, float] = {}
        self._beats: dict[int, Beat] = {}
        self._changed: dict[int, float] = {}
        self._stopped: dict[str, float] = {}
        self._begun: float | None = None
        self._up: float | None = None
        """When the first rank was seen."""
        self._came: set[int] = set()
        self._absent: list[int] = []

    def hung(self, now: float | None = None) -> str | None:
        """Which rank hangs, in words; None where none does. To be asked again and again, at times `now` (seconds)."""
        now = time.monotonic() if now is None else now
        self._begun = now if self._begun is None else self._begun
        written_by = self.read()
        for rank, written in enumerate(written_by):
            if (beat := unpack(written)) is None:
                self._beats.pop(rank, None)
            elif beat != (before := self._beats.get(rank)):
                if before is not None:
                    self._learn(before, beat, now - self._changed[rank])
                self._beats[rank], self._changed[rank] = beat, now
        self._came |= self._beats.keys()
        self._absent = [rank for rank in range(len(written_by)) if rank not in self._came]
        return self._stopped_process(now) or self._absent_rank(now) or self._silent_rank(now)

    def _learn(self, before: Beat, after: Beat, pause: float) -> None:
        """Take note of a pause; where a whole step passed in it, of what belongs to one, too."""
        whole = after.done - before.done >= STEP
        for phase in {before.phase, *((Phase.STEP, Phase.BETWEEN) if whole else ())}:
            self.longest[phase] = max(self.longest.get(phase, 0.0), pause)

    def _absent_rank(self, now: float) -> str | None:
        """Of ranks that have never counted: the others wait for them where all meet, and do not count on either."""
        if self._begun is None or not self._came:
            return None
        self._up = now if self._up is None else self._up
        limit = min(self.timeout, max(GRACE[Phase.BETWEEN], PATIENCE * (self._up - self._begun)))
        if not self._absent or (waited := now - self._up) < limit:
            return None
        who = f"rank{'s' if len(self._absent) > 1 else ''} {', '.join(map(str, self._absent))}"
        return f"{who} did not come up, {waited:.0f} s after the first (trainer.rank_timeout={self.timeout:g})"

    def _silent_rank(self, now: float) -> str | None:
        beats = {rank: beat for rank, beat in self._beats.items() if beat.phase is not Phase.IDLE}
        if not beats:
            return None
        least = min(beat.done for beat in beats.values())
        behind = [rank for rank, beat in beats.items() if beat.done == least]
        phases = {beats[rank].phase for rank in behind}
        limit = self.timeout
        if (apart := len(behind) < len(beats)) and phases <= self.longest.keys():
            limit = min(limit, *(max(GRACE[phase], PATIENCE * self.longest[phase]) for phase in phases))
        silent = now - max(self._changed[rank] for rank in beats)
        if silent < limit:
            return None
        who = f"rank{'s' if len(behind) > 1 else ''} {', '.join(map(str, behind))}" if apart else "a rank"
        return f"{who} hung: no step for {silent:.0f} s (trainer.rank_timeout={self.timeout:g})"

    def _stopped_process(self, now: float) -> str | None:
        processes = {f"rank {rank}": beat.process for rank, beat in self._beats.items()}
        for name, process in {**processes, "what started the ranks": self.launcher}.items():
            if not is_stopped(process):
                self._stopped.pop(name, None)
            elif now - self._stopped.setdefault(name, now) >= STOPPED:
                return f"{name} hung: a signal has stopped it, {now - self._stopped[name]:.0f} s ago"
        return None

    def signal(self, number: int) -> None:
        """Send a signal to the ranks of this machine."""
        for beat in self._beats.values():
            if beat.process:
                with suppress(ProcessLookupError):
                    os.kill(beat.process, number)

    def kill(self) -> None:
        """End the ranks at once: one that hangs, or waits for it, answers no other signal."""
        self.signal(signal.SIGKILL)
        if self._absent:  # a rank that never counted has not said its number either
            for process in children(self.launcher):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)


def pack(beat: Beat) -> bytes:
    return struct.pack(_FORMAT, *beat)


def unpack(written: bytes | None) -> Beat | None:
    """What a rank wrote; None where that is nothing, or not all of it yet."""
    if written is None or len(written) != struct.calcsize(_FORMAT):
        return None
    process, count, phase = struct.unpack(_FORMAT, written)
    return Beat(process, count, Phase(phase))


def read_files(paths: Sequence[Path]) -> list[bytes | None]:
    """What the ranks of this machine wrote."""
    return [path.read_bytes() if path.exists() else None for path in paths]


def children(process: int) -> list[int]:
    """Processes that this one has started and that are there; none where the system does not tell (no /proc)."""
    found: list[int] = []
    for thread in Path(f"/proc/{process}/task").glob("*/children") if process else ():
        with suppress(OSError):
            found += map(int, thread.read_text(encoding="utf-8").split())
    return found


def is_stopped(process: int) -> bool:
    """Whether the system holds a process because of SIGSTOP or the like. False where it does not tell (no /proc)."""
    return state(process) == "T"


def state(process: int) -> str:
    """The letter by which the system tells what a process does; none where it is not there, or there is no /proc."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace") if process else ""
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[0] if stat else ""
