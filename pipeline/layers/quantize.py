"""Symmetric round-to-nearest quantization of weight rows, per row or per group of columns. Pure functions on tensors.

int8 maps the largest magnitude of a row to 127 (-128 is not used: kernels that add products in 16 bits stay exact);
int4 maps it to 7.5, so that all sixteen values are used, as compressed-tensors' min-max observer does.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {8: 127.0, 4: 7.5}
"""What the largest magnitude of a row or group becomes, by bits."""
RANGE = {8: (-127, 127), 4: (-8, 7)}


def quantize_rows(weight: Tensor, bits: int, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Float [rows, columns] -> integers int8 [rows, columns] and scales [rows, groups] in the weight's dtype.

    One scale a row where `group_size` is None, else one for each `group_size` columns, which must divide the row. The
    scale is rounded to the weight's dtype first, and the integers are those nearest to it. Zeros stay zero.
    """
    rows, columns = weight.shape
    size = columns if group_size is None else group_size
    if columns % size:
        raise ValueError(f"group_size={size} does not divide {columns} columns")
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).view(rows, columns // size, size)
    scale = (wide.abs().amax(-1) / LARGEST[bits]).to(weight.dtype)
    # A row of zeros, or one whose scale underflows, needs any scale but 0.
    scale = torch.where(scale == 0, torch.finfo(weight.dtype).eps, scale)
    low, high = RANGE[bits]
    integers = (wide / scale.to(wide.dtype).unsqueeze(-1)).round_().clamp_(low, high)
    return integers.to(torch.int8).view(rows, columns), scale


def dequantize_rows(integers: Tensor, scale: Tensor, offset: int = 0) -> Tensor:
    """(integers - offset) * scale: integers [rows, columns], scale [rows, groups] -> [rows, columns], scale's dtype."""
    rows, columns = integers.shape
    values = integers.to(scale.dtype)
    if offset:
        values = values.sub_(offset)
    return (values.view(rows, scale.shape[1], -1) * scale.unsqueeze(-1)).view(rows, columns)
