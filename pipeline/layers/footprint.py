"""Bytes on disk of a model that is yet to be quantized: known beforehand, to the byte, from shapes alone.

A safetensors file is eight bytes, a JSON header padded to eight, and the tensors one after another, widest types first.
A masked weight is stored as a bitmask and the values that it keeps where that is smaller. Weights that rounding makes
zero are left out as well, so it may take less than is said here, never more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from pipeline.layers.experts import linear_experts
from pipeline.layers.packing import packed_columns
from pipeline.layers.public_names import public_names, under_public_names
from pipeline.layers.quantize import Grid
from pipeline.layers.sparsity import MASK, bitmask_bytes, kept_of

Stored = tuple[str, torch.dtype, tuple[int, ...]]
"""(name, dtype, shape) of a tensor in a file."""

CODES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
"""In the order in which a file has them."""


def layer_tensors(model: nn.Module, name: str, grid: Grid, share: float = 1.0) -> list[Stored]:
    """What the weight of the layer `name` becomes, packed on `grid`.

    `share`: of its weights, how many a mask will keep at most; one that the layer has already goes before.
    """
    layer = model.get_submodule(name)
    weight = cast(Tensor, layer.weight)
    rows, columns = weight.shape[0], weight[0].numel()
    size = grid.of(weight).group_size
    groups = 1 if size is None else columns // size
    packed: Stored = (f"{name}.weight_packed", torch.int32, (rows, packed_columns(columns, grid.bits)))
    kept = kept_weights(layer, share) if grid.symmetric else weight.numel()
    found: list[Stored] = [
        *smaller(packed, weight.numel(), kept, grid.bits, torch.int8),
        (f"{name}.weight_shape", torch.int64, (weight.ndim,)),
        (f"{name}.weight_scale", weight.dtype, (rows, groups)),
    ]
    if not grid.symmetric:
        found.append((f"{name}.weight_zero_point", torch.int32, (packed_columns(rows, grid.bits), groups)))
    return found


def kept_weights(layer: nn.Module, share: float = 1.0) -> int:
    """How many weights of `layer` its mask keeps; where it has none with values, `share` of all."""
    mask = getattr(layer, MASK, None)
    if type(mask) is Tensor and not mask.is_meta:  # a fake one is of a class of its own
        return int(torch.count_nonzero(mask))
    return kept_of(cast(Tensor, layer.weight).numel(), share)


def smaller(dense: Stored, elements: int, kept: int, bits: int, dtype: torch.dtype) -> list[Stored]:
    """`dense`, or where that takes fewer bytes a bitmask of its `elements` and the `kept` values.

    `bits`, `dtype`: of a value; below 8 bits they are packed.
    """
    if bitmask_bytes(elements, kept, bits) >= data_bytes([dense]):
        return [dense]
    mask = (f"{dense[0]}.bitmask", torch.uint8, (math.ceil(elements / 8),))
    name = f"{dense[0]}.values"
    return [mask, (name, dtype, (kept,)) if bits >= 8 else (name, torch.uint8, (math.ceil(kept * bits / 8),))]


def layer_bytes(model: nn.Module, name: str, grid: Grid, share: float = 1.0) -> int:
    """Bytes of the tensors that the weight of the layer `name` becomes; `share` as in `layer_tensors`."""
    return data_bytes(layer_tensors(model, name, grid, share))


def model_tensors(
    model: nn.Module, planned: Mapping[str, Grid], share: Callable[[str], float] = lambda name: 1.0
) -> list[Stored]:
    """Everything that is stored of `model` with the layers of `planned` packed; tied tensors once, no masks.

    `share`: of the weights of a layer of `planned`, as in `layer_tensors`.
    """
    seen: set[int] = set()
    found: list[Stored] = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        layer, _, leaf = name.rpartition(".")
        if leaf == MASK or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if leaf == "weight" and layer in planned:
            found += layer_tensors(model, layer, planned[layer], share(layer))
        else:
            dense: Stored = (name, tensor.dtype, tuple(tensor.shape))
            masked = leaf == "weight" and hasattr(model.get_submodule(layer), MASK)
            kept = kept_weights(model.get_submodule(layer)) if masked else tensor.numel()
            found += smaller(dense, tensor.numel(), kept, 8 * tensor.itemsize, tensor.dtype)
    return _in_public(model, planned, found)


def _in_public(model: nn.Module, planned: Mapping[str, Grid], found: list[Stored]) -> list[Stored]:
    """`found` under the names, and in the parts, that a mixture's have where they can be stored in a public format."""
    alike = set(planned.values())
    bitmasks = any(name.endswith(".bitmask") for name, _, _ in found)
    if not linear_experts(model) or len(alike) != 1 or not alike.pop().symmetric or bitmasks:
        return found
    names = public_names(model, planned) or {}
    tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, dtype, shape in found}
    return [(name, t.dtype, tuple(t.shape)) for name, t in under_public_names(tensors, names).items()]


def data_bytes(tensors: Iterable[Stored]) -> int:
    """Bytes of the tensors themselves."""
    return sum(_bytes(dtype, shape) for _, dtype, shape in tensors)


def file_bytes(tensors: Iterable[Stored]) -> int:
    """Bytes of the safetensors file that holds `tensors`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in sorted(tensors, key=lambda stored: (list(CODES).index(stored[1]), stored[0])):
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
