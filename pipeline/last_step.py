"""Where memory runs out within a step, the last whole one is saved first, so that nothing is computed twice.

Until the optimizer begins, weights and its state are those of the last whole step. What else moves on within a step,
counts of micro batches, the place in the data, sums of callbacks and running statistics, is noted after each. Of ranks
with a copy of the model each, the one whose memory ends saves: none of the others gets past the sum of gradients.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import nn

from pipeline.errors import exhausted

log = logging.getLogger(__name__)


RUNNING = frozenset({"running_mean", "running_var", "num_batches_tracked"})
"""Buffers of batch normalization, whose kernels do not tell torch that they write to them."""


@dataclass(frozen=True)
class Noted:
    """Of a checkpoint after a step what is not weights, optimizer or schedule; and buffers that steps change."""

    loop: dict[str, Any]
    callbacks: dict[str, Any]
    buffers: dict[str, torch.Tensor]


def versions(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Of each buffer, which tensor it is and how often that was written to."""
    return {name: (id(buffer), buffer._version) for name, buffer in module.named_buffers() if not buffer.is_inference()}


class SaveWhereMemoryEnds(lightning.Callback):
    """Calls `save`, which writes a checkpoint without other ranks, with the last whole step. It stands last."""

    def __init__(self, save: Callable[[lightning.Trainer], None]) -> None:
        self.save = save
        self.noted: Noted | None = None
        self.stepping = False
        self.saving = False
        self.versions: dict[str, tuple[int, int]] = {}
        self.moving: set[str] = set()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.versions = versions(pl_module)
        self.moving = {name for name in self.versions if name.rpartition(".")[2] in RUNNING}

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.stepping = False
            now = versions(pl_module)
            self.moving |= self.changed(now)
            self.versions = now
            callbacks = {part.state_key: part.state_dict() for part in trainer.callbacks}  # type: ignore[attr-defined]
            self.noted = Noted(
                copy.deepcopy(trainer.fit_loop.state_dict()),
                copy.deepcopy({key: state for key, state in callbacks.items() if state}),
                {name: buffer.clone() for name, buffer in pl_module.named_buffers() if name in self.moving},
            )

    def changed(self, now: dict[str, tuple[int, int]]) -> set[str]:
        """Buffers written since the last step, as running statistics are. A quantized base, large, is not."""
        return {name for name, version in now.items() if self.versions.get(name) != version}

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.stepping = True

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        if self.noted is None or self.stepping or not exhausted(exception):
            return
        if not self.changed(versions(pl_module)) <= self.noted.buffers.keys():
            return  # what never changed before was not copied
        self.saving = True
        try:
            with torch.no_grad():
                for name, value in self.noted.buffers.items():
                    pl_module.get_buffer(name).copy_(value)
            self.save(trainer)
        except Exception as error:  # the checkpoint before it is whole
            log.warning("the last step could not be saved: %s: %s", type(error).__name__, error)
        finally:
            self.saving = False

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.saving and self.noted is not None:
            checkpoint["loops"]["fit_loop"] = self.noted.loop
            checkpoint["callbacks"] = self.noted.callbacks
