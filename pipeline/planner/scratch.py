"""What a CPU's own kernels hold inside, and what they keep, found by trying.

Attention is computed in parts, a thread's part in a buffer of its own, and in 16 bits from copies of keys and values
in tiles. Where a CPU multiplies 16-bit matrices itself (AMX, AVX512-FP16), oneDNN copies operands into the tiles that
its kernel reads; it lays out channels in blocks for convolutions, and keeps a workspace of a recurrent layer for its
backward pass. How much that takes depends on the kernel it picks, by shapes, strides, dtype and threads, and oneDNN
does not say. BLAS copies an operand that is one row for all, as the gradient of a sum is. So a plan runs such operators
for real, each kind once, where that is small enough, and looks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from pipeline.layers.constants import constant
from pipeline.memory.measure import measure_peak
from pipeline.precision import cpu_kernels

PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"})
CONVOLUTIONS = frozenset({"aten::convolution", "aten::convolution_backward"})
RECURRENT = "aten::mkldnn_rnn_layer"
ALWAYS = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
        RECURRENT,
        f"{RECURRENT}_backward",
    }
)
"""Tried in every dtype."""
TRIED = PRODUCTS | CONVOLUTIONS | ALWAYS
LARGEST = 1 << 28
"""Bytes of the operands of an operator that is tried."""


class Kind(tuple[tuple[int, ...], tuple[int, ...], torch.dtype]):
    """(shape, strides, dtype) of a tensor."""


def scratch(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bytes that the operator holds beside its operands and its result while it runs; 0 where they are not known."""
    if name not in TRIED:
        return 0
    tensors = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor)]
    dtype = tensors[-1].dtype
    if name not in ALWAYS and not cpu_kernels.native(dtype):
        return 0
    if name in PRODUCTS and dtype not in cpu_kernels.NARROW and not any(_repeated(tensor) for tensor in tensors):
        return 0
    return _looked_at(func, args, kwargs)[0]


def workspace(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that a recurrent layer keeps for its backward pass; 0 where they are not known."""
    made = _looked_at(func, args, {})[1]
    return made[3] if len(made) > 3 else 0


def _repeated(tensor: Tensor) -> bool:
    """Whether elements along a dimension are one in memory."""
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _looked_at(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, tuple[int, ...]]:
    tensors = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor)]
    if sum(tensor.nbytes for tensor in tensors) > LARGEST:
        return 0, ()
    named = tuple((key, _kind(value)) for key, value in kwargs.items())
    return _tried(func, tuple(map(_kind, args)), named, torch.get_num_threads(), torch.is_grad_enabled())


def _kind(argument: Any) -> Any:
    """What stands for an argument: `Kind` for a tensor, a tuple for a list."""
    if isinstance(argument, Tensor):
        return Kind((tuple(argument.shape), tuple(argument.stride()), argument.dtype))
    return tuple(argument) if isinstance(argument, list) else argument


@constant
def _tried(
    func: Any, kinds: tuple[Any, ...], named: tuple[tuple[str, Any], ...], threads: int, training: bool
) -> tuple[int, tuple[int, ...]]:
    """Bytes held beside, and of each result."""
    with torch.set_grad_enabled(training):  # a recurrent layer keeps nothing otherwise
        given = [_made(kind) for kind in kinds]
        settings = {key: _made(kind) for key, kind in named}
        result = func(*given, **settings)
        with measure_peak("cpu") as peak:
            func(*given, **settings)
    assert peak.bytes is not None
    made = tuple(leaf.nbytes for leaf in tree_iter(result) if isinstance(leaf, Tensor))
    return max(0, peak.bytes - sum(made)), made


def _made(kind: Any) -> Any:
    """The argument that `kind` stands for, zeros for a tensor."""
    if not isinstance(kind, Kind):
        return kind
    shape, strides, dtype = kind
    return torch.empty_strided(shape, strides, dtype=dtype).zero_()
