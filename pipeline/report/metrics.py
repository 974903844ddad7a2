"""The callback that writes metrics.csv during a fit, one row a log step, and knows the totals of the fit.

- `step` counts optimizer steps of the stage's own fit, from 1; a row every `log_every` steps and at the last.
- `loss` is the mean, in nats, over every micro batch (and rank) since the row before it.
- `lr` is the first parameter group's, as the step used it.
- `tokens_per_second` counts what `count` counts (tokens, or samples) over the time since the row before it, data
  loading and checkpoints included; validation and the steps that `skip` names (slowed by measuring) are left out.
- `memory` is that of this process in bytes: see `memory_in_use`.

Between two rows a step costs a few Python operations and one scalar addition on the device, and never waits for it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lightning.pytorch.callbacks import Callback

from pipeline.report.metrics_file import Row, format_rows, keep_until, read_metrics
from pipeline.report.result import empty_train, write_text

if TYPE_CHECKING:
    import torch
    from lightning.pytorch import LightningModule, Trainer


def never(step: int) -> bool:
    """No step is skipped."""
    return False


def memory_in_use(device: str) -> tuple[int | None, str]:
    """Bytes and what they are: peak allocation on CUDA, current allocation on MPS, resident set size on CPU."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device), "peak allocated"
    if device.startswith("mps"):
        import torch

        return torch.mps.current_allocated_memory(), "allocated"
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), "RSS"
    except (OSError, ValueError, IndexError):
        pass
    try:
        import resource
        import sys
    except ImportError:
        return None, "RSS"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes everywhere but on macOS; the current size is not to be had without /proc.
    return peak * (1 if sys.platform == "darwin" else 1024), "peak RSS"


