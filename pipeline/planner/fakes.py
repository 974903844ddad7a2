"""Models and batches of fake tensors: shapes, dtypes and aliasing of real ones, without memory or values."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.precision import cpu_kernels
from pipeline.tasks.base import Batch


def faked(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """`model`, of the meta device, with fake tensors of the CPU in place of its own; tied ones stay tied.

    Args:
        dtype: of floating-point parameters and saved buffers; None: as they are. To be called in a FakeTensorMode.
    """
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor, convert: bool) -> Tensor:
        if id(tensor) not in made:
            kind = dtype if convert and dtype is not None and tensor.is_floating_point() else tensor.dtype
            empty = torch.empty(tensor.shape, dtype=kind, device="cpu")
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


def fake_batch(batch: Batch) -> Batch:
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in batch.items()}


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


@contextmanager
def tracing() -> Iterator[FakeTensorMode]:
    """A FakeTensorMode in which transformers builds the attention masks that it builds on real tensors."""
    from transformers import masking_utils

    with (
        warnings.catch_warnings(),
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        mock.patch.object(masking_utils, "is_tracing", return_value=False),
    ):
        # Copies of tensors ask whether there is memory behind them.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield mode
