"""Sparse tensors on disk: one bit an element that says what is kept, and the kept values in order.

A tensor `x` becomes `x.bitmask` (uint8, eight elements a byte, lowest bit first, elements in row-major order) and
`x.values`: floats or int8 as they are, 4-bit integers two a byte, the first in the low half, offset by 8. It is done
where it is smaller than the dense tensor: above 3% zeros in float32, 12.5% in int8, 25% in int4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


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


def pack_nibbles(values: Tensor) -> Tensor:
    """int8 [n] in [-8, 7] -> uint8 [ceil(n / 2)]."""
    unsigned = F.pad((values + 8).to(torch.uint8), (0, values.numel() % 2))
    return unsigned[0::2] | (unsigned[1::2] << 4)


def unpack_nibbles(packed: Tensor, elements: int) -> Tensor:
    """uint8 [ceil(elements / 2)] -> int8 [elements]."""
    both = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten()[:elements]
    return both.to(torch.int8) - 8


def encode(dense: Tensor, mask: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(bitmask, values) of `dense` where `mask` is True; `bits` is the width of a value, 4 means int8 in [-8, 7]."""
    values = dense[mask].flatten()
    return pack_bits(mask), pack_nibbles(values) if bits == 4 else values


def encoded_bytes(mask: Tensor, bits: int) -> int:
    """Bytes that `encode` would take."""
    return math.ceil(mask.numel() / 8) + math.ceil(int(mask.sum()) * bits / 8)


def decode(bitmask: Tensor, values: Tensor, shape: tuple[int, ...], bits: int) -> tuple[Tensor, Tensor]:
    """Inverse of `encode`: (dense, mask), both of `shape`.

    Raises:
        ValueError: the parts do not fit each other or the shape.
    """
    elements = math.prod(shape)
    if bitmask.dtype != torch.uint8 or bitmask.numel() != math.ceil(elements / 8):
        raise ValueError(f"the bitmask does not have one bit for each of {elements} elements")
    mask = unpack_bits(bitmask, elements)
    kept = int(mask.sum())
    if values.numel() != (math.ceil(kept / 2) if bits == 4 else kept):
        raise ValueError(f"the bitmask keeps {kept} values, {values.numel()} are stored")
    values = unpack_nibbles(values, kept) if bits == 4 else values
    dense = torch.zeros(elements, dtype=values.dtype)
    dense[mask] = values
    return dense.view(shape), mask.view(shape)
