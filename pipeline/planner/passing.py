"""What anybody's model asks of values, answered where there are none, so that it passes through on fake tensors.

    a check                   passed: what must not be is asked of any value (`(var < 0).any()`) or of one number
                              (`labels.max() >= classes`), and is not; what must be is asked of all, and is
    what a mask chooses       all of it: no more can be held than for that
    a bias                    a linear layer adds it in place, as it does but for tensors of a subclass, which those
                              of a vmap are too (aten/src/ATen/native/Linear.cpp)
    an attention mask         transformers makes one of its own where that of the batch hides something, else none

Methods of compression are asked in a way of their own (`supposed`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.planner.live import ADD, ADD_IN_PLACE, Inner, Live, storage_key

aten = torch.ops.aten
FEARED = frozenset(f"aten::{name}" for name in ("any", "eq", "ne", "lt", "le", "gt", "ge"))
"""Operators by which checks ask whether something is that must not be."""


class Passing(Live):  # type: ignore[no-untyped-call]
    """Counts as `Live` does."""

    def __init__(self, inner: Inner | None = None) -> None:
        super().__init__(inner)
        self._feared: set[int] = set()
        self._in_linear = False

    @contextmanager
    def adding_bias(self) -> Iterator[None]:
        """Meanwhile a linear layer adds its bias in place."""
        plain = functional.linear

        def linear(*args: Any, **kwargs: Any) -> Tensor:
            before, self._in_linear = self._in_linear, torch._C._functorch.peek_interpreter_stack() is None
            try:
                return plain(*args, **kwargs)
            finally:
                self._in_linear = before

        with mock.patch.object(functional, "linear", linear):
            yield

    def _release(self, key: int) -> None:
        self._feared.discard(key)
        super()._release(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._in_linear and func is ADD:
            return super().__torch_dispatch__(ADD_IN_PLACE, types, args, kwargs).view_as(args[0])
        if func is aten.nonzero.default:
            func, args, kwargs = aten.empty.memory_format, ([args[0].numel(), args[0].ndim],), {"dtype": torch.int64}
        elif func is aten.equal.default and args[0].dtype == torch.bool and not args[0].ndim:  # `cov`: is it true?
            return self.truth(args[0])
        elif func is aten.masked_select.default:
            chosen = math.prod(torch.broadcast_shapes(args[0].shape, args[1].shape))  # type: ignore[no-untyped-call]
            func, args, kwargs = aten.new_empty.default, (args[0], [chosen]), {}
        elif func is aten.index.Tensor and any(_is_mask(index) for index in args[1]):
            with self:
                return args[0][tuple(slice(None) if i is None else i for i in _by_number(args[1]))]
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.name().partition(".")[0] in FEARED and out.numel() == 1:
            self._feared.add(storage_key(out))
        return out

    def truth(self, scalar: Tensor) -> bool:
        return storage_key(scalar) not in self._feared and super().truth(scalar)


@contextmanager
def padded(hides: bool) -> Iterator[None]:
    """Meanwhile transformers finds that attention masks hide something, or nothing."""
    from transformers import masking_utils

    ignored = masking_utils._ignore_bidirectional_mask_sdpa

    def ignore(padding_mask: Tensor | None, *args: Any) -> bool:
        return ignored(padding_mask, *args) and not (hides and padding_mask is not None)

    def shows_all(mask: Tensor) -> bool:
        return not hides or not mask.numel()

    with (
        mock.patch.object(masking_utils, "_ignore_bidirectional_mask_sdpa", ignore),
        mock.patch.object(masking_utils, "fast_all", shows_all, create=True),
    ):
        yield


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _by_number(indices: Any) -> Iterator[Tensor | None]:
    """Indices by number for those by masks, each of which chooses all."""
    for index in indices:
        if _is_mask(index):
            yield from index.nonzero().unbind(1)
        else:
            yield index
