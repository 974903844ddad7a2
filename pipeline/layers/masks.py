"""Lightning callbacks that hold masks through training, and grow them on a schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from pipeline.layers.sparsity import apply_masks, has_masks, masked_layers

__all__ = ["GradualMasks", "HoldMasks", "apply_masks", "has_masks", "masked_layers"]


class HoldMasks(Callback):
    """Zeroes masked weights again after each optimizer step; momentum and weight decay would move them."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        apply_masks(pl_module)


class GradualMasks(HoldMasks):
    """Masks that grow over the first `until` optimizer steps: s_t = s_f (1 - (1 - t/T)^3), then held.

    Zhu & Gupta, 2017 (arXiv:1710.01878). Masks are made anew every `every` steps by `prune(module, sparsity)`, which is
    given the LightningModule. The masks themselves are buffers of the model; what was reached is this callback's state,
    with what `prune` has put into `facts` by then: a fit that is resumed may have pruned for the last time.
    """

    def __init__(
        self,
        prune: Callable[[nn.Module, float], Any],
        sparsity: float,
        until: int,
        every: int,
        facts: dict[str, Any] | None = None,
    ) -> None:
        self.prune, self.sparsity, self.until, self.every = prune, sparsity, max(1, until), max(1, every)
        self.facts = {} if facts is None else facts
        self.reached = 0.0
        self.updated_at = 0

    def target(self, step: int) -> float:
        """Sparsity due after `step` optimizer steps."""
        return self.sparsity * (1 - (1 - min(1.0, step / self.until)) ** 3)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step >= self.until or step - self.updated_at >= self.every
        if due and step != self.updated_at and self.reached < self.sparsity:
            with torch.no_grad():
                self.prune(pl_module, self.target(step))
            self.reached, self.updated_at = self.target(step), step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def state_dict(self) -> dict[str, Any]:
        return {"reached": self.reached, "updated_at": self.updated_at, "facts": dict(self.facts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.reached, self.updated_at = state_dict["reached"], state_dict["updated_at"]
        self.facts.update(state_dict.get("facts", {}))  # checkpoints of before have none
