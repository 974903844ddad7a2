"""N:M, as users write it: of each M consecutive inputs of a layer N are kept. Imports no torch."""

from __future__ import annotations

import re


def parse_pattern(pattern: str) -> tuple[int, int]:
    """'2:4' -> (2, 4): keep 2 of each 4.

    Raises:
        ValueError: it is not N:M, or prunes nothing.
    """
    found = re.fullmatch(r"([1-9]\d?):([1-9]\d?)", pattern)
    if not found:
        raise ValueError(f"pattern={pattern} must be N:M such as 2:4")
    keep, block = int(found[1]), int(found[2])
    if keep >= block:
        raise ValueError(f"pattern={pattern} prunes nothing: N:M keeps N of each M, as 2:4 does")
    return keep, block
