"""GPTQ: weights in few bits, each column's rounding error made good by the columns not yet rounded.

Frantar et al., 2023 (arXiv:2210.17323). Per layer, with H = X^T X over the calibration inputs and U upper triangular
with U^T U = H^-1, columns are rounded in turn:

    q_j = round(w_j);   e_j = (w_j - q_j) / U_jj;   w_k -= e_j U_jk  for all k > j

which keeps the output closest to the float layer's. Columns with the largest diagonal go first (`activation_order`),
while there are most others to make their error good; scales of groups are fixed before, so that groups stay where they
are and nothing but the usual integers, scales and zero points is stored (llm-compressor: actorder static). Blocks of
the model are done in order, each on what the ones before it, quantized, now give.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.layers.blockwise import segments
from pipeline.layers.hessian import collect, damping_facts, inverse_factor
from pipeline.layers.pulse import alike, pulse
from pipeline.layers.quantize import Grid, Quantized, find_scales, quantize_rows
from pipeline.layers.schemes import join_siblings, put, require_finite
from pipeline.layers.sparsity import MASK
from pipeline.models.base import Architecture


class Solution(NamedTuple):
    """Integers of a layer, the damping that its Hessian needed, and the loss: trace(E H E^T), E the weights' change,
    H the damped Hessian; without damping the squared change of the output, a mean over tokens."""

    quantized: Quantized
    damping: float
    loss: float


def gptq_quantize(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    damping: float = 0.01,
    block_size: int = 128,
    activation_order: bool = True,
    mask: Tensor | None = None,
) -> Solution:
    """The weights of one layer on `grid`.

    `weight` [out, in]; `hessian` [in, in], float32 or float64, is not changed. `damping`: what is added to the
    diagonal, in units of its mean, raised tenfold as often as needed. `block_size`: columns after which the others are
    brought up to date, a matter of speed alone. `mask` bool [out, in]: False where a weight is pruned; it becomes 0,
    and what the columns before would have made of it is passed on to those after.
    """
    scale, zero_point = find_scales(weight, grid)
    rows, columns = weight.shape
    order = torch.arange(columns, device=weight.device)
    if activation_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    factor, used = inverse_factor(hessian[order][:, order], damping)
    # Transposed: a column of the weight is contiguous here.
    left = weight.detach().to(hessian.dtype).t()[order].contiguous()
    kept = None if mask is None else mask.t()[order]
    integers = torch.empty(columns, rows, dtype=torch.int8, device=weight.device)
    errors = torch.empty_like(left)
    group = order // (columns if grid.group_size is None else grid.group_size)
    scales, zeros = scale.t()[group], None if zero_point is None else zero_point.t()[group]
    for start in alike(range(0, columns, block_size)):
        pulse()
        end = min(start + block_size, columns)
        for j in alike(range(start, end)):
            step, zero = scales[j], None if zeros is None else zeros[j]
            integer = (left[j] / step.to(left.dtype)).round_()
            if zero is not None:
                integer += zero
            integer.clamp_(grid.low, grid.high)
            if kept is not None:
                integer = torch.where(kept[j], integer, 0 if zero is None else zero.to(integer.dtype))
            integers[j] = integer
            offset = integer if zero is None else integer - zero
            # The product as the layer will make it, in the dtype of the scales.
            errors[j] = (left[j] - (offset.to(step.dtype) * step).to(left.dtype)) / factor[j, j]
            left[j + 1 : end].addr_(factor[j, j + 1 : end], errors[j], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].t(), errors[start:end], alpha=-1)
    integers = integers[order.argsort()].t().contiguous()
    return Solution(Quantized(integers, scale, zero_point), used, float(errors.square().sum()))


def round_with_gptq(
    model: nn.Module,
    grids: Mapping[str, Grid],
    batches: Iterable[Mapping[str, Tensor]],
    architecture: Architecture,
    *,
    damping: float = 0.01,
    activation_order: bool = True,
    block_size: int = 128,
    device: str = "cpu",
    facts: dict[str, Any] | None = None,
) -> nn.Module:
    """`model` with each layer of `grids` as packed integers on its own grid, in place, block by block.

    `batches`: calibration, as the model's keyword arguments. A group size must divide the inputs of its linear layer; a
    convolution takes one scale an output channel, and a grouped one is rounded to nearest. `facts` is given the
    dampings, and the names of layers rounded to nearest.

    Raises:
        LeanfitError: no layers, or NaN or infinity in a weight or in a layer's inputs (the layer is named).
    """
    layers = list(grids)
    require_finite(model, layers, "GPTQ")
    dampings: dict[str, float] = {}
    nearest: list[str] = []
    for segment in segments(model, architecture, layers, batches, device):
        dense = [name for name in segment.layers if getattr(model.get_submodule(name), "groups", 1) == 1]
        sums = collect(segment, dense, full=True)
        for name in segment.layers:
            layer = model.get_submodule(name)
            grid = grids[name].of(layer.get_parameter("weight"))
            weight = layer.get_parameter("weight").detach().flatten(1)
            if name not in sums:
                put(model, name, quantize_rows(weight, grid), "weight_only", **asdict(grid))
                nearest.append(name)
                continue
            mask = getattr(layer, MASK, None)
            found = gptq_quantize(
                weight, sums.pop(name).mean(), grid, damping, block_size, activation_order,
                None if mask is None else mask.flatten(1),
            )  # fmt: skip
            put(model, name, found.quantized, "weight_only", **asdict(grid))
            dampings[name] = found.damping
            del found  # the next block runs without it
    join_siblings(model)
    if facts is not None:
        facts.update(damping_facts(dampings, damping), rounded_to_nearest=nearest)
    return model
