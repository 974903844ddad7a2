"""Integers of 1 to 8 bits packed into int32 words, as compressed-tensors' `pack-quantized` format stores them.

Value i of a row, offset to be unsigned (q + 2^(bits-1)), takes bits [i * bits, (i + 1) * bits) of the row's words, low
bits first, across word boundaries where it falls so; the last word is filled with zeros.
"""

from __future__ import annotations

import math

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
    parts = -(-columns // 16)
    # Sixteen values are whole bytes, and fill whole lanes, whatever the number of bits. Flat: a view as larger elements
    # asks for strides of whole ones, even of a dimension of one element.
    data = _padded(values, 16 * parts).reshape(-1)
    *joins, (full, used) = _lanes(bits)
    for lane, held in joins:
        pairs = data.view(INTEGERS[2 * lane])
        upper = pairs >> lane
        pairs = torch.sub(pairs, upper, alpha=(1 << lane) - (1 << held), out=upper)
        data = pairs.to(INTEGERS[lane]) if 2 * held <= lane else pairs
    data = _resized(data, full, used)
    words = packed_columns(columns, bits)
    return _padded(data.view(rows, 2 * bits * parts), 4 * words).reshape(-1).view(torch.int32).view(rows, words)


def unpack_unsigned(packed: Tensor, bits: int, columns: int) -> Tensor:
    """int32 [rows, words] -> uint8 [rows, columns], still offset by 2^(bits-1): for callers that subtract in float."""
    rows, words = packed.shape
    parts = -(-4 * words // (2 * bits))
    data = _padded(packed.reshape(-1).view(torch.uint8).view(rows, 4 * words), 2 * bits * parts).reshape(-1)
    *joins, (full, used) = _lanes(bits)
    data = _resized(data, used, full).view(INTEGERS[full])
    for lane, held in reversed(joins):
        pairs = data.to(INTEGERS[2 * lane]) if 2 * held <= lane else data
        upper = pairs >> held
        data = torch.add(pairs, upper, alpha=(1 << lane) - (1 << held), out=upper).view(INTEGERS[lane])
    return data.view(rows, 16 * parts)[:, :columns]


def unpack_int32(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack_int32`: int32 [rows, words] -> int8 [rows, columns]."""
    return (unpack_unsigned(packed, bits, columns) - (1 << (bits - 1))).view(torch.int8)  # bytes wrap around


INTEGERS = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


def _lanes(bits: int) -> list[tuple[int, int]]:
    """(bits of a lane, how many of them are in use) before each step of packing, and after the last.

    A step joins neighbours: the upper of two lanes moves down to where the lower one ends. What both hold is kept in
    one of these lanes where it fits, else in one of twice the size. Full lanes end it, or lanes of 64 bits.
    """
    lane, held = 8, bits
    found = [(lane, held)]
    while held < lane < 64:
        held *= 2
        lane = lane if held <= lane else 2 * lane
        found.append((lane, held))
    return found


def _padded(data: Tensor, columns: int) -> Tensor:
    """`data` with zeros behind it, or without its last columns; `data` itself where it has so many."""
    more = columns - data.shape[1]
    return F.pad(data, (0, more)) if more else data


def _resized(data: Tensor, size: int, wanted: int) -> Tensor:
    """The bytes of `data`, in parts of `size` bits, of which each then has `wanted`: zeros behind it, or its last ones
    left out. Column by column: parts of a few bytes take two to three times as long to copy one by one.
    """
    if size == wanted:
        return data.view(torch.uint8)
    unit = math.gcd(size, wanted)
    old = data.view(torch.uint8).view(INTEGERS[unit]).view(-1, size // unit)
    made = (old.new_empty if wanted < size else old.new_zeros)(len(old), wanted // unit)
    for column in range(min(size, wanted) // unit):
        made[:, column] = old[:, column]
    return made.view(-1).view(torch.uint8)
