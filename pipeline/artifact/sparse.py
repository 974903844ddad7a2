"""Sparse tensors on disk: one bit an element that says what is kept, and the kept values in order.

A tensor `x` becomes `x.bitmask` (uint8, eight elements a byte, lowest bit first, elements in row-major order) and
`x.values`: floats or int8 as they are, integers of fewer bits packed as layers/packing.py packs them. It is done where
it is smaller than the dense tensor: above 3% zeros in float32, 12.5% in int8, 25% at 4 bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.layers.packing import pack_int32, unpack_int32
from pipeline.layers.sparsity import bitmask_bytes


def pack_bits(mask: Tensor) -> Tensor:
    """bool of any shape -> uint8 [ceil(numel / 8)]."""
    flat = mask.flatten().to(torch.uint8)
    flat = F.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    return (flat * weights).sum(1, dtype=torch.int32).to(torch.uint8)


def unpack_bits(packed: Tensor, elements: int) -> Tensor:
    """uint8 [ceil(elements / 8)] -> bool [elements]."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((packed.view(-1, 1) >> shifts) & 1).flatten()[:elements].to(torch.bool)


def pack_values(values: Tensor, bits: int) -> Tensor:
    """int8 [n] of fewer than 8 bits -> uint8 [ceil(n * bits / 8)]; others as they are."""
    if bits >= 8:
        return values
    whole = pack_int32(values.view(1, -1), bits).view(torch.uint8).flatten()
    return whole[: math.ceil(values.numel() * bits / 8)].clone()


def unpack_values(packed: Tensor, elements: int, bits: int) -> Tensor:
    """Inverse of `pack_values`."""
    if bits >= 8:
        return packed
    words = F.pad(packed, (0, -packed.numel() % 4)).view(torch.int32).view(1, -1)
    return unpack_int32(words, bits, elements).flatten()


def encode(dense: Tensor, mask: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(bitmask, values) of `dense` where `mask` is True; `bits` is the width of a value, below 8 they are packed."""
    return pack_bits(mask), pack_values(taken(dense, mask), bits)


def taken(dense: Tensor, mask: Tensor) -> Tensor:
    """The values of `dense` where `mask` is True, in order."""
    return dense[mask].flatten()


def encoded_bytes(mask: Tensor, bits: int) -> int:
    """Bytes that `encode` would take."""
    return bitmask_bytes(mask.numel(), int(torch.count_nonzero(mask)), bits)


def decode(bitmask: Tensor, values: Tensor, shape: tuple[int, ...], bits: int) -> tuple[Tensor, Tensor]:
    """Inverse of `encode`: (dense, mask), both of `shape`.

    Raises:
        ValueError: the parts do not fit each other or the shape.
    """
    elements = math.prod(shape)
    if bitmask.dtype != torch.uint8 or bitmask.numel() != math.ceil(elements / 8):
        raise ValueError(f"the bitmask does not have one bit for each of {elements} elements")
    mask = unpack_bits(bitmask, elements)
    kept = int(torch.count_nonzero(mask))
    if values.numel() != (math.ceil(kept * bits / 8) if bits < 8 else kept):
        raise ValueError(f"the bitmask keeps {kept} values, {values.numel()} are stored")
    values = unpack_values(values, kept, bits)
    dense = torch.zeros(elements, dtype=values.dtype)
    dense[mask] = values
    return dense.view(shape), mask.view(shape)
