"""Magnitude pruning: zero the smallest weights of each layer, once or gradually, and train the rest to recover.

Unstructured: Han et al., 2015 (arXiv:1506.02626). N:M: keep the N largest of each M consecutive inputs (Mishra et al.,
2021, arXiv:2104.08378). Masks are buffers of the layers, held through this link's training and every later one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipeline.compression.base import Context
from pipeline.compression.pruning import Pruner
from pipeline.registry import register

if TYPE_CHECKING:
    from torch import nn


def prune_magnitude(model: nn.Module, layers: Sequence[str], sparsity: float, pattern: str | None = None) -> nn.Module:
    """`model` with masks on each named layer and the weights they prune at zero, in place.

    `sparsity`: share of each layer's weights that go, the smallest first; `pattern` 'N:M' keeps the N largest of each M
    consecutive inputs instead. Weights that an earlier mask pruned stay pruned.

    Raises:
        LeanfitError: no layers, NaN or infinity in a weight (the layer is named), or not one weight pruned.
        ValueError: `sparsity` or `pattern` is none, or M does not divide the inputs of a layer.
    """
    from pipeline.layers.schemes import require_finite
    from pipeline.layers.sparsity import mask_of, require_pruned, require_target, set_mask

    require_target(sparsity, pattern)
    require_finite(model, layers, "magnitude")
    for name in layers:
        layer = model.get_submodule(name)
        set_mask(layer, mask_of(layer.get_parameter("weight").detach().abs(), sparsity, pattern))
    require_pruned(model, layers, f"magnitude: sparsity={sparsity}")
    return model


@register("compression", "magnitude")
@dataclass(frozen=True, kw_only=True)
class Magnitude(Pruner):
    """No settings but those of all pruners."""

    by_layer: ClassVar[bool] = True

    def prune(
        self, model: nn.Module, layers: Sequence[str], sparsity: float, pattern: str | None, context: Context
    ) -> nn.Module:
        return prune_magnitude(model, layers, sparsity, pattern)
