"""What a CPU's own kernels hold inside, and what they keep, found by trying.

Attention is computed in parts, a thread's part in a buffer of its own, and in 16 bits from copies of keys and values
in tiles. Where a CPU multiplies 16-bit matrices itself (AMX, AVX512-FP16), oneDNN copies operands into the tiles that
its kernel reads; it lays out channels in blocks for convolutions, and keeps a workspace of a recurrent layer for its
backward pass. How much that takes depends on the kernel it picks, by shapes, strides, dtype and threads, and oneDNN
does not say. BLAS copies an operand that is one row for all, as the gradient of a sum is; LAPACK works in a copy. So a
plan runs such operators, and any of which nothing is known, for real, each kind once, where that is small enough, and
looks. Of a large product it runs parts, since a kernel that works in tiles holds no more for more of them; of large
attention one head and two, since each takes the same.
"""

from __future__ import annotations

from collections.abc import Callable
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
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
INTERPOLATIONS = frozenset(
    f"aten::upsample_{kind}" for kind in ("nearest2d", "bilinear2d", "bicubic2d", "trilinear3d", "linear1d")
)
"""Of few channels they are computed on copies with channels last."""
PLAIN = frozenset(
    f"aten::{name}"
    for name in (
        "_foreach_norm", "_log_softmax", "_log_softmax_backward_data", "_softmax", "_softmax_backward_data",
        "_to_copy", "adaptive_avg_pool2d", "amax", "amin", "arange", "argmax", "argmin", "avg_pool2d",
        "avg_pool2d_backward", "batch_norm", "cat", "constant_pad_nd", "count_nonzero", "embedding",
        "embedding_dense_backward", "empty", "empty_like", "empty_strided", "eye", "flip", "floor_divide", "full",
        "full_like", "gather", "index", "index_select", "layer_norm", "linspace", "max", "mean", "min",
        "native_batch_norm", "native_batch_norm_backward", "native_layer_norm", "native_layer_norm_backward",
        "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros", "nll_loss_backward",
        "nll_loss_forward", "nonzero", "ones", "ones_like", "repeat", "roll", "scalar_tensor", "select_backward",
        "slice_backward", "stack", "tril", "triu", "zeros", "zeros_like",
    )
)  # fmt: skip
"""Known to hold no more than a kilobyte, and often met: not tried."""
ALWAYS = frozenset({ATTENTION, f"{ATTENTION}_backward", RECURRENT, f"{RECURRENT}_backward"})
"""Tried in every dtype."""
TRIED = PRODUCTS | CONVOLUTIONS | ALWAYS
LARGEST = 1 << 28
"""Bytes of the operands of an operator that is tried."""
LARGEST_OTHER = 1 << 25
"""And of one of which nothing is known: sorting and decomposing take far longer than a product's parts."""
LONG = 1 << 30
"""Multiplications above which parts of an operator are tried."""
TILES = 1024
"""Rows and columns that are left out of a product, several times. It holds no more for one such part than for two, or
is tried whole."""

UNTRIED = frozenset({torch.Tag.pointwise, torch.Tag.nondeterministic_seeded})

Kinds = tuple[Any, ...]
Parts = Callable[[Kinds, Callable[[Kinds], int]], int | None]


class Kind(tuple[tuple[int, ...], tuple[int, ...], torch.dtype]):
    """(shape, strides, dtype) of a tensor."""


def scratch(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bytes that the operator holds beside its operands and its result while it runs; 0 where they are not known."""
    tensors = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor)]
    if name not in TRIED:
        copies = name in INTERPOLATIONS or ("_backward" in name and any(map(_repeated, tensors)))
        return _looked_at(func, args, kwargs)[0] if copies or _unknown(name, func, tensors) else 0
    dtype = tensors[-1].dtype
    if name not in ALWAYS and not cpu_kernels.native(dtype):
        return 0
    if name in PRODUCTS and dtype not in cpu_kernels.NARROW and not any(_repeated(tensor) for tensor in tensors):
        return 0
    if name in ("aten::mm", "aten::addmm"):
        return _looked_at(func, args, kwargs, _of_product)[0]
    if name in (ATTENTION, f"{ATTENTION}_backward"):
        return _looked_at(func, args, kwargs, _of_attention)[0]
    return _looked_at(func, args, kwargs)[0]


def workspace(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that a recurrent layer keeps for its backward pass; 0 where they are not known."""
    made = _looked_at(func, args, {})[1]
    return made[3] if len(made) > 3 else 0


def _unknown(name: str, func: Any, tensors: list[Tensor]) -> bool:
    """Whether the operator may hold more than is known: it may sort a copy, or decompose one. Elementwise ones hold
    nothing, nor do those that give a view; and none is tried that would draw from a generator, or write."""
    if name in PLAIN or func.namespace != "aten" or UNTRIED & {*func.tags}:
        return False
    if any(given.alias_info is not None for given in (*func._schema.arguments, *func._schema.returns)):
        return False
    strided = bool(tensors) and all(tensor.layout == torch.strided for tensor in tensors)
    return strided and sum(tensor.nbytes for tensor in tensors) <= LARGEST_OTHER


def _repeated(tensor: Tensor) -> bool:
    """Whether elements along a dimension are one in memory."""
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _looked_at(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], by_parts: Parts | None = None
) -> tuple[int, tuple[int, ...]]:
    tensors = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor)]
    if sum(tensor.nbytes for tensor in tensors) > LARGEST:
        return 0, ()
    kinds = tuple(_kind(value) for value in (*args, *kwargs.values()))

    # What has parts does with gradients what it does without.
    training = torch.is_grad_enabled() and by_parts is None

    def tried(kinds: Kinds) -> tuple[int, tuple[int, ...]]:
        named = tuple(zip(kwargs, kinds[len(args) :], strict=True))
        return _tried(func, kinds[: len(args)], named, torch.get_num_threads(), training)

    held = by_parts(kinds, lambda cut: tried(cut)[0]) if by_parts else None
    return tried(kinds) if held is None else (held, ())


