"""A test file run as a script by several ranks over gloo, once for all workers of pytest that want what it leaves.

As a script this is what starts them: `SCRIPT COUNT DIRECTORY`. Ranks are forked from it, which is forked itself from a
process that has imported what takes seconds (`tests/forks.py`), and are told who they are as torchrun tells its own.
Linux and macOS.
"""

import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parents[1]


def made_by_ranks(script, count, factory):
    """The directory that `script COUNT DIRECTORY` filled on `count` ranks; `factory` is pytest's tmp_path_factory."""
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    directory = shared / f"{Path(script).stem}-{count}"
    with FileLock(f"{directory}.lock"):
        said = directory / "said.txt"
        if not said.exists():
            directory.mkdir()
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            ranks = subprocess.run(
                [sys.executable, __file__, script, str(count), str(directory)],
                env=environment, capture_output=True, text=True, timeout=540, check=False,
            )  # fmt: skip
            said.write_text("" if ranks.returncode == 0 else ranks.stderr[-6000:] or "failed")
    assert said.read_text() == ""
    return directory


def start(script, count, directory):
    """Whether all ranks ended well; where one does not, the others are killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "tests",
    }  # fmt: skip
    running = set()
    for rank in range(count):
        if (child := os.fork()) == 0:
            be(rank, [script, str(count), directory])
        running.add(child)
    well = True
    while running:
        ended, status = os.wait()
        running.discard(ended)
        if status:
            well = False
            for other in running:
                os.kill(other, signal.SIGKILL)
    return well


def be(rank, arguments):
    """A rank's whole life."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    sys.argv = arguments
    code = 1
    try:
        runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(not start(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
