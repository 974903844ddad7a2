"""Magnitude pruning: zero the smallest weights of each layer, once or gradually, and train the rest to recover.

Unstructured: Han et al., 2015 (arXiv:1506.02626), with the schedule of Zhu & Gupta, 2017 (arXiv:1710.01878) where it is
gradual. N:M: keep N of each M consecutive inputs (Mishra et al., 2021, arXiv:2104.08378). Masks are buffers of the
layers, held through this link's training and every later one's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from pipeline.compression.base import Context, Kind, Method
from pipeline.registry import register

if TYPE_CHECKING:
    from lightning.pytorch import Callback
    from torch import nn

GROWTH = 0.75
"""Share of the link's steps over which a gradual schedule prunes; the rest recovers at full sparsity."""
UPDATES = 50
"""How many times, at most, a gradual schedule makes its masks anew."""


def prune_magnitude(model: nn.Module, layers: Sequence[str], sparsity: float, pattern: str | None = None) -> nn.Module:
    """`model` with masks on each named layer and the weights they prune at zero, in place.

    `sparsity`: share of each layer's weights that go, the smallest first; `pattern` 'N:M' keeps the N largest of each M
    consecutive inputs instead. Weights that an earlier mask pruned stay pruned.

    Raises:
        LeanfitError: no layers, NaN or infinity in a weight (the layer is named), or not one weight pruned.
    """
    import torch

    from pipeline.errors import LeanfitError
    from pipeline.layers.sparsity import n_of_m_mask, parse_pattern, set_mask, unstructured_mask

    pruned = 0
    for name in layers:
        layer = model.get_submodule(name)
        weight = layer.get_parameter("weight").detach()
        if not torch.isfinite(weight).all():
            raise LeanfitError(f"magnitude: the weight of {name} holds NaN or infinity: its training diverged")
        scores = weight.abs()
        mask = unstructured_mask(scores, sparsity) if pattern is None else n_of_m_mask(scores, *parse_pattern(pattern))
        pruned += int((~mask).sum())
        set_mask(layer, mask)
    if not pruned:
        raise LeanfitError(f"magnitude: sparsity={sparsity} prunes not one weight of {len(layers)} layers")
    return model


