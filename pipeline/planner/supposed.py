"""What code asks of values, answered where there are none: so that methods run on fake tensors as they are.

A method looks at values: is a weight finite, is a trial's change small, how much has a mask pruned? `Supposing` answers
as the usual course would have it, and never by method:

    a truth                   True: weights are finite. So a check is best worded as what is true in a run that goes on;
                              but no layer is dropped by chance
    a count of truths         all of them
    an error code             0: matrices can be decomposed
    a float                   1e-5 or a little less, and each less than the one before: what is tried is an improvement
    an integer of a tensor    its place in it: indices differ and ascend; of a tensor of one element 1
    a count by bins           of as many bins as are asked for at least
    are two tensors equal?    if both are of one shape, unless one is a copy of a third

What depends on values more than so (the shape of a result) raises, and is not planned by tracing.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from pipeline.planner.live import DEVICE, FILES, HOST, Block, Inner, Live, device_of, storage_key, wraps

aten = torch.ops.aten
COPIES = frozenset({aten.clone.default, aten._to_copy.default})
COUNTS = frozenset({aten.sum.default, aten.count_nonzero.default})
SMALL = 1e-5
SHRINKS = 1e-6


class Supposing(Live):  # type: ignore[no-untyped-call]
    """Counts as `Live` does, but no storage that an operator was only given (what was there before is somebody else's,
    unless it is said by `hold`), and none in `FILES` or `HOST`."""

    def __init__(self, inner: Inner | None = None, workspace: int = 0) -> None:
        super().__init__(inner, workspace)
        self._given: set[int] = set()
        self._read = 0
        self._counted: dict[int, int] = {}
        self._codes: set[int] = set()
        self._origins: dict[int, int] = {}
        self._copies: set[int] = set()
        self._numbers = itertools.count()

    def _release(self, key: int) -> None:
        self._counted.pop(key, None)
        self._codes.discard(key)
        self._origins.pop(key, None)
        self._copies.discard(key)
        super()._release(key)

    def _note(self, tensor: Tensor, operator: str, kind: str) -> Block | None:
        key = storage_key(tensor)
        if (operator and key in self._given) or key in FILES or key in HOST:
            return None
        return super()._note(tensor, operator, kind)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if wraps(types):
            return NotImplemented
        if func is DEVICE:
            return device_of(args[0])
        if func is aten._local_scalar_dense.default:
            return self._value(args[0])
        if func is aten.equal.default:
            return self._equal(args[0], args[1])
        if func is aten.bincount.default:  # whose number of bins is a value
            least = (kwargs or {}).get("minlength", args[2] if len(args) > 2 else 0)
            func, args, kwargs = aten.zeros.default, ([least],), {"dtype": torch.int64}
        given = {storage_key(leaf) for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)}
        self._given = given
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func in COPIES:
            if args[0].dtype == out.dtype:
                # By a number, since the next storage may get the key of a source that is let go.
                self._origins[storage_key(out)] = self._origins.setdefault(storage_key(args[0]), next(self._numbers))
                self._copies.add(storage_key(out))
        elif func in COUNTS and args[0].dtype == torch.bool:
            self._counted[storage_key(out)] = args[0].numel()
        elif func.namespace == "aten" and "linalg" in func.__name__ and isinstance(out, tuple):
            self._codes |= {storage_key(part) for part in out if part.dtype == torch.int32}
        return out

    def _value(self, scalar: Tensor) -> bool | int | float:
        if scalar.dtype == torch.bool:
            return self.truth(scalar)
        if scalar.dtype.is_floating_point:
            self._read += 1
            return SMALL / (1 + SHRINKS * self._read)
        key = storage_key(scalar)
        if key in self._codes:
            return 0
        if key in self._counted:
            return self._counted[key]
        several = scalar.untyped_storage().nbytes() > scalar.itemsize
        return int(scalar.storage_offset()) if several else 1

    def _equal(self, one: Tensor, other: Tensor) -> bool:
        if one.shape != other.shape:
            return False
        first, second = storage_key(one), storage_key(other)
        if first not in self._copies and second not in self._copies:
            return True
        return self._origins.get(first) == self._origins.get(second)
