"""Sizes in bytes as people write them: 2.5MB is 2,500,000, 6GiB is 6 * 2^30. Imports nothing heavy."""

from __future__ import annotations

import re

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
Size = str | int | float
"""As it is typed. A float is none, but only `parse_size` says well why."""
FORMS = "a number of bytes, or a size such as 2.5MB or 6GiB"


def parse_size(text: Size) -> int:
    """Bytes, rounded down.

    Raises:
        ValueError: no size above zero (the message says what one looks like).
    """
    if isinstance(text, int):
        size = text
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*", str(text))
        written = (match[2] or "B").upper() if match else ""
        unit = UNITS.get(written) if isinstance(text, str) else None
        if match is None or unit is None:
            near = (
                f"; did you mean {match[1]}{match[2]}B or {match[1]}{match[2]}iB?"
                if match and f"{written}IB" in UNITS
                else ""
            )
            raise ValueError(f"{text} is no size: give {FORMS}{near}")
        size = int(float(match[1]) * unit)
    if size <= 0:
        raise ValueError(f"{text} is not above zero: give {FORMS}")
    return size
