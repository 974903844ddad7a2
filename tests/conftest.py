"""What holds for every test: the program's own process settings, and a cache that tests share."""

import logging
import os
from collections.abc import Iterator

import pytest

from pipeline import environment

if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: threads of their own would fight for them
    os.environ.setdefault("OMP_NUM_THREADS", "1")
environment.prepare()


@pytest.fixture(autouse=True)
def _run_log_closed() -> Iterator[None]:
    """A program that ran inside a test leaves its log open on the root logger. A closed handler that stays there, or is
    put back, opens its file again with the next record, and nobody closes that."""
    yield
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if type(handler) is logging.FileHandler]:
        root.removeHandler(handler)
        handler.close()
