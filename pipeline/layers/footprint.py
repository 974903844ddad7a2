"""Bytes on disk of a model that is yet to be quantized: known beforehand, to the byte, from shapes alone.

A safetensors file is eight bytes, a JSON header padded to eight, and the tensors one after another, widest types first.
Tensors that will be stored as a bitmask (of a masked layer) may take less than is said here, never more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from pipeline.layers.packing import packed_columns
from pipeline.layers.quantize import Grid
from pipeline.layers.sparsity import MASK

Stored = tuple[str, torch.dtype, tuple[int, ...]]
"""(name, dtype, shape) of a tensor in a file."""

CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip


def layer_tensors(model: nn.Module, name: str, grid: Grid) -> list[Stored]:
    """What the weight of the layer `name` becomes, packed on `grid`."""
    weight = cast(Tensor, model.get_submodule(name).weight)
    rows, columns = weight.shape[0], weight[0].numel()
    size = grid.of(weight).group_size
    groups = 1 if size is None else columns // size
    found: list[Stored] = [
        (f"{name}.weight_packed", torch.int32, (rows, packed_columns(columns, grid.bits))),
        (f"{name}.weight_shape", torch.int64, (weight.ndim,)),
        (f"{name}.weight_scale", weight.dtype, (rows, groups)),
    ]
    if not grid.symmetric:
        found.append((f"{name}.weight_zero_point", torch.int32, (packed_columns(rows, grid.bits), groups)))
    return found


def layer_bytes(model: nn.Module, name: str, grid: Grid) -> int:
    """Bytes of the tensors that the weight of the layer `name` becomes."""
    return data_bytes(layer_tensors(model, name, grid))


def model_tensors(model: nn.Module, planned: Mapping[str, Grid]) -> list[Stored]:
    """Everything that is stored of `model` with the layers of `planned` packed; tied tensors once, no masks."""
    seen: set[int] = set()
    found: list[Stored] = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        layer, _, leaf = name.rpartition(".")
        if leaf == MASK or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if leaf == "weight" and layer in planned:
            found += layer_tensors(model, layer, planned[layer])
        else:
            found.append((name, tensor.dtype, tuple(tensor.shape)))
    return found


def data_bytes(tensors: Iterable[Stored]) -> int:
    """Bytes of the tensors themselves."""
    return sum(_bytes(dtype, shape) for _, dtype, shape in tensors)


def file_bytes(tensors: Iterable[Stored]) -> int:
    """Bytes of the safetensors file that holds `tensors`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in sorted(tensors, key=lambda stored: (-stored[1].itemsize, stored[0])):
        end = offset + _bytes(dtype, shape)
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-text // 8) * 8 + offset


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count
