"""SparseGPT: prune by second order, and let the weights that stay make up for those that go.

Frantar & Alistarh, 2023 (arXiv:2301.00774). Per layer, with H = X^T X over the calibration inputs and U upper
triangular with U^T U = H^-1, columns are visited in turn. Before each block of columns (each M of N:M, in every row)
the weights with the smallest w_j^2 / U_jj^2, what their going costs, are chosen on the values as they are by then; then

    e_j = w_j / U_jj where pruned, else 0;   w_k -= e_j U_jk  for all k > j

Blocks of the model are done in order, each on what the ones before it, pruned, now give. Grouped convolutions, of few
inputs an output, are pruned by magnitude.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from annotated_types import Ge

from pipeline.compression.base import Context
from pipeline.compression.pruning import Pruner
from pipeline.registry import register

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipeline.models.base import Architecture


class Pruned(NamedTuple):
    """The weights, 0 where pruned, their mask (True where kept), and the damping that the Hessian needed."""

    weight: Tensor
    mask: Tensor
    damping: float


def sparsegpt_prune(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float,
    pattern: str | None = None,
    damping: float = 0.01,
    block_size: int = 128,
    mask: Tensor | None = None,
) -> Pruned:
    """The weights of one layer [out, in], pruned and updated.

    `hessian` [in, in], float32 or float64, is not changed. `sparsity`: exactly floor(sparsity * numel) weights go, the
    same share of each block of `block_size` columns; `pattern` 'N:M' keeps N of each M consecutive inputs instead, and
    M must divide them. `damping`: what is added to the diagonal, in units of its mean, raised tenfold as often as
    needed. `mask` bool [out, in]: False where an earlier mask prunes; such weights count, and stay at 0.
    """
    import torch

    from pipeline.layers.hessian import inverse_factor
    from pipeline.layers.pattern import parse_pattern
    from pipeline.layers.pulse import alike, pulse
    from pipeline.layers.sparsity import n_of_m_mask, unstructured_mask

    rows, columns = weight.shape
    factor, used = inverse_factor(hessian, damping)
    # Transposed: a column of the weight is contiguous here. A copy: of one row, it would else be the weight itself.
    left = weight.detach().to(hessian.dtype).t().clone(memory_format=torch.contiguous_format)
    before = torch.ones_like(left, dtype=torch.bool) if mask is None else mask.t()
    kept = torch.empty_like(left, dtype=torch.bool)
    errors = torch.empty_like(left)
    keep, group = (0, 0) if pattern is None else parse_pattern(pattern)
    if group:
        if columns % group:
            raise ValueError(f"pattern={pattern}: {group} does not divide {columns} columns")
        block_size = max(group, block_size - block_size % group)
    # Weights that are yet to go: in all, and what is open to choice in the blocks from here on.
    due = max(0, int(sparsity * weight.numel() + 1e-6) - before.numel() + int(before.sum()))

    def scores(start: int, end: int) -> Tensor:
        found = left[start:end].square() / factor.diagonal()[start:end].square().unsqueeze(1)
        return found.masked_fill_(~before[start:end], -1)

    for start in alike(range(0, columns, block_size)):
        pulse()
        end = min(start + block_size, columns)
        if not group:
            open_here, open_on = int(before[start:end].sum()), int(before[start:].sum())
            # Rounded up, so that the last blocks are not left with more than they hold.
            goes = -(-due * open_here // max(1, open_on))
            due -= goes
            numel = rows * (end - start)
            kept[start:end] = unstructured_mask(scores(start, end), (goes + numel - open_here) / numel)
        for j in alike(range(start, end)):
            if group and j % group == 0:
                kept[j : j + group] = n_of_m_mask(scores(j, j + group).t(), keep, group).t()
                kept[j : j + group] &= before[j : j + group]
            errors[j] = left[j].masked_fill(kept[j], 0) / factor[j, j]
            left[j].masked_fill_(~kept[j], 0)
            left[j + 1 : end].addr_(factor[j, j + 1 : end], errors[j], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].t(), errors[start:end], alpha=-1)
    return Pruned(left.t().to(weight.dtype).contiguous(), kept.t().contiguous(), used)


def prune_sparsegpt(
    model: nn.Module,
    layers: Sequence[str],
    sparsity: float,
    batches: Iterable[Mapping[str, Tensor]],
    architecture: Architecture,
    pattern: str | None = None,
    damping: float = 0.01,
    block_size: int = 128,
    device: str = "cpu",
    facts: dict[str, Any] | None = None,
) -> nn.Module:
    """`model` with masks on each named layer, the weights they prune at zero and the others updated, in place.

    `sparsity`: share of each layer's weights that go; `pattern` 'N:M' keeps N of each M consecutive inputs instead.
    `batches`: calibration, as the model's keyword arguments. Weights that an earlier mask pruned stay pruned.
    `facts` is given the dampings, and the names of layers pruned by magnitude.

    Raises:
        LeanfitError: no layers, NaN or infinity in a weight or in a layer's inputs (the layer is named), or not one
            weight pruned.
        ValueError: `sparsity` or `pattern` is none, or M does not divide the inputs of a layer.
    """
    import torch

    from pipeline.layers.blockwise import segments
    from pipeline.layers.hessian import collect, damping_facts
    from pipeline.layers.schemes import require_finite
    from pipeline.layers.sparsity import MASK, mask_of, require_pruned, require_target, set_mask

    require_target(sparsity, pattern)
    require_finite(model, layers, "sparsegpt")
    dampings: dict[str, float] = {}
    by_magnitude: list[str] = []
    for segment in segments(model, architecture, layers, batches, device):
        dense = [name for name in segment.layers if getattr(model.get_submodule(name), "groups", 1) == 1]
        sums = collect(segment, dense, full=True)
        for name in segment.layers:
            layer = model.get_submodule(name)
            weight, old = layer.get_parameter("weight"), getattr(layer, MASK, None)
            if name not in sums:
                set_mask(layer, mask_of(weight.detach().abs(), sparsity, pattern))
                by_magnitude.append(name)
                continue
            found = sparsegpt_prune(
                weight.flatten(1), sums.pop(name).mean(), sparsity, pattern, damping, block_size,
                None if old is None else old.flatten(1),
            )  # fmt: skip
            with torch.no_grad():
                weight.copy_(found.weight.view(weight.shape))
            set_mask(layer, found.mask.view(weight.shape))
            dampings[name] = found.damping
            del found  # the next block runs without it
    require_pruned(model, layers, f"sparsegpt: sparsity={sparsity}")
    if facts is not None:
        facts.update(damping_facts(dampings, damping), by_magnitude=by_magnitude)
    return model


@register("compression", "sparsegpt")
@dataclass(frozen=True, kw_only=True)
class SparseGpt(Pruner):
    """`damping`: share of the mean diagonal added to the Hessian's.

    `block_size`: columns whose mask is chosen at once.
    """

    needs_calibration: ClassVar[bool] = True
    updates: ClassVar[int] = 8
    by_layer: ClassVar[bool] = True

    damping: Annotated[float, Ge(0)]
    block_size: Annotated[int, Ge(1)]

    def memory(self, model: nn.Module, context: Context) -> dict[str, int] | None:
        from pipeline.layers.holding import calibrated, largest

        known = calibrated(model, context.architecture, context.calibration and context.calibration(), context.device)
        if known is None:
            return None
        before, all_but_one = known.masks(self.layers(model, context))
        return largest(
            [
                {**known.running(known.hessians(), known.widened), "masks": before},
                {**known.solving(6, layers=1), "masks": all_but_one},
            ]
        )

    def prune(
        self, model: nn.Module, layers: Sequence[str], sparsity: float, pattern: str | None, context: Context
    ) -> nn.Module:
        assert context.calibration is not None
        return prune_sparsegpt(
            model, layers, sparsity, context.calibration(), context.architecture, pattern, self.damping,
            self.block_size, context.device, context.facts,
        )  # fmt: skip
