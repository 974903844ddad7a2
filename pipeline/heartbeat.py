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
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

_FORMAT = "qqq"  # process, count, whether a step is under way
GRACE = 20.0
"""Seconds that a rank may be behind in the middle of a step, at least: so that all is over within 30."""
PATIENCE = 20
"""How many times the longest pause within a step so far that may be."""


class Beats(Callback):
    """In a rank: counts the parts of each step into `path`. To be the first callback."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self._file: int | None = None

    def _beat(self, *, stepping: bool) -> None:
        self.count += 1
        if self._file is not None:
            os.pwrite(self._file, struct.pack(_FORMAT, os.getpid(), self.count, stepping), 0)

    def on_train_start(self, *_: Any) -> None:
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._beat(stepping=False)

    def on_train_batch_start(self, *_: Any) -> None:
        self._beat(stepping=True)

    def on_before_backward(self, *_: Any) -> None:
        self._beat(stepping=True)

    def on_after_backward(self, *_: Any) -> None:
        self._beat(stepping=True)

    def on_train_batch_end(self, *_: Any) -> None:
        # Checkpoints, validation and the next batch come now, which may take much longer than a step.
        self._beat(stepping=False)

    def on_train_end(self, *_: Any) -> None:
        self._close()

    def on_exception(self, *_: Any) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
            self.path.unlink(missing_ok=True)


class Watch:
    """In the process that started the ranks: whether one of those whose counts are in `files` hangs.

    `timeout`: seconds without a count of any rank. A rank that is behind in the middle of a step is given less: 20
    times the longest pause within a step that was seen, 20 seconds at least. A rank that has not begun to train, or is
    done, is not looked at.
    """

    def __init__(self, files: list[Path], timeout: float) -> None:
        self.files, self.timeout = files, timeout
        self.longest = 0.0
        self._seen: dict[int, tuple[int, int, bool]] = {}
        self._changed: dict[int, float] = {}

    def hung(self, now: float | None = None) -> str | None:
        """Which rank hangs, in words; None where none does. To be asked again and again, at times `now` (seconds)."""
        now = time.monotonic() if now is None else now
        for rank, file in enumerate(self.files):
            found = _read(file)
            if found is None:
                self._seen.pop(rank, None)
            elif found != self._seen.get(rank):
                if rank in self._seen and self._seen[rank][2]:
                    self.longest = max(self.longest, now - self._changed[rank])
                self._seen[rank], self._changed[rank] = found, now
        if not self._seen:
            return None
        least = min(count for _, count, _ in self._seen.values())
        behind = [rank for rank, (_, count, _) in self._seen.items() if count == least]
        apart = len(behind) < len(self._seen)
        limit = self.timeout
        if apart and all(self._seen[rank][2] for rank in behind):
            limit = min(limit, max(GRACE, PATIENCE * self.longest))
        silent = now - max(self._changed[rank] for rank in self._seen)
        if silent < limit:
            return None
        who = f"rank{'s' if len(behind) > 1 else ''} {', '.join(map(str, behind))}" if apart else "a rank"
        return f"{who} hung: no step for {silent:.0f} s (trainer.rank_timeout={self.timeout:g})"

    def kill(self) -> None:
        """End the ranks at once: one that hangs, or waits for it, answers no other signal."""
        for process, _, _ in self._seen.values():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def _read(file: Path) -> tuple[int, int, bool] | None:
    try:
        process, count, stepping = struct.unpack(_FORMAT, file.read_bytes())
    except (OSError, struct.error):  # not there, or not written yet
        return None
    return process, count, bool(stepping)
