"""A safetensors file, mapped: its tensors one after the other, no memory for the whole of it.

What safetensors opens for torch may be written to, for which the system promises memory for the whole of the file;
where it has less it refuses, and a model larger than memory that lies in one file would not open. Here it is told (on
Linux) that none will be wanted.
"""

from __future__ import annotations

import json
import mmap
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""Dtypes by their names in the header of a safetensors file."""
NO_RESERVE = 0x4000
"""Linux's MAP_NORESERVE, which Python's mmap does not name."""


def shapes(path: Path) -> dict[str, Tensor]:
    """The tensors of a file on the meta device, by its header. Raises as `tensors` does."""
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape, _) in _places(path).items()}


def tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped: what is written to one takes memory, and does not come to the file.

    Raises:
        OSError, safetensors.SafetensorError: it cannot be read, or is no such file.
        ValueError: a tensor is of a dtype that torch has none for.
    """
    places = _places(path)
    octets = torch.frombuffer(_mapped(path), dtype=torch.uint8)
    found = {}
    for name, (dtype, shape, place) in places.items():
        part = octets[place]
        aligned = part.data_ptr() % dtype.itemsize == 0  # but where a header of odd length comes before it
        found[name] = (part if aligned else part.clone()).view(dtype).view(shape)
    return found


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as stream:
        if sys.platform != "linux":
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        return mmap.mmap(stream.fileno(), 0, flags=mmap.MAP_PRIVATE | NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _places(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], slice]]:
    """Dtype, shape and bytes of each tensor of a file."""
    with safe_open(path, "np"):  # which looks whether the header holds together
        pass
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path.name}: {name} is of dtype {entry['dtype']}, which torch does not have")
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        found[name] = DTYPES[entry["dtype"]], tuple(entry["shape"]), slice(begin, end)
    return found
