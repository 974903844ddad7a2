"""What ends a process from outside: signals while the program's imports go on, and the end of its parents.

Ctrl-C and SIGTERM while imports go on: one line and 128 + the signal, no traceback. `app.main` puts handlers of its own
in place of these. To be imported, and used, before anything heavy.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

PROGRAM = "leanfit"
"""The console script, whose first import of ours is `pipeline.app`; `run.py` calls `install` itself."""
PARENT = "LEANFIT_PARENT"
"""Environment variable: host and process id of the program whose ranks these are."""
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when its parent is gone."""


def install() -> None:
    """End the process at once at either signal: nothing was begun that would have to be put away."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


def parent() -> str:
    """This process, as ranks that it starts are to know it."""
    return f"{socket.gethostname()} {os.getpid()}"


def beside_parent() -> bool:
    """In a rank: whether it runs on the machine of the program that started the fit. True where none did."""
    host, _, _ = os.environ.get(PARENT, parent()).rpartition(" ")
    return host == socket.gethostname()


def watch_parent() -> None:
    """In a rank: end when the program that started the fit, or the launcher between, is gone, however it ended."""
    host, _, program = os.environ[PARENT].rpartition(" ")
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher and (host != socket.gethostname() or lives(int(program))):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def ended_with_parent(by: int = signal.SIGTERM) -> Callable[[], None] | None:
    """What a child calls first, so that the system stops it when this process is gone: Linux only. Ranks look for
    themselves; mpirun was seen to stay after all of them had ended."""
    if sys.platform != "linux":
        return None
    import ctypes  # only where something is started

    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(PR_SET_PDEATHSIG, by)


def lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


if os.path.basename(sys.argv[0] if sys.argv else "") == PROGRAM:
    install()
