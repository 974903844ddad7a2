"""What holds for every test: the program's own process settings, and a cache that tests share."""

import os

from pipeline import environment

if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: threads of their own would fight for them
    os.environ.setdefault("OMP_NUM_THREADS", "1")
environment.prepare()
