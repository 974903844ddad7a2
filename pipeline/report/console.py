"""The one rich console of the program: progress, tables and last lines share it, and never overwrite each other."""

from __future__ import annotations

from functools import cache
from typing import Literal

from rich.console import Console

Mode = Literal["live", "lines", "silent"]
MAXIMUM_WIDTH = 100


@cache
def console() -> Console:
    """Standard output in at most 100 columns; exactly 100 in a file or a pipe, whatever the terminal behind it."""
    terminal = Console()
    width = min(terminal.width, MAXIMUM_WIDTH) if terminal.is_terminal else MAXIMUM_WIDTH
    # A path or an override may hold brackets or colons: text is shown as it is, never read as markup.
    return Console(width=width, highlight=False, markup=False, emoji=False)


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
