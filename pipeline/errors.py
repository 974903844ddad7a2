"""The errors a user meets. Each message names the key, the value and the fix; `exit_code` is what the program returns.

0 done · 1 failed while running · 2 bad config · 3 a receipt, gate or verification not met.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence


class LeanfitError(Exception):
    """Root of every error this package raises on purpose."""

    exit_code = 1


class ConfigError(LeanfitError):
    """A config that cannot run: every problem found, one line each."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ArtifactError(LeanfitError):
    """An artifact that is truncated, altered, or of a schema this version does not know."""


class ReceiptError(LeanfitError):
    """A receipt, a gate or `job=verify` that was not met."""

    exit_code = 3


def first_line(error: BaseException, width: int = 150) -> str:
    """`RuntimeError: what it says first`, the message cut at `width`."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:width]}"


ALSO_CALLED = {
    "gpu": ("cuda",),
    "fp16": ("float16", "16-mixed"),
    "fp16-mixed": ("16-mixed",),
    "float16": ("16-mixed",),
    "half": ("float16", "16-mixed"),
    "bf16": ("bfloat16", "bf16-mixed"),
    "bfloat16": ("bf16-mixed",),
    "fp32": ("float32", "32-true"),
    "float32": ("32-true",),
    "fp64": ("float64", "64-true"),
    "float64": ("64-true",),
    "double": ("float64", "64-true"),
    "zero": ("deepspeed",),
    "true": ("full",),
    "false": ("none",),
}
"""What others call our choices, where the spelling is nearer to another one or to none."""


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """`"; did you mean 'int8'?"` for the nearest allowed word, capitals aside; an empty string when none is near."""
    spelt = {one.lower(): one for one in allowed}
    near = [name for name in ALSO_CALLED.get(word.lower(), ()) if name in spelt]
    near = near or difflib.get_close_matches(word.lower(), spelt, n=1, cutoff=0.5)
    return f"; did you mean '{spelt[near[0]]}'?" if near else ""


OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|out of memory|not enough memory|can(.t|not) allocate memory"
    r"|could not create a primitive",  # what oneDNN makes of it
    re.I,
)


def exhausted(error: BaseException) -> bool:
    """Whether memory ran out: here, or in a rank whose error is handed on as text."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return not kinds.isdisjoint({"OutOfMemoryError", "MemoryError"}) or OUT_OF_MEMORY.search(str(error)) is not None
