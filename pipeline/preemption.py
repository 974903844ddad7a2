"""Ctrl-C and SIGTERM during a fit: the step is finished and saved, then the process ends as it would have at once.

A machine that is taken away (a preemption, a job's time limit) announces this by SIGTERM, some seconds before. Of
several ranks one that is told is enough: after each step all agree whether to stop, and so stop after the same one.

One order reaches a rank several times: Slurm, or a terminal, tells every process, and the program and torchrun pass it
on. So a rank counts the first alone; a second one ends the program, and with it the ranks.

A fit that is not in its process's main thread, as in a worker of Ray, cannot put off a signal, which would end the
worker. A rank on another machine than the program gets none. Both are told by a file instead, which the process that
started the ranks leaves in the run's directory.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as lightning

from pipeline.chain import Stage
from pipeline.errors import LeanfitError
from pipeline.interrupts import PARENT, beside_parent

PATIENCE = 12.0
"""Seconds for the step to end and be saved; then the signal counts at once, as a second one does outside of ranks."""


def stop_file(run_dir: Path, stage: Stage) -> Path:
    """What tells a fit that a signal cannot tell to stop, by being there."""
    return run_dir / f".stop-{stage.directory}"


class StopAfterStep(lightning.Callback):
    """Puts off SIGINT and SIGTERM to the end of the step, and calls `save` there. To be the last callback.

    `file` counts as SIGTERM where the fit is not in its process's main thread, where it then ends by a LeanfitError,
    and on another machine than the program.
    """

    def __init__(self, save: Callable[[lightning.Trainer], None], file: Path | None = None) -> None:
        self.save, self.file = save, file
        self.told: int | None = None
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self._waits = self._late = False
        self._of_ranks = PARENT in os.environ
        self._looks = not beside_parent()

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        # Lightning has put in a handler that broadcasts in the middle of whatever collective is under way.
        self._give_back()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if _in_main_thread():
            self._waits = True
            for number in self._before:
                signal.signal(number, self._put_off)

    def _put_off(self, number: int, frame: FrameType | None) -> None:
        if self.told is not None:
            if not self._of_ranks or self._late:
                self._give_back()
                os.kill(os.getpid(), number)
            return
        self.told = number
        late = threading.Timer(PATIENCE, self._hurry, [number])
        late.daemon = True
        late.start()

    def _hurry(self, number: int) -> None:
        if self._waits:
            self._late = True
            os.kill(os.getpid(), number)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        looks = self._looks or not _in_main_thread()
        if self.told is None and self.file is not None and looks and self.file.exists():
            self.told = signal.SIGTERM
        if whole and trainer.strategy.reduce_boolean_decision(self.told is not None, all=False):
            if trainer.global_step < trainer.max_steps:
                self.save(trainer)
            self._give_back()
            if not _in_main_thread():
                raise LeanfitError("stopped by SIGTERM")
            os.kill(os.getpid(), self.told or signal.SIGTERM)

    def on_train_end(self, *_: Any) -> None:
        self._give_back()
        if self.told is not None and _in_main_thread():
            os.kill(os.getpid(), self.told)

    def on_exception(self, *_: Any) -> None:
        self._give_back()

    def _give_back(self) -> None:
        self._waits = False
        for number, handler in self._before.items():
            if _in_main_thread() and handler is not None:
                signal.signal(number, handler)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
