"""Models and batches of fake tensors: shapes, dtypes and aliasing of real ones, without memory or values."""

from __future__ import annotations

import dataclasses
import gc
import math
import operator
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, _meta_registrations, nn
from torch._prims_common import (
    ELEMENTWISE_TYPE_PROMOTION_KIND,
    elementwise_dtypes,
    make_contiguous_strides_for,
    suggest_memory_format,
)
from torch._subclasses.fake_tensor import FakeTensorMode, TensorMetadata
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from pipeline.layers import experts
from pipeline.layers.linear import CopiedLinear
from pipeline.planner import scratch
from pipeline.planner.live import COUNTING, FILES, HOST, Inner
from pipeline.planner.workspaces import workspace
from pipeline.precision import cpu_kernels
from pipeline.schema import RunConfig
from pipeline.tasks.base import Batch


def faked(model: nn.Module, dtype: torch.dtype | None = None, device: str = "cpu") -> nn.Module:
    """`model`, of the meta device, with fake tensors of the CPU in place of its own; tied ones stay tied.

    Args:
        dtype: of floating-point parameters and saved buffers; None: as they are. To be called in a FakeTensorMode.
        device: "meta": the other way round, outside of such a mode.
    """
    made: dict[int, Tensor] = {}
    storages: dict[int, Tensor] = {}

    def fake(tensor: Tensor, convert: bool) -> Tensor:
        if id(tensor) not in made:
            kind = dtype if convert and dtype is not None and tensor.is_floating_point() else tensor.dtype
            if kind == tensor.dtype:
                empty = like(tensor, device, storages)
            else:
                empty = torch.empty(tensor.shape, dtype=kind, device=device)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        return made[id(tensor)]

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = fake(parameter, True)  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer, name not in module._non_persistent_buffers_set)
    return model


def like(tensor: Tensor, device: str, storages: dict[int, Tensor]) -> Tensor:
    """A tensor that lies in memory as `tensor` does. What shares a storage with it shares one here, too.

    Args:
        storages: what was made already, by the storage that it stands for.
    """
    storage = tensor.untyped_storage()
    if storage._cdata not in storages:
        if tensor.is_contiguous() and tensor.nbytes == storage.nbytes():  # as most lie: one operator, where three do
            made = storages[storage._cdata] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            return made
        elements = storage.nbytes() // tensor.itemsize
        storages[storage._cdata] = torch.empty(elements, dtype=tensor.dtype, device=device)
    whole = storages[storage._cdata]
    if whole.dtype != tensor.dtype:
        whole = whole.flatten().view(tensor.dtype)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def put_into_files(model: nn.Module) -> None:
    """Have what an artifact stores of `model`, of fake tensors, lie in files from now on: it is no memory."""
    for module in model.modules():
        stored = {
            name: buffer for name, buffer in module._buffers.items() if name not in module._non_persistent_buffers_set
        }
        for tensor in (*module._parameters.values(), *stored.values()):
            if tensor is not None:
                storage = tensor.untyped_storage()
                FILES[storage._cdata] = storage


def fake_batch(batch: Batch) -> Batch:
    """A batch of the same shapes and dtypes; what is one tensor under two names, as labels are, stays one."""
    made = {id(tensor): torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in batch.values()}
    return {name: made[id(tensor)] for name, tensor in batch.items()}


