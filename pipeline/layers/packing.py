"""Integers of 1 to 8 bits packed into int32 words, as compressed-tensors' `pack-quantized` format stores them.

Value i of a row, offset to be unsigned (q + 2^(bits-1)), takes bits [i * bits, (i + 1) * bits) of the row's words, low
bits first, across word boundaries where it falls so; the last word is filled with zeros.
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
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits}; values of 1 to 8 bits can be packed")
    return pack_unsigned((values.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8), bits)


def pack_unsigned(values: Tensor, bits: int) -> Tensor:
    """uint8 [rows, columns] below 2^bits -> int32 [rows, ceil(columns * bits / 32)]."""
    rows, columns = values.shape
    words = packed_columns(columns, bits)
    # Eight values are `bits` whole bytes, whatever the number of bits.
    eights = F.pad(values, (0, -columns % 8)).view(rows, -1, 8)
    if bits == 8:
        data = eights
    elif bits == 4:
        data = eights[..., 0::2] | (eights[..., 1::2] << 4)
    else:
        data = torch.zeros(*eights.shape[:2], bits, dtype=torch.uint8, device=values.device)
        for place in range(8):
            byte, shift = divmod(place * bits, 8)
            data[..., byte] |= eights[..., place] << shift
            if shift + bits > 8:
                data[..., byte + 1] |= eights[..., place] >> (8 - shift)
    data = data.flatten(1)
    data = F.pad(data, (0, max(0, 4 * words - data.shape[1])))[:, : 4 * words]
    return data.reshape(-1).view(torch.int32).view(rows, words)


def unpack_unsigned(packed: Tensor, bits: int, columns: int) -> Tensor:
    """int32 [rows, words] -> uint8 [rows, columns], still offset by 2^(bits-1): for callers that subtract in float."""
    if packed.stride() != (packed.shape[1], 1):  # `contiguous` leaves a dimension of one element as it is
        packed = packed.clone(memory_format=torch.contiguous_format)
    data = packed.view(torch.uint8)
    if bits == 4:
        data = torch.stack((data & 0xF, data >> 4), dim=-1).flatten(1)
    elif bits != 8:
        groups = F.pad(data, (0, -data.shape[1] % bits)).view(data.shape[0], -1, bits)
        values = torch.empty(*groups.shape[:2], 8, dtype=torch.uint8, device=packed.device)
        for place in range(8):
            byte, shift = divmod(place * bits, 8)
            value = groups[..., byte] >> shift
            if shift + bits > 8:
                value = value | (groups[..., byte + 1] << (8 - shift))
            values[..., place] = value & ((1 << bits) - 1)
        data = values.flatten(1)
    return data[:, :columns]


def unpack_int32(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack_int32`: int32 [rows, words] -> int8 [rows, columns]."""
    return (unpack_unsigned(packed, bits, columns).to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
