"""Sizes in bytes as people write them: 2.5MB is 2,500,000, 6GiB is 6 * 2^30. Imports nothing heavy."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
FORMS = "a number of bytes, or a size such as 2.5MB or 6GiB"


def _text_or_bytes(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)  # 2.5e6, as YAML and Hydra read it
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise PydanticCustomError("size", "no size", {"forms": FORMS})
    return value


Size = Annotated[str | int, BeforeValidator(_text_or_bytes)]
"""As it is typed; see `parse_size`."""


def parse_size(text: str | int) -> int:
    """Bytes, rounded down.

    Raises:
        ValueError: no size above zero (the message says what one looks like).
    """
    if isinstance(text, int):
        size = text
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*", text)
        unit = UNITS.get((match[2] or "B").upper()) if match else None
        if match is None or unit is None:
            cut = match is not None and f"{match[2]}IB".upper() in UNITS
            near = f"; did you mean {text.strip()}B or {text.strip()}iB?" if cut else ""
            raise ValueError(f"{text} is no size: give {FORMS}{near}")
        size = int(float(match[1]) * unit)
    if size <= 0:
        raise ValueError(f"{text} is not above zero: give {FORMS}")
    return size
