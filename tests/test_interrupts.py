"""A signal that comes while the program is still being imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.started
ROOT = Path(__file__).resolve().parent.parent
SLOW = """
import os, signal, sys
from importlib.abc import MetaPathFinder

class Signal(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "hydra":
            os.kill(os.getpid(), getattr(signal, os.environ["SENT"]))

sys.meta_path.insert(0, Signal())
"""
"""A site customization that sends a signal as the first heavy import begins."""
SCRIPT = "import sys\nfrom pipeline.app import main\nsys.exit(main())\n"
"""What an installer makes of the entry point in pyproject.toml."""


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("program", ["run.py", "leanfit"])
def test_a_signal_during_the_imports_is_one_line(tmp_path: Path, program: str, sent: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    (tmp_path / "leanfit").write_text(SCRIPT)
    file = ROOT / "run.py" if program == "run.py" else tmp_path / "leanfit"
    done = subprocess.run(
        [sys.executable, str(file), "--cfg", "job"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "SENT": sent},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (128 + getattr(signal, sent), f"stopped by {sent}\n")
    assert done.stdout == ""


def test_a_library_that_imports_the_program_keeps_its_handlers() -> None:
    code = (
        "import signal; before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]; import pipeline.app; "
        "assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
