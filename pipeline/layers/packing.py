"""Integers of 4 or 8 bits packed into int32 words, as compressed-tensors' `pack-quantized` format stores them.

Value i of a row, offset to be unsigned (q + 2^(bits-1)), takes bits [i * bits, (i + 1) * bits) of the row's words, low
bits first; the last word is filled with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def packed_columns(columns: int, bits: int) -> int:
    """int32 words that a row of `columns` values takes."""
    return -(-columns * bits // 32)


def pack_int32(values: Tensor, bits: int) -> Tensor:
    """int8 [rows, columns] in [-2^(bits-1), 2^(bits-1) - 1] -> int32 [rows, ceil(columns * bits / 32)]."""
    rows, columns = values.shape
    words = packed_columns(columns, bits)
    offset = (values.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    offset = F.pad(offset, (0, words * (32 // bits) - columns))
    if bits == 4:
        offset = offset[:, 0::2] | (offset[:, 1::2] << 4)
    elif bits != 8:
        raise ValueError(f"bits={bits}; values of 4 or 8 bits can be packed")
    return offset.contiguous().view(torch.int32).view(rows, words)


def unpack_unsigned(packed: Tensor, bits: int, columns: int) -> Tensor:
    """int32 [rows, words] -> uint8 [rows, columns], still offset by 2^(bits-1): for callers that subtract in float."""
    data = packed.contiguous().view(torch.uint8)
    if bits == 4:
        data = torch.stack((data & 0xF, data >> 4), dim=-1).flatten(1)
    return data[:, :columns]


def unpack_int32(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack_int32`: int32 [rows, words] -> int8 [rows, columns]."""
    return (unpack_unsigned(packed, bits, columns).to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
