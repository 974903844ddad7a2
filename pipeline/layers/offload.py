"""Tensors that lie in files instead of memory, mapped: the system reads them when they are used, drops them when short.

An offloaded tensor is a tensor like any other. Its file has no name any more, is its own, and goes with it; what is
written to the tensor is written to the file, never to where its values came from. It begins at a page, so arithmetic on
it gives the very results of a tensor in memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import LeanfitError

PREFIX = ".leanfit-offload-"
PIECE = 1 << 20
"""Elements that are converted at once."""
RELEASED_AFTER = 1 << 20
"""Bytes of a tensor after which freed memory is given back."""
IN_FILES: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
"""Storages that lie in files: no part of the memory that is measured."""
MAPS = "leanfit maps a file"
"""What a profile is told before memory is mapped, which it would count with what was allocated."""


class OffloadError(LeanfitError):
    """A file that cannot be written, as when the disk is full."""


def offload(tensor: Tensor, directory: Path, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of `tensor` in a file in `directory`, in `dtype` where one is given. Needs no memory but for a few pages.

    Raises:
        OffloadError: the file cannot be written.
    """
    return _written(tensor, directory, dtype or tensor.dtype)


def _written(tensor: Tensor, directory: Path, dtype: torch.dtype) -> Tensor:
    flat = tensor.detach().reshape(-1)
    if not flat.numel():
        return torch.empty(tensor.shape, dtype=dtype)
    try:
        handle, name = tempfile.mkstemp(prefix=PREFIX, dir=Path(directory).absolute())
        try:
            with open(handle, "wb", buffering=0) as file:
                for piece in torch.split(flat, PIECE):
                    octets: Any = piece.to("cpu", dtype).contiguous().view(torch.uint8).numpy()
                    rest = memoryview(octets)
                    while rest:
                        rest = rest[file.write(rest) :]
            maps_file()
            mapped = torch.from_file(name, shared=True, size=flat.numel(), dtype=dtype)
        finally:
            os.unlink(name)
    except OSError as error:
        raise OffloadError(f"{directory}: weights cannot be laid into files there: {error.strerror}") from error
    IN_FILES.add(mapped.untyped_storage())
    if mapped.nbytes >= RELEASED_AFTER:
        release()
    return mapped.view(tensor.shape)


def maps_file() -> None:
    """Say that a file is mapped next, which is no memory of its own."""
    with torch.autograd.profiler.record_function(MAPS):
        pass


def place_of(tensor: Tensor) -> Path | None:
    """The directory in which `tensor` was offloaded; None where it lies in memory."""
    return _place(tensor)


def _place(tensor: Tensor) -> Path | None:
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or type(tensor) not in (Tensor, nn.Parameter):
        return None
    name = tensor.untyped_storage().filename
    return Path(name).parent if name and Path(name).name.startswith(PREFIX) else None


def beside(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor`, offloaded where `other` is; as it is where that lies in memory."""
    place = place_of(other)
    return tensor if place is None or tensor.device.type != "cpu" else offload(tensor, place)


def own_copy(tensor: Tensor) -> Tensor:
    """A copy in order, so that it holds nothing else; in a file where `tensor` lies in one."""
    return beside(tensor.detach().clone(memory_format=torch.contiguous_format), tensor)


def place_of_model(model: nn.Module) -> Path | None:
    """Where the parameters of `model` were offloaded; None where they lie in memory."""
    return next((place for parameter in model.parameters() if (place := place_of(parameter)) is not None), None)


def offload_parameter(parameter: nn.Parameter, directory: Path) -> None:
    """Put away the values of `parameter`, where they lie in memory."""
    if parameter.device.type == "cpu" and place_of(parameter) is None:
        parameter.data = offload(parameter, directory)


def offload_module(module: nn.Module, directory: Path) -> None:
    """Put away the tensors of `module` itself, not those of modules inside, that still lie in memory."""
    for parameter in module.parameters(recurse=False):
        offload_parameter(parameter, directory)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set and buffer.device.type == "cpu" and place_of(buffer) is None:
            setattr(module, name, offload(buffer, directory))


def release() -> None:
    """Give memory that was freed back to the system: glibc keeps it, and where it is short nothing else can take it."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
