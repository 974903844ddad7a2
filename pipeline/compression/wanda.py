"""Wanda: prune the weights that are small against their inputs, each output by itself; no gradients, no updates.

Sun et al., 2024 (arXiv:2306.11695): the score of a weight is |W_ij| * ||X_j||_2, the norm over all calibration tokens,
and the weights of one output (a row) are compared with one another; with N:M, those of M consecutive inputs. Blocks of
the model are done in order, each on what the ones before it, pruned, now give. A convolution's inputs are its patches:
one norm for each channel and kernel position, in grouped convolutions too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.compression.base import Context
from pipeline.compression.pruning import Pruner
from pipeline.registry import register

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipeline.models.base import Architecture


def wanda_scores(weight: Tensor, squares: Tensor, groups: int = 1) -> Tensor:
    """|W_ij| * ||X_j||_2 as float [out, columns].

    `weight` [out, ...], flattened to [out, columns]; `squares` [groups * columns]: sums, or means, over tokens of the
    squared inputs, group by group of the convolution.
    """
    rows = weight.detach().flatten(1).to(squares.dtype).abs()
    norms = squares.sqrt().view(groups, 1, -1)
    return (rows.view(groups, -1, rows.shape[1]) * norms).view(rows.shape)


def prune_wanda(
    model: nn.Module,
    layers: Sequence[str],
    sparsity: float,
    batches: Iterable[Mapping[str, Tensor]],
    architecture: Architecture,
    pattern: str | None = None,
    device: str = "cpu",
    facts: dict[str, Any] | None = None,
) -> nn.Module:
    """`model` with masks on each named layer and the weights they prune at zero, in place, block by block.

    `sparsity`: share of each row's weights that go; `pattern` 'N:M' keeps N of each M consecutive inputs instead.
    `batches`: calibration, as the model's keyword arguments. Weights that an earlier mask pruned stay pruned.
    `facts` is given the names of layers pruned by magnitude: those that calibration never reaches.

    Raises:
        LeanfitError: no layers, NaN or infinity in a weight or in a layer's inputs (the layer is named), or not one
            weight pruned.
        ValueError: `sparsity` or `pattern` is none, or M does not divide the inputs of a layer.
    """
    from pipeline.layers.blockwise import segments
    from pipeline.layers.hessian import collect
    from pipeline.layers.pattern import parse_pattern
    from pipeline.layers.schemes import require_finite
    from pipeline.layers.sparsity import MASK, n_of_m_mask, require_pruned, require_target, rowwise_mask, set_mask

    require_target(sparsity, pattern)
    require_finite(model, layers, "wanda")
    by_magnitude: list[str] = []
    for segment in segments(model, architecture, layers, batches, device):
        sums = collect(segment, segment.layers, full=False)
        for name in segment.layers:
            layer = model.get_submodule(name)
            weight, old = layer.get_parameter("weight"), getattr(layer, MASK, None)
            if name in sums:
                scores = wanda_scores(weight, sums.pop(name).mean(), int(getattr(layer, "groups", 1)))
            else:
                scores = weight.detach().flatten(1).abs()
                by_magnitude.append(name)
            if old is not None:  # below those whose inputs are always zero
                scores.masked_fill_(~old.flatten(1), -1)
            mask = rowwise_mask(scores, sparsity) if pattern is None else n_of_m_mask(scores, *parse_pattern(pattern))
            set_mask(layer, mask.view(weight.shape))
            del scores  # the next block runs without them
    require_pruned(model, layers, f"wanda: sparsity={sparsity}")
    if facts is not None:
        facts.update(by_magnitude=by_magnitude)
    return model


@register("compression", "wanda")
@dataclass(frozen=True, kw_only=True)
class Wanda(Pruner):
    """No settings but those of all pruners."""

    needs_calibration: ClassVar[bool] = True
    updates: ClassVar[int] = 8

    def memory(self, model: nn.Module, context: Context) -> dict[str, int] | None:
        from pipeline.layers.holding import calibrated, largest

        known = calibrated(model, context.architecture, context.calibration and context.calibration(), context.device)
        if known is None:
            return None
        layers = self.layers(model, context)
        # Scores, then ranks by sorting them and their order; with N:M half of the scores and where they are.
        octets = known.wide + (24 if self.pattern is None else known.wide // 2 + 5)
        before, all_but_one = known.masks(layers)
        return largest(
            [
                {**known.running(copied=known.widened + known.wide), "masks": before},
                {**known.ranking(octets), "masks": all_but_one},
            ]
        )

    def prune(
        self, model: nn.Module, layers: Sequence[str], sparsity: float, pattern: str | None, context: Context
    ) -> nn.Module:
        assert context.calibration is not None
        return prune_wanda(
            model, layers, sparsity, context.calibration(), context.architecture, pattern, context.device,
            context.facts,
        )  # fmt: skip
