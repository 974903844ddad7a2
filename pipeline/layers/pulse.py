"""What long loops say: that they go on, so that what records their events can add them up meanwhile; and that their
turns are alike, so that what only plans them can leave most of them out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Turn = TypeVar("Turn")

listeners: list[Callable[[], None]] = []
"""Called at each `pulse`; a measurement enters itself while it runs."""
PLANNED = 2
"""Turns of a loop that are planned: the first makes what the loop keeps, the second finds it there."""

_planned = False


def pulse() -> None:
    """Say that a loop goes on: about every thousand operators, in whichever thread."""
    for listener in tuple(listeners):
        listener()


def alike(turns: Iterable[Turn]) -> Iterable[Turn]:
    """`turns` of a loop that each hold the same memory, but for the first; within `planned` a few of them.

    A list may be changed meanwhile, and what is taken out of it goes.
    """
    return itertools.islice(turns, PLANNED) if _planned else turns


@contextmanager
def planned() -> Iterator[None]:
    """Within the context nothing is computed, and loops whose turns are `alike` end early."""
    global _planned
    before, _planned = _planned, True
    try:
        yield
    finally:
        _planned = before
