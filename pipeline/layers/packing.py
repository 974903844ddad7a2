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
    return pack_unsigned(values.contiguous().view(torch.uint8) + (1 << (bits - 1)), bits)  # bytes wrap around


def pack_unsigned(values: Tensor, bits: int) -> Tensor:
    """uint8 [rows, columns] below 2^bits -> int32 [rows, ceil(columns * bits / 32)].

    At 8 bits and whole words it is the memory of `values`.
    """
    rows, columns = values.shape
    eighths = -(-columns // 8)
    # Eight values are `bits` whole bytes, whatever the number of bits. Flat: a view as larger elements asks for strides
    # of whole ones, even of a dimension of one element.
    data = _padded(values, 8 * eighths).reshape(-1)
    if 8 % bits:
        eights = data.view(torch.int64)
        for lane in LANES:
            upper = eights & ~_low(lane)
            eights = eights ^ upper if lane == LANES[0] else eights.bitwise_xor_(upper)  # the first are the caller's
            eights.bitwise_or_(upper.bitwise_right_shift_(lane - lane * bits // 8))
        data = _by_column(eights.view(torch.uint8).view(-1, 8), bits)
    else:
        for held in _powers(bits):
            pairs = data.view(torch.int16)
            data = (pairs >> (8 - held)).bitwise_or_(pairs).to(torch.uint8)
    words = packed_columns(columns, bits)
    return _padded(data.reshape(rows, bits * eighths), 4 * words).reshape(-1).view(torch.int32).view(rows, words)


def unpack_unsigned(packed: Tensor, bits: int, columns: int) -> Tensor:
    """int32 [rows, words] -> uint8 [rows, columns], still offset by 2^(bits-1): for callers that subtract in float."""
    rows, words = packed.shape
    data = packed.reshape(-1).view(torch.uint8)
    if 8 % bits:
        eighths = -(-4 * words // bits)
        data = _padded(data.view(rows, 4 * words), bits * eighths).reshape(-1, bits)
        eights = _by_column(data, 8).view(-1).view(torch.int64)
        for lane in reversed(LANES):
            held = lane * bits // 8
            lower = eights & _repeated((1 << held) - 1, 2 * lane)
            eights.bitwise_xor_(lower).bitwise_left_shift_(lane - held).bitwise_or_(lower)
        data = eights.view(torch.uint8).view(rows, 8 * eighths)
    else:
        for held in reversed(_powers(bits)):
            pairs = data.to(torch.int16)
            data = (pairs << (8 - held)).bitwise_or_(pairs).bitwise_and_(((1 << held) - 1) * 0x0101).view(torch.uint8)
        data = data.view(rows, 4 * words * (8 // bits))
    return data[:, :columns]


def unpack_int32(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack_int32`: int32 [rows, words] -> int8 [rows, columns]."""
    return (unpack_unsigned(packed, bits, columns) - (1 << (bits - 1))).view(torch.int8)  # bytes wrap around


LANES = (8, 16, 32)
"""Eight values lie in one int64, a byte each. Neighbours are moved together: bytes in pairs, these in fours, these in
eights; each time what the higher of two lanes holds goes to the end of what the lower one holds."""


def _repeated(pattern: int, every: int) -> int:
    """`pattern` in an int64 again each `every` bits."""
    unsigned = sum(pattern << at for at in range(0, 64, every))
    return unsigned - (1 << 64 if unsigned >> 63 else 0)


def _low(lane: int) -> int:
    """A mask of the lower of each two lanes."""
    return _repeated((1 << lane) - 1, 2 * lane)


def _powers(bits: int) -> list[int]:
    """bits, 2 * bits, ... below 8: how much a byte holds before each step that joins two of them."""
    return [held for held in (1, 2, 4) if held >= bits]


def _padded(data: Tensor, columns: int) -> Tensor:
    """`data` with zeros behind it, or without its last columns; `data` itself where it has so many."""
    more = columns - data.shape[1]
    return F.pad(data, (0, more)) if more else data


def _by_column(data: Tensor, columns: int) -> Tensor:
    """`_padded` for rows of a few bytes, of which a copy row by row takes two to three times as long."""
    made = data.new_zeros(data.shape[0], columns)
    for column in range(min(columns, data.shape[1])):
        made[:, column] = data[:, column]
    return made
