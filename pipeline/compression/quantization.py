"""What quantizers share: which layers they touch, what they refuse before anything is trained, what they report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt

from pipeline.compression.base import Context, Kind, Method

if TYPE_CHECKING:
    from torch import nn

    from pipeline.layers.quantize import Grid

Bits = Literal[2, 3, 4, 8]


@dataclass(frozen=True, kw_only=True)
class Quantizer(Method):
    """`ignore`: module names, last components or fnmatch patterns of layers to leave in float."""

    kind: ClassVar[Kind] = "quantization"
    cannot_follow: ClassVar[frozenset[str]] = frozenset({"quantization"})

    ignore: tuple[str, ...]

    def entering(self, model: nn.Module) -> nn.Module:
        from pipeline.layers.select import split_experts

        return split_experts(model, self.ignore)

    def types(self) -> tuple[type[nn.Module], ...]:
        """Classes of the layers that are quantized."""
        from torch import nn

        return nn.Linear, nn.Conv2d

    def layers(self, model: nn.Module, context: Context) -> tuple[str, ...]:
        """Names of the layers that are quantized."""
        from pipeline.layers.select import select

        return select(model, context.architecture, self.ignore, self.types()).layers

    def form(self, context: Context) -> tuple[str, dict[str, Any]] | None:
        """(scheme, settings) of the layers it leaves (`layers/schemes.py`); None where values decide."""
        return None

    def left(self, model: nn.Module, context: Context) -> nn.Module | None:
        from pipeline.layers.schemes import with_room

        form = self.form(context)
        return None if form is None else with_room(model, self.layers(model, context), form[0], **form[1])

    def preflight(self, model: nn.Module, context: Context) -> list[str]:
        from pipeline.layers.select import selection_problems

        return selection_problems(
            model, context.architecture, self.ignore, f"compression.{context.stage}", self.types()
        )

    def memory(self, model: nn.Module, context: Context) -> dict[str, int] | None:
        from pipeline.layers.holding import layer_work, rounded

        form = self.form(context)
        return None if form is None else layer_work(model, self.layers(model, context), rounded, form)

    def detail(self, model: nn.Module, context: Context) -> dict[str, Any]:
        from pipeline.layers.schemes import quantization_detail

        return quantization_detail(model, context.architecture, self.ignore, self.types())

    def share_flat(self, context: Context) -> bool:
        """Whether a flattened input takes one activation scale: as in language models (see layers/linear.py)."""
        return bool(context.architecture.embeddings)


@dataclass(frozen=True, kw_only=True)
class Int8Quantizer(Quantizer):
    """A quantizer to int8 weights and activations, these with a scale for each token."""

    def form(self, context: Context) -> tuple[str, dict[str, Any]]:
        return "int8", {"share_flat": self.share_flat(context)}


@dataclass(frozen=True, kw_only=True)
class TableQuantizer(Quantizer):
    """`embeddings`: quantize nn.Embedding and nn.EmbeddingBag too, where they are not tied to another layer."""

    embeddings: bool

    def types(self) -> tuple[type[nn.Module], ...]:
        from torch import nn

        return (*super().types(), *((nn.Embedding, nn.EmbeddingBag) if self.embeddings else ()))


@dataclass(frozen=True, kw_only=True)
class GroupQuantizer(Quantizer):
    """A quantizer to few bits on a grid of groups.

    `group_size`: inputs that share a scale, null for a whole row (a convolution's channel always is one).
    `symmetric`: no zero points.
    """

    bits: Bits
    group_size: Annotated[int, Ge(2)] | None
    symmetric: bool

    def grid(self) -> Grid:
        from pipeline.layers.quantize import Grid

        return Grid(self.bits, self.group_size, self.symmetric)

    def grid_settings(self) -> dict[str, Any]:
        """The grid as the weight-only layers take it."""
        return asdict(self.grid())

    def form(self, context: Context) -> tuple[str, dict[str, Any]]:
        return "weight_only", self.grid_settings()

    def preflight(self, model: nn.Module, context: Context) -> list[str]:
        from pipeline.layers.select import group_problems

        problems = super().preflight(model, context)
        if problems or self.group_size is None:
            return problems
        key = f"compression.{context.stage}"
        return group_problems(model, self.layers(model, context), self.group_size, key)

    def detail(self, model: nn.Module, context: Context) -> dict[str, Any]:
        return {**super().detail(model, context), "group_size": self.group_size, "symmetric": self.symmetric}


def norm_problems(context: Context, verb: str, other: str) -> list[str]:
    """A message where no norm stands before linear layers, whose scale could be moved; `other` does without."""
    if any(block.norms for block in context.architecture.blocks):
        return []
    said = f"compression.{context.stage}: the model has no norm in front of linear layers to {verb}"
    return [f"{said}; choose {other}"]


@dataclass(frozen=True, kw_only=True)
class QuantizationAware(Method):
    """What training with quantized weights adds to a quantizer: `steps` and `lr` of the link's own fit.

    `untrained`: the method that rounds at once, for the message about steps=0.
    """

    trains: ClassVar[bool] = True
    untrained: ClassVar[str]

    steps: Annotated[int, Ge(0)] | None
    lr: Annotated[float, Gt(0)] | None

    @property
    def trains_in_shards(self) -> bool:
        return True

    def problems(self) -> list[str]:
        """steps=0 trains nothing. Imports no torch."""
        if self.steps != 0:
            return []
        return [
            f"compression.{self.name}.steps=0 trains nothing, which is round to nearest: use compression="
            f"{self.untrained}, or give steps (null: a quarter of trainer.max_steps)"
        ]
