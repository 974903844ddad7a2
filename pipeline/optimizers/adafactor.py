"""Adafactor (Shazeer & Stern, 2018, arXiv:1804.04235): of a matrix's squared gradients, means of rows and columns.

torch's own: state of rows + columns instead of rows x columns, no momentum, updates relative to the weights' size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Gt, Lt

from pipeline.optimizers.base import Optimizer, decay_groups
from pipeline.registry import register

if TYPE_CHECKING:
    import torch
    from torch import nn


@register("optimizer", "adafactor")
@dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """`lr` is relative: a step changes a matrix by at most `lr` times the root mean square of its weights, and by
    1 / sqrt(step) once that is less.

    `beta2_decay`: the running mean's decay at step t is 1 - t^beta2_decay. `clip_threshold`: the largest root mean
    square that an update may have before it is scaled down. `min_scale`: the least that weights count as.
    """

    steps_apart: ClassVar[Literal["weights", "rows", "parts", "values"]] = "parts"

    beta2_decay: Annotated[float, Lt(0)]
    clip_threshold: Annotated[float, Gt(0)]
    min_scale: Annotated[float, Gt(0)]

    def build(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        from pipeline.optimizers.sharded import Adafactor as Sharded

        return Sharded(
            decay_groups(model.parameters(), self.weight_decay),
            lr=lr,
            beta2_decay=self.beta2_decay,
            eps=(None, self.min_scale),
            d=self.clip_threshold,
            foreach=False,
        )
