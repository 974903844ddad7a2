"""What holds for every test: the program's own process settings, programs without their imports, no log left open."""

import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from unittest import mock

import pytest

from pipeline import environment

if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: threads of their own would fight for them
    os.environ.setdefault("OMP_NUM_THREADS", "1")
environment.prepare()  # as the line above, it is read when torch is imported: by all that follows

from pipeline.report import markdown  # noqa: E402
from pipeline.tasks import causal_lm, image_classification  # noqa: E402
from tests import forks  # noqa: E402


@pytest.fixture(autouse=True)
def _run_log_closed() -> Iterator[None]:
    """A program that ran inside a test leaves its log open on the root logger. A closed handler that stays there, or is
    put back, opens its file again with the next record, and nobody closes that."""
    yield
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if type(handler) is logging.FileHandler]:
        root.removeHandler(handler)
        handler.close()


@pytest.fixture(autouse=True, scope="session")
def _own_calibration(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests measure is kept apart from what the user's own runs did."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="session")
def _what_was_imported_is_no_garbage() -> None:
    """Each run, fit and trace collects garbage: a third of a second, most of it to look at what imports have made."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _few_rounds_of_speed() -> None:
    """Runs inside tests measure speed in as many rounds as the task needs at least: what it is matters to none."""
    for task in (causal_lm, image_classification):
        task.SPEED_SECONDS = 0.0


@pytest.fixture(autouse=True, scope="session")
def drawing() -> Iterator[Callable[[], AbstractContextManager[object]]]:
    """Runs inside tests draw plots, half a second each, within `with drawing():` alone. Others would not see one that
    could not be drawn either: it is a line in the report."""
    plots = markdown._plots
    with mock.patch.object(markdown, "_plots", return_value=()):
        yield lambda: mock.patch.object(markdown, "_plots", plots)


@pytest.fixture(autouse=True, scope="session")
def _real_interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Programs of the project come without the seconds that imports take."""
    real, base = sys.executable, tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one for all workers, as long as what started them lives
        sys.executable = str(forks.interpreter(base.parent / "forks", os.getppid()))
    else:
        sys.executable = str(forks.interpreter(base / "forks", os.getpid()))
    yield real
    sys.executable = real


@pytest.fixture(autouse=True)
def _started(request: pytest.FixtureRequest, _real_interpreter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of tests marked `started` are started."""
    if request.node.get_closest_marker("started") is not None:
        monkeypatch.setattr(sys, "executable", _real_interpreter)