def sixteen_bit(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `cpu_kernels` does inside a 16-bit product on a CPU without such kernels."""
    entry = cpu_kernels.KERNELS.get(name.removeprefix("aten::")) if cpu_kernels._entered else None
    if entry is None:
        return NotImplemented
    kernel, deciding = entry
    dtype = args[deciding].dtype
    if dtype not in cpu_kernels.NARROW or cpu_kernels.native(dtype):
        return NotImplemented
    return kernel(func, *args, **kwargs)


def blocked(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What oneDNN holds inside a float32 convolution on a CPU: input, weight and output with the channels in blocks.

    Those of input and weight are let go of before the output is written as torch lays it out.
    """
    if name != "aten::convolution" or args[6] or args[0].dtype != torch.float32 or args[0].ndim != 4:
        return NotImplemented
    x, weight, groups = args[0], args[1], args[8]
    if any(
        tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous() for tensor in (x, weight)
    ):
        return NotImplemented  # taken as they are: there is little to hold, and `tried` sees it
    # Elsewhere torch has a convolution of its own (aten/src/ATen/native/Convolution.cpp).
    spread = any(step != 1 for step in (*args[3], *args[5])) or max(weight.shape[2:]) > 3
    if not (spread or len(x) >= 16 or torch.get_num_threads() > 1):
        return NotImplemented
    wide = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8

    def bytes_of(tensor: Tensor, *dimensions: int) -> int:
        sizes = (-(-size // wide) * wide if at in dimensions else size for at, size in enumerate(tensor.shape))
        return math.prod(sizes) * tensor.itemsize

    out = func(*args, **kwargs)
    plain = x.shape[1] < 4  # images are taken as they are
    before = 0 if plain else bytes_of(x, 1) + bytes_of(weight, 0, *([1] if groups == 1 else []))
    output = bytes_of(out, 1)
    torch.empty(max(output, before + output - out.nbytes), dtype=torch.uint8)
    return out


CONVERTING = frozenset(
    {"aten::sum", "aten::prod", "aten::cumsum", "aten::any", "aten::all", "aten::norm", "aten::linalg_vector_norm"}
)


def converted(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Where a reduction on a CPU gives another dtype than it is given, a copy of its input in that dtype. A 16-bit mean
    is that of a float32 copy, in float32, before it is rounded."""
    if name == "aten::mean" and (out := func(*args, **kwargs)).dtype in cpu_kernels.NARROW:
        wide = [torch.empty(t.shape, dtype=torch.float32) for t in (args[0], out) if t.dtype != torch.float32]
        del wide
        return out
    if name not in CONVERTING:
        return NotImplemented
    out = func(*args, **kwargs)
    if out.dtype != args[0].dtype:
        torch.empty(args[0].shape, dtype=out.dtype)
    return out


def promoted(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Where an elementwise operator on a CPU is given several dtypes, copies in the one that it computes in: of each
    operand of another dtype, and of what is written in place."""
    if torch.Tag.pointwise not in func.tags:
        return NotImplemented
    # Masks are read as they are.
    operands = [leaf for leaf in args if isinstance(leaf, Tensor)][1 if name.startswith("aten::where") else 0 :]
    operands = operands[:1] if name.startswith("aten::masked_fill") else operands
    if len({operand.dtype for operand in operands}) < 2:
        return NotImplemented
    _, common = elementwise_dtypes(*operands, type_promotion_kind=ELEMENTWISE_TYPE_PROMOTION_KIND.DEFAULT)
    out = func(*args, **kwargs)
    written = [out] if func._schema.is_mutable else []
    copied = [t for t in (*operands, *written) if t.ndim and t.dtype != common]
    held = [torch.empty(tensor.shape, dtype=common) for tensor in copied]
    del held
    return out


def safe_softmax(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What attention without a kernel of its own (queries that share one key, dropout) holds beside its weights: which
    of them are hidden, and of which rows all."""
    if name != "aten::_safe_softmax":
        return NotImplemented
    out = func(*args, **kwargs)
    hidden = torch.empty(out.shape, dtype=torch.bool)
    _ = torch.empty(hidden.narrow(args[1], 0, 1).shape, dtype=torch.bool)
    return out


REDUCED = {
    "aten::mse_loss": True,
    "aten::smooth_l1_loss": True,
    "aten::binary_cross_entropy": False,
    "aten::soft_margin_loss": False,
}
"""Losses that a CPU reduces itself, and whether it makes those of the elements apart from where the result is put."""


def reduced(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A mean or a sum of as many losses as there are elements: one number, in memory for all of them, which is held as
    long as that is (aten/src/ATen/native/BinaryOps.cpp, Loss.cpp)."""
    if name not in REDUCED:
        return NotImplemented
    out = func(*args, **kwargs)
    if out.ndim:
        return out
    held = [torch.empty(args[0].shape, dtype=out.dtype) for _ in range(1 + REDUCED[name])]
    return held[0].as_strided((), ())


def exponential(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The powers and sums of which torch makes the exponential of a matrix. Of one whose values are all near 0 they are
    fewer, which a trace does not see; a gradient's are not."""
    if name != "aten::linalg_matrix_exp":
        return NotImplemented
    out = func(*args, **kwargs)
    torch.empty((10 if math.prod(out.shape[:-2]) > 1 else 12) * out.nbytes, dtype=torch.uint8)
    return out


def normalized(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The gradient of a batch norm's input, which a CPU makes twice where that and what it is computed of lie alike
    (aten/src/ATen/native/Normalization.cpp): the first one is let go of, unused, as the second is there."""
    if name != "aten::native_batch_norm_backward" or not args[9][0]:
        return NotImplemented
    formats = [suggest_memory_format(tensor) for tensor in args[:2]]
    whole = all(tensor.is_contiguous(memory_format=order) for tensor, order in zip(args[:2], formats, strict=True))
    out = func(*args, **kwargs)
    if whole and formats[0] == formats[1]:
        torch.empty_like(out[0])
    return out


LAID_OUT_ANEW = frozenset({"aten::glu_backward", "aten::log_sigmoid_forward", "aten::rrelu_with_noise"})


def laid_out(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Results that a CPU lays out without gaps in the order of their dimensions, where a fake one lies as its operand
    does: whoever takes it next may make a copy, or none."""
    if name not in LAID_OUT_ANEW and not (name == "aten::native_batch_norm" and args[0].ndim < 4):
        return NotImplemented
    return tree_map_only(Tensor, _in_order, func(*args, **kwargs))


def _in_order(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous():
        return tensor
    return tensor.as_strided(tensor.shape, make_contiguous_strides_for(tensor.shape))


def aligned(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `ctc_loss` keeps of alignments forwards, and holds of those backwards. Their number goes by the longest
    target: where lengths are a tensor, as long as there is room, or all alike where targets follow each other."""
    if name == "aten::_ctc_loss":
        steps, samples = args[0].shape[:2]
        longest = args[1].shape[1] if args[1].ndim == 2 else -(-args[1].numel() // samples)
        longest = longest if isinstance(args[3], Tensor) else max(args[3])
        return args[0].new_empty(samples), args[0].new_empty(samples, steps, 2 * longest + 1)
    if name == "aten::_ctc_loss_backward":
        _, scores, _, _, _, _, forwards = args[:7]
        held = torch.empty_like(scores), torch.empty_like(forwards)
        return held[0]
    return NotImplemented


def tried(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What only a kernel itself tells: it was run for real."""
    taken = scratch.scratch(name, func, args, kwargs)
    if not taken and name not in (scratch.RECURRENT, scratch.ATTENTION):
        return NotImplemented
    out = func(*args, **kwargs)
    if name == scratch.ATTENTION:  # in torch 2.11 the sums of rows of float64 are float32 in a fake result alone
        out = (out[0], out[1].to(torch.promote_types(out[0].dtype, torch.float32)))
    if name == scratch.RECURRENT:  # of a workspace there is nothing in a fake result
        out = (*out[:-1], torch.empty(scratch.workspace(func, args), dtype=torch.uint8))
    torch.empty(taken, dtype=torch.uint8)
    return out


_within = False


def inside(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What operators do inside, as far as it is known."""
    global _within
    if _within:  # the operator itself, asked by one of these
        return NotImplemented
    out = sixteen_bit(name, func, args, kwargs)
    _within = True
    try:
        for does in (
            converted, promoted, blocked, safe_softmax, reduced, exponential, normalized, laid_out, aligned, tried,
        ):  # fmt: skip
            out = does(name, func, args, kwargs) if out is NotImplemented else out
    finally:
        _within = False
    return out


def kernels_of(config: RunConfig) -> tuple[Inner | None, int]:
    """What kernels of the device of `config` hold inside, and bytes of a workspace of its matrix products."""
    return inside if config.device.kind() == "cpu" else None, workspace(config)


def _real(*_: Any) -> bool:
    """Not a mock's own answer: a mock keeps what it was asked about."""
    return False


def _grouped_product(one: Tensor, other: Tensor, *, offs: Tensor | None, out_dtype: Any, **_: Any) -> Tensor:
    """A product of experts in any dtype: of fake tensors torch takes it in bfloat16 alone."""
    create: Any = _meta_registrations._create_grouped_mm_output_tensor
    return cast(Tensor, create(one, other, offs, out_dtype))


def _spread(chosen: Tensor, number: int) -> list[int]:
    """Where a router sends tokens is known by its values alone: as many to each expert, as it is trained to."""
    share, rest = divmod(chosen.numel(), number)
    return [share + (place < rest) for place in range(number)]


def _spread_rows(hidden: Tensor, number: int, per_token: int) -> tuple[Tensor, list[int]]:
    chosen = torch.empty(len(hidden) // number, per_token, dtype=torch.int64)
    _ = hidden.any(-1).nonzero_static(size=chosen.numel())
    return chosen.flatten(), _spread(chosen, number)


_one_by_one = TensorMetadata._flatten_into
_ONLY_NUMBERS = frozenset({int})
_described = operator.attrgetter(*(field.name for field in dataclasses.fields(TensorMetadata)))


def _put_into_key(metadata: TensorMetadata, result: list[object], *state: Any) -> None:
    """A tensor in the key by which torch remembers what an operator gave. Torch takes its sizes one by one, since they
    may be symbols: a sixth of a trace. They are where a compiler makes one program for several shapes."""
    if _ONLY_NUMBERS.issuperset(map(type, metadata.shape)):
        result.extend(_described(metadata))
    else:
        _one_by_one(metadata, result, *state)


@contextmanager
def generator_states() -> Iterator[None]:
    """States of the CPU's generator are fake tensors too, which no operator makes: a checkpointed block keeps one. Of a
    block on a GPU it lies on the host."""
    size = torch.get_rng_state().nbytes

    def state() -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    with mock.patch.object(torch, "get_rng_state", state), mock.patch.object(torch, "set_rng_state", _real):
        yield


@contextmanager
def tracing(config: RunConfig | None = None) -> Iterator[FakeTensorMode]:
    """A FakeTensorMode in which transformers builds the attention masks that it builds on real tensors.

    `config`: of a fit or an evaluation whose device may compute attention otherwise than a CPU does.
    """
    from transformers import masking_utils

    collecting = gc.isenabled()
    gc.disable()
    with (
        ExitStack() as stack,
        warnings.catch_warnings(),
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        mock.patch.object(masking_utils, "is_tracing", _real),
        mock.patch.object(_meta_registrations, "_meta_grouped_mm_common", _grouped_product),
        mock.patch.object(experts, "tokens_of", _spread),
        mock.patch.object(experts, "rows_of", _spread_rows),
        mock.patch.object(TensorMetadata, "_flatten_into", _put_into_key),
    ):
        # Copies of tensors ask whether there is memory behind them.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        if collecting:
            stack.callback(gc.enable)
        if config is None or config.device.kind() == "cpu":
            stack.enter_context(generator_states())
        if config is not None and config.device.kind() == "cuda" and config.precision.weight_dtype == torch.float64:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # a GPU has no other kernel for float64
        stack.callback(FILES.clear)
        stack.callback(HOST.clear)
        stack.callback(lambda: [live.forget() for live in tuple(COUNTING)])
        yield mode


def as_opened(model: nn.Module) -> None:
    """No weights of `model` are in a form that a kernel has made of them, as in an artifact that was just opened."""
    for layer in model.modules():
        if isinstance(layer, CopiedLinear):
            layer.void()
