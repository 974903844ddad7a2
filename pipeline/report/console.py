"""The one rich console of the program: progress, tables and last lines share it, so that they never overwrite each other."""

from __future__ import annotations

from functools import cache
from typing import Literal

from rich.console import Console

Mode = Literal["live", "lines", "silent"]
MAXIMUM_WIDTH = 100


@cache
def console() -> Console:
    """Standard output, at most 100 columns; exactly 100 where it is a file or a pipe, so that logs do not depend on luck."""
    plain = Console(highlight=False)
    width = min(plain.width, MAXIMUM_WIDTH) if plain.is_terminal else MAXIMUM_WIDTH
    return Console(highlight=False, width=width)


def mode(target: Console, sweep: bool = False) -> Mode:
    """How progress shows on `target`: a live bar on a terminal, plain lines elsewhere, nothing within a sweep.

    A forced terminal (FORCE_COLOR) that is really a pipe gets lines: a moving bar needs a screen.
    """
    if sweep:
        return "silent"
    try:
        screen = target.file.isatty()
    except (AttributeError, ValueError):
        screen = False
    return "live" if screen and target.is_interactive else "lines"
