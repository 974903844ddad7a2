"""What pruners share: sparsity or N:M, at once or on a cubic schedule, masks held through recovery and later links.

The schedule: s_t = s_f (1 - (1 - t/T)^3), Zhu & Gupta, 2017 (arXiv:1710.01878). With a pattern N:M it lowers the number
kept of each M from M to N. A pruner says only which weights go: `prune`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from pipeline.compression.base import Context, Kind, Method
from pipeline.layers.pattern import parse_pattern

if TYPE_CHECKING:
    from lightning.pytorch import Callback
    from torch import nn

GROWTH = 0.75
"""Share of the link's steps over which a gradual schedule prunes; the rest recovers at full sparsity."""


@dataclass(frozen=True, kw_only=True)
class Pruner(Method):
    """`sparsity`: share of the weights that go; `pattern` 'N:M' keeps N of each M consecutive inputs.

    `schedule`: `once`, or `cubic` over the link's own training. `steps`, `lr`: the recovery's; steps=0 prunes only.
    `ignore`: names or patterns of layers to spare.
    """

    kind: ClassVar[Kind] = "pruning"
    trains: ClassVar[bool] = True
    cannot_follow: ClassVar[frozenset[str]] = frozenset({"quantization"})
    updates: ClassVar[int] = 50
    """How many times, at most, a gradual schedule makes its masks anew."""
    by_layer: ClassVar[bool] = False
    """Whether `sparsity` is a layer's: all its weights compete, so that one that is reached already prunes no more."""

    sparsity: Annotated[float, Ge(0), Lt(1)] | None
    pattern: str | None
    schedule: Literal["once", "cubic"]
    steps: Annotated[int, Ge(0)] | None
    lr: Annotated[float, Gt(0)] | None
    ignore: tuple[str, ...]

    @abstractmethod
    def prune(
        self, model: nn.Module, layers: Sequence[str], sparsity: float, pattern: str | None, context: Context
    ) -> nn.Module:
        """`model` with masks on each named layer and the weights they prune at zero, in place.

        Raises:
            LeanfitError: no layers, NaN or infinity in a weight (the layer is named), or not one weight pruned.
        """

    @property
    def trains_in_shards(self) -> bool:
        return self.schedule == "once"  # growing masks look at whole weights

    def problems(self) -> list[str]:
        """Settings that contradict each other. Imports no torch."""
        key, found = f"compression.{self.name}", []
        if self.schedule == "cubic" and self.steps == 0:
            found.append(
                f"{key}.schedule=cubic prunes over the link's own training, of which {key}.steps=0 leaves none; "
                f"give {key}.steps=STEPS, or choose {key}.schedule=once"
            )
        return [*found, *self._target_problems(key)]

    def _target_problems(self, key: str) -> list[str]:
        """A sparsity and a pattern that contradict each other, or prune nothing."""
        if self.pattern is None:
            if not self.sparsity:
                return [f"{key}.sparsity={_shown(self.sparsity)} prunes nothing; choose more than 0, 0.5 say"]
            return []
        try:
            keep, block = parse_pattern(self.pattern)
        except ValueError as error:
            return [f"{key}.{error}"]
        if self.sparsity is not None and abs(self.sparsity - (1 - keep / block)) > 1e-3:
            return [
                f"{key}.pattern={self.pattern} prunes {1 - keep / block:g} of the weights, {key}.sparsity says "
                f"{self.sparsity:g}; set sparsity=null, or the same"
            ]
        return []

    def target(self) -> float:
        """The share of weights to prune: what the pattern implies where there is one, else `sparsity`."""
        if self.pattern is None:
            return self.sparsity or 0.0
        keep, block = parse_pattern(self.pattern)
        return 1 - keep / block

    def adds_to(self, earlier: Pruner) -> bool:
        """Whether this link may prune anything of layers that `earlier` has pruned: masks only grow. Imports no torch.

        Without a pattern a smaller target counts as nothing, though it may be one for single rows.
        """
        if not set(earlier.ignore) <= set(self.ignore):
            return True  # it may have spared layers that this one prunes
        if self.pattern is None:
            alike = self.by_layer or type(self) is type(earlier)
            return self.target() > earlier.target() or (self.target() == earlier.target() and not alike)
        if earlier.pattern is None:
            return True
        (had, wide), (keep, block) = map(parse_pattern, (earlier.pattern, self.pattern))
        if block % wide == 0:
            return had * (block // wide) > keep
        return wide % block != 0 or had > keep

    def entering(self, model: nn.Module) -> nn.Module:
        from pipeline.layers.select import split_experts

        return split_experts(model, self.ignore)

    def layers(self, model: nn.Module, context: Context) -> tuple[str, ...]:
        """Names of the layers that are pruned."""
        from pipeline.layers.select import select

        return select(model, context.architecture, self.ignore).layers

    def preflight(self, model: nn.Module, context: Context) -> list[str]:
        from pipeline.layers.select import pattern_problems, selection_problems

        key = f"compression.{context.stage}"
        problems = selection_problems(model, context.architecture, self.ignore, key)
        if problems:
            return problems
        layers = self.layers(model, context)
        if self.pattern is not None:
            return pattern_problems(model, layers, self.pattern, key)
        largest = max(model.get_submodule(name).get_parameter("weight").numel() for name in layers)
        if int(self.target() * largest + 1e-6) == 0:
            return [f"{key}.sparsity={self.sparsity} prunes not one weight of the largest layer ({largest} weights)"]
        return []

    def prepare(self, model: nn.Module, context: Context) -> nn.Module:
        """Masks: final ones, or ones that keep all where a fit will grow them (its checkpoints need the buffers)."""
        import torch

        from pipeline.layers.sparsity import set_mask

        layers = self.layers(model, context)
        if self.schedule == "once" or context.steps == 0:
            return self.prune(model, layers, self.target(), self.pattern, context)
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
            layers = self.layers(root, context)
            pattern = self.pattern_at(sparsity)
            if self.pattern is not None and pattern is None:
                return
            if any(int(sparsity * root.get_submodule(name).get_parameter("weight").numel()) for name in layers):
                self.prune(root, layers, sparsity, pattern, context)

        until = max(1, int(GROWTH * context.steps))
        every = -(-until // self.updates)
        return [GradualMasks(prune, self.target(), until, every, context.facts)]

    def pattern_at(self, sparsity: float) -> str | None:
        """The pattern due at a sparsity on the way: as few kept of each M as it allows; None where that is all M."""
        if self.pattern is None:
            return None
        keep, block = parse_pattern(self.pattern)
        due = max(keep, math.ceil(block * (1 - sparsity) - 1e-6))
        return None if due >= block else f"{due}:{block}"

    def memory(self, model: nn.Module, context: Context) -> dict[str, int] | None:
        """Scores, of which the lowest are picked with their places, beside the masks."""
        from pipeline.layers.holding import layer_work, masks

        layers, kept = self.layers(model, context), 1 - self.target()
        picked = self.target() if self.pattern is None else kept
        work = layer_work(model, layers, lambda itemsize: max(9, itemsize + picked * (itemsize + 8)))
        return {**work, "masks": masks(model, layers)}

    def finalize(self, model: nn.Module, context: Context) -> nn.Module:
        from pipeline.errors import LeanfitError
        from pipeline.layers.sparsity import apply_masks, has_masks, measured_sparsity

        apply_masks(model)
        layers = self.layers(model, context)
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
            **({} if self.schedule == "once" else {"schedule": self.schedule}),
            **({} if self.pattern is None else {"kernel": self.kernels(model, selection.layers)}),
            "left_alone": selection.left_in_float,
        }

    def kernels(self, model: nn.Module, layers: Sequence[str]) -> dict[str, int]:
        """By what layers of an N:M pattern run on the device of `model` once the artifact is opened, counted."""
        from pipeline.layers.sparse24 import said_of

        return dict(Counter(said_of(model.get_submodule(name).get_parameter("weight")) for name in layers))


def _shown(value: float | None) -> str:
    return "null" if value is None else f"{value:g}"


def _root(module: nn.Module, known: str) -> nn.Module:
    """The module inside `module` in which `known` is a submodule's name."""
    for candidate in module.modules():
        if known in dict(candidate.named_modules()):
            return candidate
    raise KeyError(known)


def kept_share(methods: Iterable[Method], name: str | None = None) -> float:
    """Of weights under a mask, how many are not pruned, by what the links of `methods` declare: 1 where none prunes.

    `name`: of this layer alone, which they may spare.
    """
    from pipeline.layers.select import matches

    shares = [
        1 - method.target()
        for method in methods
        if isinstance(method, Pruner) and not (name and any(matches(name, pattern) for pattern in method.ignore))
    ]
    return min(shares, default=1.0)
