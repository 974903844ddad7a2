"""A GPU where there are fake tensors of a CPU alone: code that is told that its device is `cuda` finds its tensors
there, the host's memory is another, and quantized layers are multiplied as a GPU multiplies them.

All tensors count as the device's, but for those that are put on the host by name (`tensor.cpu()`, `tensor.to("cpu")`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pipeline.layers import float8, kernels
from pipeline.planner.live import HOST, storage_key, uncounted
from pipeline.schema import RunConfig
from pipeline.tasks.base import Batch

CUDA = torch.device("cuda")


def as_on_device(config: RunConfig) -> AbstractContextManager[None]:
    """While entered, what `config` does is done as on its device, if that is one whose operators are traced."""
    return as_on_gpu() if config.device.kind() == "cuda" else nullcontext()


@contextmanager
def as_on_gpu() -> Iterator[None]:
    plain: Callable[..., Tensor] = FakeTensor.to
    choose, float8_here = kernels.choose, float8.multiplies_float8

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        place = kwargs.pop("device", None)
        if args and isinstance(args[0], str | torch.device):
            place, *args = args  # type: ignore[assignment]
        moved = tensor
        if place == "cpu":
            moved = hosted(tensor)
        elif place is not None and torch.device(place).type == "cuda" and storage_key(tensor) in HOST:
            moved = torch.empty_like(tensor)
        return plain(moved, *args, **kwargs) if args or kwargs else moved

    def chosen(device: torch.device, dtype: torch.dtype, rows: int) -> str:
        return choose(CUDA, dtype, rows)

    def works(kernel: str, device: torch.device) -> bool:
        return True

    def is_cpu(device: torch.device) -> bool:
        return False

    def cpu_kernel() -> str:
        return "int_mm"

    def multiplies_float8(device: torch.device) -> bool:
        return float8_here(CUDA) if torch.cuda.is_available() else True

    with (
        mock.patch.object(FakeTensor, "to", to),
        mock.patch.object(FakeTensor, "cpu", hosted),
        mock.patch.object(kernels, "choose", chosen),
        mock.patch.object(kernels, "is_cpu", is_cpu),
        mock.patch.object(kernels, "works", works),
        mock.patch.object(kernels, "_cpu_kernel", cpu_kernel),
        mock.patch.object(float8, "multiplies_float8", multiplies_float8),
    ):
        yield


def hosted(tensor: Tensor) -> Tensor:
    """`tensor` in the host's memory, which does not count."""
    return tensor if storage_key(tensor) in HOST else uncounted(tensor, tensor.dtype, HOST)


def on_host(config: RunConfig, batch: Batch) -> Batch:
    """`batch`, of fake tensors, in the host's memory from now on, if the device of `config` has its own."""
    if config.device.kind() == "cuda":
        HOST.update({storage_key(tensor): tensor.untyped_storage() for tensor in batch.values()})
    return batch
