"""Ctrl-C and SIGTERM while the program's imports go on: one line and 128 + the signal, no traceback.

`app.main` puts handlers of its own in place of these. To be imported, and used, before anything heavy.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

PROGRAM = "leanfit"
"""The console script, whose first import of ours is `pipeline.app`; `run.py` calls `install` itself."""


def install() -> None:
    """End the process at once at either signal: nothing was begun that would have to be put away."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


if os.path.basename(sys.argv[0] if sys.argv else "") == PROGRAM:
    install()