@register("compression", "magnitude")
@dataclass(frozen=True, kw_only=True)
class Magnitude(Method):
    """`pattern` 'N:M' says by itself how much is pruned: `sparsity` is for pruning without a pattern.

    `steps`, `lr`: the recovery's; steps=0 prunes only. `ignore`: names or patterns of layers to spare.
    """

    kind: ClassVar[Kind] = "pruning"
    trains: ClassVar[bool] = True
    cannot_follow: ClassVar[frozenset[str]] = frozenset({"quantization"})

    sparsity: Annotated[float, Ge(0), Lt(1)]
    pattern: str | None
    schedule: Literal["once", "cubic"]
    steps: Annotated[int, Ge(0)] | None
    lr: Annotated[float, Gt(0)] | None
    ignore: tuple[str, ...]

    def problems(self) -> list[str]:
        """Settings that contradict each other. Imports no torch."""
        if self.pattern is None:
            no_effect = f"compression.{self.name}.sparsity=0 prunes nothing; choose more than 0, 0.5 say"
            return [no_effect] if self.sparsity == 0 else []
        if not re.fullmatch(r"[1-9]\d?:[1-9]\d?", self.pattern):
            return [f"compression.{self.name}.pattern={self.pattern} must be N:M such as 2:4, or null"]
        keep, block = map(int, self.pattern.split(":"))
        if keep >= block:
            return [
                f"compression.{self.name}.pattern={self.pattern} prunes nothing: N:M keeps N of each M, as 2:4 does"
            ]
        if self.schedule == "cubic":
            return [f"compression.{self.name}.schedule=cubic grows a sparsity; with a pattern choose schedule=once"]
        return []

    def target(self) -> float:
        """The share of weights to prune: what the pattern implies where there is one, else `sparsity`."""
        if self.pattern is None:
            return self.sparsity
        keep, block = map(int, self.pattern.split(":"))
        return 1 - keep / block

    def preflight(self, model: nn.Module, context: Context) -> list[str]:
        from pipeline.layers.select import pattern_problems, select, selection_problems

        key = f"compression.{context.stage}"
        problems = selection_problems(model, context.architecture, self.ignore, key)
        if problems:
            return problems
        layers = select(model, context.architecture, self.ignore).layers
        if self.pattern is not None:
            return pattern_problems(model, layers, self.pattern, key)
        largest = max(model.get_submodule(name).get_parameter("weight").numel() for name in layers)
        if int(self.sparsity * largest + 1e-6) == 0:
            return [f"{key}.sparsity={self.sparsity} prunes not one weight of the largest layer ({largest} weights)"]
        return []

    def prepare(self, model: nn.Module, context: Context) -> nn.Module:
        """Masks: final ones, or ones that keep all where a fit will grow them (its checkpoints need the buffers)."""
        import torch

        from pipeline.layers.sparsity import set_mask

        layers = self._layers(model, context)
        if self.schedule == "once" or context.steps == 0:
            return prune_magnitude(model, layers, self.sparsity, self.pattern)
        for name in layers:
            layer = model.get_submodule(name)
            set_mask(layer, torch.ones_like(layer.get_parameter("weight"), dtype=torch.bool))
        return model

    def callbacks(self, context: Context) -> list[Callback]:
        from pipeline.layers.masks import GradualMasks, HoldMasks

        if self.schedule == "once":
            return [HoldMasks()]

        def prune(module: nn.Module, sparsity: float) -> None:
            # The callback sees Lightning's module around the model; names are the model's.
            root = _root(module, context.architecture.blocks[0].name if context.architecture.blocks else "")
            layers = self._layers(root, context)
            if any(int(sparsity * root.get_submodule(name).get_parameter("weight").numel()) for name in layers):
                prune_magnitude(root, layers, sparsity)

        until = max(1, int(GROWTH * context.steps))
        return [GradualMasks(prune, self.sparsity, until, every=-(-until // UPDATES))]

    def finalize(self, model: nn.Module, context: Context) -> nn.Module:
        from pipeline.errors import LeanfitError
        from pipeline.layers.sparsity import apply_masks, has_masks, measured_sparsity

        apply_masks(model)
        layers = self._layers(model, context)
        total = sum(model.get_submodule(name).get_parameter("weight").numel() for name in layers)
        # Each layer rounds down to whole weights.
        reached = measured_sparsity(model, layers)
        if not has_masks(model) or reached < self.target() - len(layers) / total - 1e-6:
            raise LeanfitError(
                f"{context.stage}: the schedule ended at sparsity {reached:.4f}, short of {self.target()}"
            )
        return model

    def detail(self, model: nn.Module, context: Context) -> dict[str, Any]:
        from pipeline.layers.select import select
        from pipeline.layers.sparsity import measured_sparsity

        selection = select(model, context.architecture, self.ignore)
        by_layer = {name: measured_sparsity(model, [name]) for name in selection.layers}
        return {
            "layers": len(selection.layers),
            "layer_names": list(selection.layers),
            "sparsity": measured_sparsity(model, selection.layers),
            "sparsity_by_layer": by_layer,
            "sparsity_target": self.target(),
            "pattern": self.pattern,
            "left_alone": selection.left_in_float,
        }

    def _layers(self, model: nn.Module, context: Context) -> tuple[str, ...]:
        from pipeline.layers.select import select

        return select(model, context.architecture, self.ignore).layers


def _root(module: nn.Module, known: str) -> nn.Module:
    """The module inside `module` in which `known` is a submodule's name."""
    for candidate in module.modules():
        if known in dict(candidate.named_modules()):
            return candidate
    raise KeyError(known)
