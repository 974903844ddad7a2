"""A test file run as a script by several ranks over gloo, once for all workers of pytest that want what it leaves."""

import os
import subprocess
import sys
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
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            ranks = subprocess.run(
                [*command, script, str(count), str(directory)],
                env=environment, capture_output=True, text=True, timeout=540, check=False,
            )  # fmt: skip
            said.write_text("" if ranks.returncode == 0 else ranks.stderr[-6000:] or "failed")
    assert said.read_text() == ""
    return directory
