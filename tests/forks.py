"""Programs of the project that tests start, forked from one process that has imported what takes seconds, and nothing
else: as fresh as ones that are started. Linux and macOS.

`interpreter` makes one for `sys.executable`. What it is asked for that is `known` it has forked, and stands for: it
hands on its streams, signals and exit code, and its end is the end of what was forked. All else the real interpreter
does in its place. A process that was forked looks in /proc like the one it comes from; tests that look there, and those
of what an interpreter does by itself, are marked `started`.

As a script: `serve SOCKET SESSION` is the process that forks while the process SESSION lives, `run REAL SOCKET SESSION
ARGUMENTS` what stands for one.
"""

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KNOWN = ("pipeline.worker", "pipeline.artifact.receipt", "torch.distributed.run")
"""Modules after `-m`; `run.py` and `tests/ranks.py` besides."""
IMPORTED = (
    "torch.distributed.run", "pipeline.runner", "pipeline.worker", "pipeline.artifact.store",
    "transformers.modeling_utils", "transformers.models.gpt2.modeling_gpt2", "transformers.models.opt.modeling_opt",
    "transformers.models.llama.modeling_llama",
)  # fmt: skip
SCRIPTS = (ROOT / "run.py", ROOT / "tests" / "ranks.py")
HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)


def interpreter(place: Path, session: int) -> Path:
    """In the directory `place`, which all of the test `session` (its process) share."""
    made = place / "python"
    if not made.exists():
        place.mkdir(exist_ok=True)
        command = (
            f'exec "{sys.executable}" -I -S "{__file__}" run "{sys.executable}" "{place / "socket"}" {session} "$@"'
        )
        fresh = place / f"python-{os.getpid()}"
        fresh.write_text(f"#!/bin/sh\n{command}\n")
        fresh.chmod(0o755)
        fresh.replace(made)
    return made


# What stands for a process.


def known(arguments: list[str]) -> bool:
    """Whether these arguments of an interpreter are those of a program of the project."""
    match [word for word in arguments if word != "-u"]:
        case ["-m", module, *_]:
            return module in KNOWN
        case [script, *_]:
            return Path(script).resolve() in SCRIPTS
    return False


def stand_for(real: str, place: str, session: str, arguments: list[str]) -> None:
    """Have `arguments` run, and end as they do."""
    if not known(arguments):
        os.execv(real, [real, *arguments])
    server = connected(real, place, session)
    interpreter = str(Path(place).with_name("python"))
    asked = {"arguments": arguments, "environment": dict(os.environ), "cwd": os.getcwd(), "interpreter": interpreter}
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_ON)
    socket.send_fds(server, [len(message := json.dumps(asked).encode()).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(message)
    answers = server.makefile("rb")
    process = int(answers.readline())

    def hand_on(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)

    for number in HANDED_ON:
        signal.signal(number, hand_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)
    status = int(answers.readline() or 9)
    if os.WIFSIGNALED(status):
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


def connected(real: str, place: str, session: str) -> socket.socket:
    """A line to the process that forks, which the first that wants one starts."""
    line, server = socket.socket(socket.AF_UNIX), None
    with open(f"{place}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        while True:
            with contextlib.suppress(OSError):
                line.connect(place)
                return line
            if server is None:
                import subprocess

                variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
                nowhere = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
                command = [real, __file__, "serve", place, session]
                server = subprocess.Popen(command, env=variables, start_new_session=True, cwd=ROOT, **nowhere)
            if server.poll() is not None:
                sys.exit(f"what forks ended with {server.returncode}")
            time.sleep(0.05)


# The process that forks.


def serve(place: str, session: int) -> None:
    """Imports, then a fork for each that asks."""
    import gc
    import importlib

    from pipeline import environment

    environment.prepare()
    import transformers

    from pipeline.artifact import receipt
    from pipeline.interrupts import lives

    for module in IMPORTED:
        importlib.import_module(module)
    for auto in receipt.AUTO_CLASSES.values():
        getattr(transformers, auto)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that keep
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(place)
        listening.listen(64)
        while lives(session):
            if not select.select([listening], [], [], 1)[0]:
                continue
            line, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                keep(line)
            line.close()
    os._exit(0)  # without the seconds that it takes to take everything down


def keep(line: socket.socket) -> None:
    """Fork what is asked for, say how it ended, and end it where nobody wants to know any more."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, _, _ = socket.recv_fds(line, 8, 3)
    message = b""
    while len(message) < int.from_bytes(size, "big"):
        message += line.recv(1 << 20)
    if (process := os.fork()) == 0:
        line.close()
        be(json.loads(message), streams)
    for stream in streams:
        os.close(stream)
    line.sendall(f"{process}\n".encode())
    while True:
        if select.select([line], [], [], 0.01)[0]:  # it is gone
            os.kill(process, signal.SIGKILL)
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            with contextlib.suppress(OSError):
                line.sendall(f"{status}\n".encode())
            os._exit(0)


def be(asked: dict, streams: list[int]) -> None:
    """A whole program."""
    import atexit
    import random
    import runpy
    import threading
    import traceback

    import torch

    from pipeline.device.cpu import cores
    from pipeline.interrupts import ended_with_parent

    code = 1
    try:
        if bound := ended_with_parent(signal.SIGKILL):
            bound()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.chdir(asked["cwd"])
        sys.executable = asked["interpreter"]
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or cores()))
        random.seed()
        for name in reversed(os.environ.get("PYTHONPATH", "").split(os.pathsep)):
            if name and name not in sys.path:
                sys.path.insert(0, name)
        arguments = [word for word in asked["arguments"] if word != "-u"]
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            sys.modules.pop(arguments[1], None)
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
            runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code & 0xFF)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        stand_for(*sys.argv[2:5], sys.argv[5:])
