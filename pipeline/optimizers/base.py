"""What every optimizer choice offers: the torch optimizer, and the learning rate over the steps."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt, Le

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An `optimizer` choice."""

    name: str
    lr: Annotated[float, Gt(0)]
    weight_decay: Annotated[float, Ge(0)]
    schedule: Literal["constant", "cosine", "linear"]
    warmup_steps: Annotated[int, Ge(0)]
    min_lr_ratio: Annotated[float, Ge(0), Le(1)]

    @abstractmethod
    def build(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """The torch optimizer at peak learning rate `lr`; decay spares vectors (norms, biases)."""

    def factor(self, step: int, steps: int) -> float:
        """What the peak learning rate is multiplied by at optimizer step `step` (from 0) of `steps`.

        Linear warm-up over `warmup_steps` (never more than a tenth of `steps`), then the schedule down to
        `min_lr_ratio`.
        """
        warmup = min(self.warmup_steps, steps // 10)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.schedule == "constant":
            return 1.0
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        shape = 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * shape
