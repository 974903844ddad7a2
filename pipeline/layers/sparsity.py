"""Masks of pruned weights: from scores to masks, and masks on layers. Pure functions; the callbacks are in masks.py.

A mask is a persistent bool buffer `weight_mask` beside the weight, True where a weight is kept, so that checkpoints
hold it. Sources: Han et al., 2015 (arXiv:1506.02626) for magnitudes, Mishra et al., 2021 (arXiv:2104.08378) for N:M.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pipeline.errors import LeanfitError
from pipeline.layers.offload import beside
from pipeline.layers.pattern import parse_pattern

MASK = "weight_mask"


def unstructured_mask(scores: Tensor, sparsity: float) -> Tensor:
    """bool, shape of `scores`: False for exactly floor(sparsity * numel) of the lowest scores, True elsewhere."""
    mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    # The small addend: 0.7 * 10 is 6.999... in floats, and means 7.
    pruned = int(sparsity * scores.numel() + 1e-6)
    if pruned:
        mask[torch.topk(scores.flatten(), pruned, largest=False, sorted=False).indices] = False
    return mask.view(scores.shape)


def rowwise_mask(scores: Tensor, sparsity: float) -> Tensor:
    """bool, shape of `scores` [out, ...]: False for the lowest of each row, floor(sparsity * numel) in all.

    Rows prune equally many weights, but for one where the share of a row is no whole number: Wanda's comparison group
    (Sun et al., 2024, arXiv:2306.11695).
    """
    rows = scores.flatten(1)
    due = (torch.arange(rows.shape[0] + 1, dtype=torch.float64) * rows.shape[1] * sparsity + 1e-6).floor()
    ranks = rows.argsort(dim=1, stable=True).argsort(dim=1)
    return (ranks >= due.diff().to(ranks).unsqueeze(1)).view(scores.shape)


def n_of_m_mask(scores: Tensor, keep: int, block: int) -> Tensor:
    """bool, shape of `scores` [out, ...]: True for the `keep` highest of each `block` consecutive inputs of a row.

    Rows of a convolution are its flattened kernels.

    Raises:
        ValueError: `block` does not divide the row.
    """
    if scores[0].numel() % block:
        raise ValueError(f"pattern={keep}:{block}: {block} does not divide {scores[0].numel()} columns")
    blocks = scores.reshape(scores.shape[0], -1, block)
    kept = torch.topk(blocks, keep, dim=-1, sorted=False).indices
    return torch.zeros(blocks.shape, dtype=torch.bool, device=scores.device).scatter_(-1, kept, True).view(scores.shape)


def mask_of(scores: Tensor, sparsity: float, pattern: str | None) -> Tensor:
    """The mask of a layer whose weights have these `scores`: by N:M where there is a pattern, else by `sparsity`."""
    return unstructured_mask(scores, sparsity) if pattern is None else n_of_m_mask(scores, *parse_pattern(pattern))


def kept_of(elements: int, share: float) -> int:
    """How many of so many weights a mask keeps that prunes all but `share` of them, as `unstructured_mask` counts."""
    return elements - int((1 - share) * elements + 1e-6)


def bitmask_bytes(elements: int, kept: int, bits: int) -> int:
    """Bytes of a weight that is stored as one bit an element, and `kept` values of `bits` bits."""
    return math.ceil(elements / 8) + math.ceil(kept * bits / 8)


def require_pruned(model: nn.Module, layers: Sequence[str], what: str) -> None:
    """No effect is an error.

    Raises:
        LeanfitError: not one weight of the named layers is masked.
    """
    if not any(bool((~cast(Tensor, model.get_submodule(name).weight_mask)).any()) for name in layers):
        raise LeanfitError(f"{what} prunes not one weight of {len(layers)} layers")


def require_target(sparsity: float, pattern: str | None) -> None:
    """Raises ValueError: `sparsity` is not in [0, 1), or `pattern` is there and not N:M with N below M."""
    if pattern is not None:
        parse_pattern(pattern)
    elif not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} must be at least 0 and less than 1")


def set_mask(layer: nn.Module, mask: Tensor) -> None:
    """Give `layer` this mask (what was pruned before stays pruned) and zero the weights it prunes."""
    old = getattr(layer, MASK, None)
    if old is None:
        layer.register_buffer(MASK, beside(mask, cast(Tensor, layer.weight)))
    else:
        old.logical_and_(mask)
    with torch.no_grad():
        cast(Tensor, layer.weight).mul_(cast(Tensor, layer.weight_mask))


def masked_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer that has a mask, by name."""
    return ((name, module) for name, module in model.named_modules() if module._buffers.get(MASK) is not None)


def has_masks(model: nn.Module) -> bool:
    """Whether any layer of `model` is masked."""
    return next(masked_layers(model), None) is not None


@torch.no_grad()
def apply_masks(model: nn.Module) -> None:
    """Zero every weight that a mask prunes; of a weight in shards, this rank's part."""
    from torch.distributed.tensor import DTensor  # takes a while, and who loads an artifact needs none of it

    from pipeline.parallelism.shards import local, part_of

    for _, layer in masked_layers(model):
        weight, mask = cast(Tensor, layer.weight), cast(Tensor, layer.weight_mask)
        local(weight).mul_(part_of(mask, weight) if isinstance(weight, DTensor) else mask)


def is_two_of_four(weight: Tensor) -> bool:
    """Whether at most two of each four consecutive inputs of `weight` [out, in] are not zero, and some are not."""
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    kept = (weight.detach().reshape(len(weight), -1, 4) != 0).sum(-1, dtype=torch.uint8)
    return bool(kept.le(2).all()) and bool(kept.any())


def measured_sparsity(model: nn.Module, layers: Sequence[str]) -> float:
    """Share of exact zeros in the weights of the named layers, counted."""
    weights = [cast(Tensor, model.get_submodule(name).weight) for name in layers]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / sum(weight.numel() for weight in weights)
