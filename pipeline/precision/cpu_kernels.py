"""Fast 16-bit matrix products on a CPU that has no instructions for them.

Without AVX512-FP16 or AMX (float16), AVX512 or AMX (bfloat16), torch multiplies 16-bit matrices element by element: a
training step takes 17 to 30 times as long as in float32. While `sixteen_bit_kernels` is entered, the products,
convolutions and attention of such a dtype run in other kernels of the same contract, the one of tensor cores
(Micikevicius et al., 2018, arXiv:1710.03740): 16-bit operands, float32 products and sums, one rounding of the result
to 16 bits.

The kernels are registered with torch's dispatcher below autograd and autocast. So what is cast, what is saved for the
backward pass, second derivatives, activation checkpointing and the module's code stay as with native kernels,
whatever composite operation (`einsum`, `F.linear`, `nn.MultiheadAttention`, attention with a mask) a product came from.
Other dtypes pass through to torch's own kernels, at about 3 microseconds a call.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pipeline.layers.constants import constant

Kernel = Callable[..., Any]
NARROW = (torch.float16, torch.bfloat16)
ROW_ELEMENTS = 1 << 22
"""Float32 elements of an operand or a result that a product holds at a time (16 MiB): a large vocabulary's logits are
made in slices of rows, so that the transient copies stay small beside the 16-bit tensors they belong to."""


@constant
def native(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of `dtype` in kernels of its own. What torch is asked with is an operator,
    which a plan's modes would see at each product."""
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True


def _wide(value: Tensor | None) -> Tensor | None:
    return value.float() if value is not None and value.dtype in NARROW else value


def _mm(original: Kernel, left: Tensor, right: Tensor) -> Tensor:
    return _by_rows(left, right, lambda rows, wide: original(left[rows].float(), wide))


def _addmm(
    original: Kernel, added: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    sliced = added.dim() == 2 and added.shape[0] == left.shape[0] != 1
    whole = None if sliced else added.float()

    def product(rows: slice, wide: Tensor) -> Tensor:
        part = added[rows].float() if whole is None else whole
        return original(part, left[rows].float(), wide, beta=beta, alpha=alpha)  # type: ignore[no-any-return]

    return _by_rows(left, right, product)


def _by_rows(left: Tensor, right: Tensor, product: Callable[[slice, Tensor], Tensor]) -> Tensor:
    """`product` over slices of the rows of `left` ([m, k]); `right` is [k, n]; the result has `left`'s dtype."""
    if left.dim() != 2 or right.dim() != 2:
        return product(slice(None), right.float())  # torch's own message says what is wrong with the shapes
    rows, columns = left.shape[0], right.shape[1]
    step = max(64, ROW_ELEMENTS // max(left.shape[1], columns, 1))
    wide = right.float()
    if rows <= step:
        return product(slice(None), wide).to(left.dtype)
    out = left.new_empty(rows, columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        out[part] = product(part, wide)
    return out


def _bmm(original: Kernel, left: Tensor, right: Tensor) -> Tensor:
    return original(left.float(), right.float()).to(left.dtype)  # type: ignore[no-any-return]


def _baddbmm(
    original: Kernel, added: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    out = original(added.float(), left.float(), right.float(), beta=beta, alpha=alpha)
    return out.to(left.dtype)  # type: ignore[no-any-return]


def _convolution(original: Kernel, data: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    return original(data.float(), weight.float(), _wide(bias), *settings).to(data.dtype)  # type: ignore[no-any-return]


def _convolution_backward(
    original: Kernel, gradient: Tensor, data: Tensor, weight: Tensor, *settings: Any
) -> tuple[Tensor | None, ...]:
    outs = original(gradient.float(), data.float(), weight.float(), *settings)
    return tuple(None if out is None else out.to(data.dtype) for out in outs)


def _attention(
    original: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *settings: Any,
    attn_mask: Tensor | None = None,
    **named: Any,
) -> tuple[Tensor, Tensor]:
    out, log_sum = original(query.float(), key.float(), value.float(), *settings, attn_mask=_wide(attn_mask), **named)
    return out.to(query.dtype), log_sum


def _attention_backward(
    original: Kernel,
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum: Tensor,
    *settings: Any,
    attn_mask: Tensor | None = None,
    **named: Any,
) -> tuple[Tensor, ...]:
    wide = (tensor.float() for tensor in (gradient, query, key, value, out))
    outs = original(*wide, log_sum, *settings, attn_mask=_wide(attn_mask), **named)
    return tuple(grad.to(query.dtype) for grad in outs)


# Operator -> its kernel, and which argument's dtype decides.
KERNELS: dict[str, tuple[Kernel, int]] = {
    "mm": (_mm, 0),
    "addmm": (_addmm, 1),
    "bmm": (_bmm, 0),
    "baddbmm": (_baddbmm, 1),
    "convolution": (_convolution, 0),
    "convolution_backward": (_convolution_backward, 0),
    "_scaled_dot_product_flash_attention_for_cpu": (_attention, 0),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (_attention_backward, 0),
}

_lock = threading.RLock()
_entered: list[torch.library.Library] = []
_depth = 0
_warned = False


def _register(library: torch.library.Library, name: str, kernel: Kernel, deciding: int) -> None:
    torch_kernel = torch.library.get_kernel(f"aten::{name}", "CPU")

    def dispatch(keys: Any, *args: Any, **kwargs: Any) -> Any:
        if args[deciding].dtype not in NARROW or native(args[deciding].dtype):
            return torch_kernel.call_boxed(keys, *args, **kwargs)

        def original(*wide: Any, **named: Any) -> Any:
            return torch_kernel.call_boxed(keys, *wide, **named)

        return kernel(original, *args, **kwargs)

    library.impl(name, dispatch, "CPU", with_keyset=True)  # type: ignore[no-untyped-call]


def _install() -> torch.library.Library:
    """The kernels, registered for as long as the returned library lives."""
    global _warned
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    # torch warns, once in a process, that a kernel is overridden, which is the purpose. Filters are not touched after
    # that: each change of them makes Python forget which warnings it has shown already.
    with nullcontext() if _warned else warnings.catch_warnings():
        if not _warned:
            warnings.filterwarnings("ignore", message="Warning only once for all operators", category=UserWarning)
        for name, (kernel, deciding) in KERNELS.items():
            _register(library, name, kernel, deciding)
    _warned = True
    return library


@contextmanager
def sixteen_bit_kernels() -> Iterator[None]:
    """While entered, 16-bit products on this CPU run with float32 arithmetic where it has no kernels of its own.

    The registration is the process's, not the thread's: autograd's threads see it too. It may be entered again inside
    itself; the last exit takes the kernels away. Where float16 and bfloat16 are both native, nothing is done.
    """
    global _depth
    if all(native(dtype) for dtype in NARROW):
        yield
        return
    with _lock:
        _depth += 1
        if _depth == 1:
            _entered.append(_install())
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                # The library's finalizer takes its kernels out of the dispatcher.
                _entered.clear()
