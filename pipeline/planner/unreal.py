"""What stands in for that which fake tensors cannot do, while methods of compression run on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from pipeline.layers import bagged, kernels, offload, pulse
from pipeline.planner.fakes import tracing
from pipeline.planner.gpu import as_on_device
from pipeline.planner.live import FILES, storage_key, uncounted
from pipeline.planner.replaying import few_parts
from pipeline.schema import RunConfig


@contextlib.contextmanager
def unreal(config: RunConfig) -> Iterator[None]:
    """Fake tensors, and what stands in for that which they cannot do: be moved, be told apart by their address, lie in
    files, be packed for a kernel."""
    kernels.choose(torch.device("cpu"), torch.float32, 1)  # which kernel is exact here is found by trying it, for good
    for width in bagged.KERNELS:
        bagged.works(width)

    def address(tensor: Tensor) -> int:
        return storage_key(tensor) + int(tensor.storage_offset()) * tensor.itemsize

    def copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        # torch would copy the bytes behind a tensor that has an address.
        if id(tensor) not in memo:
            made = torch.empty_like(tensor)
            memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
        return cast(Tensor, memo[id(tensor)])

    def written(tensor: Tensor, directory: Path, dtype: torch.dtype) -> Tensor:
        return uncounted(tensor, dtype, FILES)

    def place(tensor: Tensor) -> Path | None:
        return Path() if storage_key(tensor) in FILES else None

    # Only names that no other module takes for its own: one first imported meanwhile would keep what stands in for it.
    with (
        tracing(config),
        pulse.planned(),
        mock.patch.object(nn.Module, "to", lambda module, *_, **__: module),
        mock.patch.object(FakeTensor, "data_ptr", address),
        mock.patch.object(FakeTensor, "__deepcopy__", copied),
        mock.patch.object(kernels, "fbgemm_pack", _packed),
        mock.patch.object(kernels, "_fbgemm", _product),
        mock.patch.object(kernels, "peak", _peak),
        mock.patch.object(bagged, "_sums", _bag_sums),
        few_parts(),
        mock.patch.object(offload, "_written", written),
        mock.patch.object(offload, "_place", place),
        as_on_device(config),
    ):
        yield


class _Packed(NamedTuple):
    outputs: int


def _packed(weight: Tensor, weight_scale: Tensor) -> _Packed:
    """FBGEMM's own form is made of a quantized tensor with scales and zero points; it lies where torch sees none."""
    _ = weight.clone(), weight_scale.double(), torch.empty(len(weight), dtype=torch.int64)
    return _Packed(len(weight))


def _product(rows: Tensor, zero_point: int, packed: _Packed, step: float = 1.0) -> Tensor:
    """FBGEMM's product holds its sums as integers beside its result."""
    sums = torch.empty(*rows.shape[:-1], packed.outputs, dtype=torch.int32)
    return torch.empty(sums.shape, dtype=torch.float32)


def _bag_sums(packed: bagged.Packed, weights: Tensor, places: Tensor, begins: Tensor) -> Tensor:
    ends = 8 if packed.width == 8 else 4
    return torch.empty(len(begins) - 1, (packed.rows.shape[1] - ends) * 8 // packed.width)


def _peak(x: Tensor) -> float:
    """Not a mock's own answer: a mock keeps what it was asked about."""
    return 1.0
