"""Long loops say that they go on, so that what records their events can add them up meanwhile."""

from __future__ import annotations

from collections.abc import Callable

listeners: list[Callable[[], None]] = []
"""Called at each `pulse`; a measurement enters itself while it runs."""


def pulse() -> None:
    """Say that a loop goes on: about every thousand operators, in whichever thread."""
    for listener in tuple(listeners):
        listener()
