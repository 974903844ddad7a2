"""Round-to-nearest quantization of weight rows to integers, per row or per group of columns. Pure functions on tensors.

Symmetric: w = q * scale, zeros stay zero. 8 bits map the largest magnitude of a row to 127 (-128 is not used: kernels
that add products in 16 bits stay exact); fewer bits map it to half a step above the largest integer (7.5 at 4 bits), so
that all values are used, as compressed-tensors' min-max observer does.
Asymmetric: w = (q - zero) * scale, with `zero` an integer of the same range, so that float zero is kept exactly; the
range from the smallest to the largest weight of a group, zero included, is divided into 2^bits - 1 steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Grid:
    """How a row of weights lies on integers: `bits`, one scale for `group_size` columns (None: a row), zero points."""

    bits: int
    group_size: int | None = None
    symmetric: bool = True

    @property
    def low(self) -> int:
        return -127 if self.symmetric and self.bits == 8 else -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def largest(self) -> float:
        """What the largest magnitude of a symmetric group becomes."""
        return 127.0 if self.bits == 8 else self.high + 0.5

    def of(self, weight: Tensor) -> Grid:
        """The grid of this very weight: a convolution's channel always is one group, for filters are short."""
        return self if weight.ndim == 2 else replace(self, group_size=None)

    def grouped(self, rows: Tensor) -> Tensor:
        """[rows, columns] -> [rows, groups, columns of a group].

        Raises:
            ValueError: the group size does not divide the columns.
        """
        columns = rows.shape[1]
        size = columns if self.group_size is None else self.group_size
        if columns % size:
            raise ValueError(f"group_size={size} does not divide {columns} columns")
        return rows.view(rows.shape[0], columns // size, size)


@dataclass(frozen=True)
class Quantized:
    """Integers int8 [rows, columns]; scales [rows, groups] in the weight's dtype; zero points int8, None if none."""

    integers: Tensor
    scale: Tensor
    zero_point: Tensor | None = None

    def dequantized(self) -> Tensor:
        """[rows, columns] in the scales' dtype."""
        return dequantize_rows(self.integers, self.scale, self.zero_point)


def find_scales(weight: Tensor, grid: Grid, shrink: float | Tensor = 1.0) -> tuple[Tensor, Tensor | None]:
    """Scales [rows, groups] in the weight's dtype, and zero points int8 [rows, groups] of an asymmetric grid.

    `shrink` narrows the range that the scales span, so that outliers are clipped: a number, or [rows, groups].
    """
    groups = grid.grouped(wide(weight))
    if grid.symmetric:
        most = torch.maximum(groups.amax(-1), -groups.amin(-1))  # a third of the time of their magnitudes' largest
        scale = (most * shrink / grid.largest).to(weight.dtype)
        # A group of zeros, or one whose scale underflows, needs any scale but 0.
        return torch.where(scale == 0, torch.finfo(weight.dtype).eps, scale), None
    least, most = groups.amin(-1).clamp_max(0) * shrink, groups.amax(-1).clamp_min(0) * shrink
    scale = ((most - least) / (grid.high - grid.low)).to(weight.dtype)
    scale = torch.where(scale == 0, torch.finfo(weight.dtype).eps, scale)
    zero = (grid.low - least / scale.to(least.dtype)).round_().clamp_(grid.low, grid.high)
    return scale, zero.to(torch.int8)


def to_integers(weight: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Weights [rows, columns] to the nearest integers int8 under scales, and zero points, [rows, groups]."""
    groups = grid.grouped(wide(weight))
    integers = (groups / scale.to(groups.dtype).unsqueeze(-1)).round_()
    if zero_point is not None:
        integers += zero_point.unsqueeze(-1)
    return integers.clamp_(grid.low, grid.high).to(torch.int8).view(weight.shape)


def quantize_rows(weight: Tensor, grid: Grid, shrink: float | Tensor = 1.0) -> Quantized:
    """Float [rows, columns], rounded to nearest. Scales are rounded to the weight's dtype before integers are found."""
    scale, zero_point = find_scales(weight, grid, shrink)
    return Quantized(to_integers(weight, scale, zero_point, grid), scale, zero_point)


def dequantize_rows(integers: Tensor, scale: Tensor, zero_point: Tensor | None = None, offset: int = 0) -> Tensor:
    """(integers - offset - zero) * scale: [rows, columns] and [rows, groups] -> [rows, columns], the scales' dtype."""
    rows, columns = integers.shape
    values = integers.to(scale.dtype)
    if offset:
        values = values.sub_(offset)
    groups = values.view(rows, scale.shape[1], values.shape[1] // scale.shape[1])
    if zero_point is not None:
        groups = groups - zero_point.to(scale.dtype).unsqueeze(-1)
    return (groups * scale.unsqueeze(-1)).view(rows, columns)


def is_finite(weight: Tensor) -> bool:
    """Whether `weight` holds neither NaN nor infinity.

    Its norm is found thirty times as fast as each value is asked. It is infinite where squares overflow, too; then its
    largest and its smallest value tell, one of which NaN or infinity would be.
    """
    weight = weight.detach()
    if not weight.numel() or math.isfinite(float(torch.linalg.vector_norm(weight))):
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all())


def not_finite(weights: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first of `weights` that holds NaN or infinity; None where there is none."""
    return next((name for name, weight in weights if weight.is_floating_point() and not is_finite(weight)), None)


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or in float64 where it is that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def wide(weight: Tensor) -> Tensor:
    """`weight` outside of autograd, in float32 at least."""
    return at_least_float32(weight.detach())