class MetricsCsv(Callback):
    """Writes metrics.csv during a fit; one instance for each stage that trains, all with the same file.

    Args:
        path: the file. Rows of other stages stay; rows of this stage beyond the step that the fit starts from, and
            whatever followed them, are cut off first.
        stage: the stage's name.
        count: tokens or samples in a batch, as the task counts them.
        log_every: optimizer steps between rows.
        unit: what `count` counts.
        skip: whether optimizer step n (from 1) is slowed by something else than training (a memory profiler).
    """

    def __init__(
        self,
        path: str | Path,
        *,
        stage: str,
        count: Callable[[Any], int],
        log_every: int,
        unit: str = "tokens/s",
        skip: Callable[[int], bool] = never,
        data_ranks: int = 1,
    ) -> None:
        if log_every < 1:
            raise ValueError(f"log_every={log_every} must be at least 1")
        self.path, self.stage, self.unit = Path(path), stage, unit
        self.last: Row | None = None
        """The newest row, which the progress bar shows."""
        self._count, self._log_every, self._skip = count, log_every, skip
        self._data_ranks = data_ranks
        self._file: TextIO | None = None
        # Of the steps since the last row, so many: the sum of their losses, each the mean of its micro batches.
        self._steps = 0
        self._loss_sum: torch.Tensor | float = 0.0
        self._lr: float | torch.Tensor | None = None
        self._step = 0
        self._clock: float | None = None
        self._elapsed = 0.0  # seconds of the step under way, up to a pause
        self._pending = [0, 0]  # units and samples of the step under way
        self._window = [0.0, 0.0]  # units and seconds since the last row, skipped steps left out
        self._total = [0.0, 0.0, 0.0]  # units, samples and seconds since the fit began, skipped steps left out
        self._seen = [0, 0]  # units and samples trained on, skipped steps included
        self._seconds = 0.0  # in all steps, skipped ones included
        self._loss_first: float | None = None
        self._loss_last: float | None = None
        self._scaler: Any = None

    @property
    def state_key(self) -> str:
        return f"MetricsCsv[{self.stage}]"

    def state_dict(self) -> dict[str, Any]:
        """What makes the rows after a resume equal to those of an uninterrupted run; without waiting for a device."""
        return {
            "loss_sum": self._loss_sum,
            "steps": self._steps,
            "window": list(self._window),
            "total": list(self._total),
            "seen": list(self._seen),
            "seconds": self._seconds,
            "loss_first": self._loss_first,
            "loss_last": self._loss_last,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loss_sum, self._steps = float(state_dict["loss_sum"]), state_dict["steps"]
        self._window, self._total = list(state_dict["window"]), list(state_dict["total"])
        self._seen, self._seconds = list(state_dict["seen"]), state_dict.get("seconds", 0.0)
        self._loss_first, self._loss_last = state_dict["loss_first"], state_dict["loss_last"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._step = checkpoint["global_step"]  # training does not start where all steps have been taken

    def totals(self) -> dict[str, Any]:
        """The `train` section of result.json; `loss_first` is the first step's, `loss_last` that of the last row.

        Counts are those of all ranks, which see batches of one size. They and `seconds` are of every step; rates are
        of those that were not skipped, and null where all were, as in a fit of two steps. `mfu` is null.
        """
        units, samples, seconds = self._total
        language = self.unit == "tokens/s"
        timed = seconds > 0
        return empty_train() | {
            "steps": self._step,
            "skipped_steps": None if (skipped := getattr(self._scaler, "skipped", None)) is None else int(skipped),
            "samples": self._seen[1],
            "tokens": self._seen[0] if language else None,
            "seconds": self._seconds,
            "samples_per_second": samples / seconds if timed else None,
            "tokens_per_second": units / seconds if timed and language else None,
            "loss_first": self._loss_first,
            "loss_last": self._loss_last,
        }

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._scaler = getattr(trainer.precision_plugin, "scaler", None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._clock, self._elapsed, self._pending = None, 0.0, [0, 0]
        self.last = None
        if trainer.is_global_zero:
            kept = keep_until(read_metrics(self.path), self.stage, self._step)
            write_text(self.path, format_rows(kept, header=True))
            self._file = self.path.open("a", encoding="utf-8", newline="")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._clock is None:
            self._clock = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # Only here is the rate the one that the step uses: schedulers move on before on_train_batch_end.
        lr = optimizer.param_groups[0]["lr"]
        self._lr = lr if isinstance(lr, float) else lr.detach().clone() if hasattr(lr, "detach") else float(lr)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if outputs is not None:
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs
            self._loss_sum = self._loss_sum + loss.detach()  # Lightning has divided it by the micro batches of a step
        self._pending[0] += self._count(batch) * self._data_ranks
        self._pending[1] += _samples(batch) * self._data_ranks
        step = trainer.global_step
        if step == self._step:
            return
        self._step = step
        self._steps += 1
        if self._loss_first is None:
            self._loss_first = self._mean_loss(trainer)
        if step % self._log_every and step != trainer.max_steps:
            self._end_step(step)
            return
        # Reading the loss waits for the device, so that the time taken after it covers the work of these steps.
        loss_mean = self._mean_loss(trainer)
        self._end_step(step)
        self._write(trainer, loss_mean)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._clock is not None:
            self._elapsed += time.perf_counter() - self._clock
            self._clock = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._steps:
            self._write(trainer, self._mean_loss(trainer))
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # No row for the steps since the last one: a resumed run writes it, and each step appears once.
        self._close()

    def _mean_loss(self, trainer: Trainer) -> float | None:
        """Over the steps since the last row and over the ranks; waits for the device."""
        if not self._steps:
            return None
        mean = self._loss_sum / self._steps
        if trainer.world_size > 1:
            mean = trainer.strategy.reduce(mean, reduce_op="mean")
        return float(mean)

    def _end_step(self, step: int) -> None:
        """Count the step that has just ended, and its time unless it is to be skipped."""
        now = time.perf_counter()
        elapsed = self._elapsed + (0.0 if self._clock is None else now - self._clock)
        units, samples = self._pending
        self._seen[0] += units
        self._seen[1] += samples
        self._seconds += elapsed
        if not self._skip(step):
            self._window[0] += units
            self._window[1] += elapsed
            self._total[0] += units
            self._total[1] += samples
            self._total[2] += elapsed
        self._clock, self._elapsed, self._pending = now, 0.0, [0, 0]

    def _write(self, trainer: Trainer, loss: float | None) -> None:
        units, seconds = self._window
        rate = units / seconds if seconds > 0 else None
        memory, _ = memory_in_use(str(trainer.strategy.root_device))
        lr = None if self._lr is None else float(self._lr)
        self.last = Row(self._step, self.stage, loss, lr, rate, memory)
        self._loss_sum, self._steps, self._window, self._loss_last = 0.0, 0, [0.0, 0.0], loss
        if self._file is not None:
            self._file.write(format_rows([self.last], header=False))
            self._file.flush()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _samples(batch: Any) -> int:
    """Sequences or images in a batch: the length of its first tensor."""
    while isinstance(batch, (dict, list, tuple)):
        batch = next(iter(batch.values() if isinstance(batch, dict) else batch))
    return len(batch)
