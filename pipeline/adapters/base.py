"""What every adapter choice offers: few parameters that stage 0 trains beside frozen weights.

    attach (after the base model is made) -> stage 0's fit: the optimizer sees adapters alone -> merge

After `merge` the model is a plain one again, equal up to rounding: later links and the artifact see no adapters.

QLoRA (Dettmers et al., 2023, arXiv:2305.14314) is an adapter and a first link that `holds_adapters`, as `nf4` does.
The link is then applied before stage 0: frozen layers lie in NF4 while adapters train, so weights take an eighth of
float32. They are never merged for the artifact, for rounding again would undo part of what was trained: it holds the
codes and, beside them, the adapters' tensors. `before` is the dense model that this stands for (decoded weights with
adapters merged into them), so that size and speed are compared with what would be deployed otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge, Gt, Lt

if TYPE_CHECKING:
    from torch import nn

    from pipeline.models.base import Architecture


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An `adapter` choice."""

    trains: ClassVar[bool] = False
    """Whether there is an adapter at all."""

    name: str

    def preflight(self, model: nn.Module, architecture: Architecture) -> list[str]:
        """Problems that need the model's shapes. `model` is on the meta device."""
        return []

    def attach(self, model: nn.Module, architecture: Architecture, seed: int) -> nn.Module:
        """`model` with adapters, in place, and all else frozen. `architecture` is that of the model without them."""
        return model

    def merge(self, model: nn.Module) -> nn.Module:
        """`model` as a plain one, in place; adapters over quantized weights stay."""
        return model


@dataclass(frozen=True, kw_only=True)
class LowRankAdapter(Adapter):
    """`rank` r; `alpha`: what the adapter adds is multiplied by alpha / r, or by alpha / sqrt(r) where `rslora`.

    `dropout`: share of the adapter's inputs that are dropped in training.
    `targets`: names, last components or fnmatch patterns of linear layers; null: all of the blocks (of the whole model
    where it has no blocks with linear layers).
    """

    trains: ClassVar[bool] = True
    magnitude: ClassVar[bool] = False

    rank: Annotated[int, Ge(1)]
    alpha: Annotated[float, Gt(0)]
    dropout: Annotated[float, Ge(0), Lt(1)]
    targets: tuple[str, ...] | None
    rslora: bool

    @property
    def scaling(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def problems(self) -> list[str]:
        """An empty list of targets. Imports no torch."""
        return [] if self.targets != () else ["adapter.targets=[] adapts nothing; name layers, or null for all"]

    def layers(self, model: nn.Module, architecture: Architecture) -> tuple[str, ...]:
        """Names of the layers that are adapted: plain nn.Linear, or one in NF4."""
        from pipeline.layers.select import matches

        names = _adaptable(model)
        if self.targets is not None:
            return tuple(name for name in names if any(matches(name, target) for target in self.targets))
        blocks = tuple(f"{block.name}." for block in architecture.blocks)
        return tuple(name for name in names if name.startswith(blocks)) or tuple(names)

    def preflight(self, model: nn.Module, architecture: Architecture) -> list[str]:
        from pipeline.errors import did_you_mean
        from pipeline.layers.select import matches

        linears = _adaptable(model)
        if not linears:
            return [f"adapter={self.name}: the model has no linear layer to adapt; use adapter=none"]
        words = {*linears, *(name.rpartition(".")[2] for name in linears)}
        problems = [
            f"adapter.targets={target}: no linear layer of the model is called so{did_you_mean(target, words)}"
            for target in self.targets or ()
            if not any(matches(name, target) for name in linears)
        ]
        if problems:
            return problems
        layers = self.layers(model, architecture)
        tied = {name for group in architecture.tied for name in group}
        for name in layers:
            if f"{name}.weight" in tied:
                problems.append(
                    f"adapter.targets: {name} shares its weight with another layer, so nothing can be merged into it; "
                    "leave it out"
                )
        sizes = {name: min(model.get_submodule(name).get_parameter("weight").shape) for name in layers}
        smallest = min(sizes, key=lambda name: sizes[name])
        if self.rank > sizes[smallest]:
            problems.append(
                f"adapter.rank={self.rank} is above the size of {smallest} ({sizes[smallest]}); choose at most "
                f"{sizes[smallest]}, or other targets"
            )
        return problems

    def attach(self, model: nn.Module, architecture: Architecture, seed: int) -> nn.Module:
        from pipeline.layers.lora import LowRank, adapt

        settings = LowRank(self.rank, self.scaling, self.dropout, self.magnitude)
        return adapt(model, self.layers(model, architecture), settings, seed)

    def merge(self, model: nn.Module) -> nn.Module:
        from pipeline.layers.lora import merge

        return merge(model)


def _adaptable(model: nn.Module) -> list[str]:
    """Names of the layers that adapters may stand beside: those that are called."""
    from pipeline.layers.lora import adaptable
    from pipeline.layers.select import read_by_parents

    read = read_by_parents(model)
    return [name for name, module in model.named_modules() if adaptable(module) and name not in read]
