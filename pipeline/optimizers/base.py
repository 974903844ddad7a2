"""What every optimizer choice offers: the torch optimizer, and the learning rate over the steps."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An `optimizer` choice."""

    steps_apart: ClassVar[Literal["weights", "rows", "parts", "values"]] = "weights"
    """What it steps where a rank does not hold the rest: whole weights only; of a weight that is spread (DTensor) whole
    rows, or any part; single values, wherever they lie."""
    name: str
    lr: Annotated[float, Gt(0)]
    weight_decay: Annotated[float, Ge(0)]
    schedule: Literal["constant", "cosine", "linear"]
    warmup_steps: Annotated[int, Ge(0)]
    min_lr_ratio: Annotated[float, Ge(0), Le(1)]

    @abstractmethod
    def build(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """The torch optimizer of what `model` trains, at peak learning rate `lr`; decay spares vectors (norms, biases).

        Raises ValueError where nothing can be trained.
        """

    def of_parts(self, ranks: int) -> Optimizer:
        """What treats one of so many equal parts of a weight as this treats the weight. For the planner."""
        return self

    def problems(self) -> list[str]:
        """What is wrong with these settings that types and ranges cannot say. Must not import torch."""
        return []

    def shape_problems(self, model: nn.Module) -> list[str]:
        """Why it cannot train a model of these shapes (on the meta device)."""
        return []

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


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices (2 dimensions or more) with decay, vectors (norms, biases) without.

    A tied parameter counts once; frozen ones are left out; a group without parameters is not made. Raises ValueError
    where nothing can be trained.
    """
    trained = list({id(weight): weight for weight in parameters if weight.requires_grad}.values())
    if not trained:
        raise ValueError("the model has no parameter that requires a gradient: there is nothing to train")
    matrices = [weight for weight in trained if weight.ndim >= 2]
    vectors = [weight for weight in trained if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