def _of_product(kinds: Kinds, tried: Callable[[Kinds], int]) -> int | None:
    """What a long product of matrices holds, by that of its first rows and columns; None: it is to be tried whole."""
    left, right = [kind for kind in kinds if isinstance(kind, Kind)][-2:]
    (rows, inner), columns = left[0], right[0][1]
    if rows * inner * columns <= LONG:
        return None

    def cut(kind: Any, parts: int) -> Any:
        if not isinstance(kind, Kind):
            return kind
        shape = [min(size, parts * TILES + size % TILES) for size in kind[0]]
        if kind is left:
            shape[1] = inner
        if kind is right:
            shape[0] = inner
        return Kind((tuple(shape), *kind[1:]))

    one, two = (tuple(cut(kind, parts) for kind in kinds) for parts in (1, 2))
    if two == kinds:
        return None
    held = tried(two)
    return held if tried(one) == held else None


def _of_attention(kinds: Kinds, tried: Callable[[Kinds], int]) -> int | None:
    """What long attention holds, by that of one key-value head of one sample, with the queries that it serves, and of
    two; None: it is to be tried whole. Tensors are (samples, heads, ...), the key-value heads fewest of all."""
    tensors = [kind[0] for kind in kinds if isinstance(kind, Kind) and len(kind[0]) > 2 and kind[0][1] > 1]
    if not tensors:
        return None
    samples, most, length, size = max(tensors, key=lambda shape: (len(shape), shape[1]))
    heads = min(shape[1] for shape in tensors)
    if heads < 3 or samples * most * length * length * size <= LONG:
        return None

    def cut(kind: Any, count: int) -> Any:
        if not isinstance(kind, Kind):
            return kind
        _, several, *rest = kind[0]
        shape = (1, several if several == 1 else several // heads * count, *rest)
        return Kind((shape, _packed(shape, kind[1]), kind[2]))

    one, two = (tried(tuple(cut(kind, count) for kind in kinds)) for count in (1, 2))
    return one + (samples * heads - 1) * (two - one)


def _packed(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor without gaps whose dimensions lie in the order of `strides`; where these are 0, they stay."""
    found, step = [0] * len(shape), 1
    for axis in sorted(range(len(shape)), key=lambda axis: (strides[axis], -axis)):
        if strides[axis]:
            found[axis] = step
            step *= shape[axis]
    return tuple(found)


def _kind(argument: Any) -> Any:
    """What stands for an argument: `Kind` for a tensor, a tuple for a list."""
    if isinstance(argument, Tensor):
        return Kind((tuple(argument.shape), tuple(argument.stride()), argument.dtype))
    return tuple(map(_kind, argument)) if isinstance(argument, list) else argument


@constant
def _tried(
    func: Any, kinds: tuple[Any, ...], named: tuple[tuple[str, Any], ...], threads: int, training: bool
) -> tuple[int, tuple[int, ...]]:
    """Bytes held beside, and of each result."""
    with torch.set_grad_enabled(training):  # a recurrent layer keeps nothing otherwise
        given = [_made(kind) for kind in kinds]
        settings = {key: _made(kind) for key, kind in named}
        with measure_peak("cpu") as peak:
            try:
                result = func(*given, **settings)
            except RuntimeError:  # zeros are not for every operator
                return 0, ()
    assert peak.bytes is not None
    given_back = [leaf for leaf in tree_iter(result) if isinstance(leaf, Tensor)]
    if any(leaf.layout != torch.strided for leaf in given_back):
        return 0, ()
    made = tuple(leaf.nbytes for leaf in given_back)
    return max(0, peak.bytes - sum(made)), made


def _made(kind: Any) -> Any:
    """The argument that `kind` stands for, zeros for a tensor."""
    if not isinstance(kind, Kind):
        return [_made(part) for part in kind] if isinstance(kind, tuple) else kind
    shape, strides, dtype = kind
    return torch.empty_strided(shape, strides, dtype=dtype).zero_()
