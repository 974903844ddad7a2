"""Stochastic gradient descent with momentum; Nesterov's form as in Sutskever et al., 2013."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Lt

from pipeline.optimizers.base import Optimizer, decay_groups
from pipeline.registry import register

if TYPE_CHECKING:
    import torch
    from torch import nn


@register("optimizer", "sgd")
@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """`momentum` 0 keeps no state at all: the leanest optimizer there is."""

    steps_apart: ClassVar[Literal["weights", "rows", "parts", "values"]] = "values"

    momentum: Annotated[float, Ge(0), Lt(1)]
    nesterov: bool

    def problems(self) -> list[str]:
        if self.nesterov and self.momentum == 0:
            return [
                "optimizer.nesterov=true needs momentum; give optimizer.momentum above 0, or optimizer.nesterov=false"
            ]
        return []

    def build(self, model: nn.Module, lr: float) -> torch.optim.SGD:
        import torch

        return torch.optim.SGD(
            decay_groups(model.parameters(), self.weight_decay),
            lr=lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            foreach=False,
        )
