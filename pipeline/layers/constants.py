"""Small tensors and facts of the machine that are found once for a process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch.utils._python_dispatch import _disable_current_modes

Found = TypeVar("Found", bound=Callable[..., Any])


def constant(find: Found) -> Found:
    """`functools.cache` for a function that makes tensors: outside of any mode of torch that the first call may be in.

    What a plan asks for first, on tensors without values, is then the real thing for what is computed later. A compiler
    asks once, and takes what it is given for a constant of its program.
    """

    @functools.cache
    def once(*args: Any) -> Any:
        with _disable_current_modes():
            return find(*args)

    @functools.wraps(find)
    def found(*args: Any) -> Any:
        return once(*args)

    found.cache_clear = once.cache_clear  # type: ignore[attr-defined]
    return cast(Found, torch.compiler.assume_constant_result(found))  # type: ignore[no-untyped-call]
