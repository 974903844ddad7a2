"""How long an optimizer step takes, by running some: in this process, or on ranks that are started as a run's are."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch

from pipeline import stage_input
from pipeline.data.base import DataBundle
from pipeline.fitting import fit
from pipeline.launch import launch
from pipeline.models.architecture import describe
from pipeline.planner import speed
from pipeline.recipes import lock_text
from pipeline.report.metrics_file import read_metrics
from pipeline.schema import RunConfig, values_of
from pipeline.stage_input import base_model, link_under_adapters
from pipeline.tasks.base import Task
from pipeline.tasks.measuring import wait
from pipeline.walk import stages_of

STEPS = 3
"""Warm steps that a candidate is timed for."""
WARM_FROM = 5
"""Steps that come before: two that are cold, two whose memory the fit measures, and one."""
NEVER = 10**6
"""A step that no timing reaches."""


def measured(config: RunConfig, data: DataBundle, task: Task, steps: int = STEPS) -> float:
    """Seconds of an optimizer step: the quickest of some warm steps of the fit itself, in a directory thrown away.

    Raises:
        LeanfitError: a rank fails.
    """
    if link_under_adapters(config) is None:
        config = replace(config, chain={}, choices={**config.choices, "compression": "none"})
    trainer = replace(config.trainer, max_steps=NEVER, evaluate_every=0, checkpoint_every=NEVER, log_every=NEVER)
    config = replace(config, trainer=trainer, job="run")
    with tempfile.TemporaryDirectory(prefix="leanfit-fit-") as directory:
        if config.parallelism.distributed:
            return _on_ranks(config, Path(directory), steps)
        stage = stages_of(config)[0]
        model = base_model(config, data)
        model = stage_input.adapted(config, stage, model, stage_input.context_of(config, stage, model))
        clock = Clock(steps)
        fit(config, stage, model, task, data, describe(model), Path(directory), callbacks=[clock])
        return clock.seconds()


def _on_ranks(config: RunConfig, directory: Path, steps: int) -> float:
    """The same, of ranks: by the rates that rank 0 writes down for each step."""
    trainer = replace(config.trainer, max_steps=WARM_FROM + steps, log_every=1)
    config = replace(config, trainer=trainer, sweep=True)  # whose ranks show nothing
    (directory / "recipe.lock.yaml").write_text(lock_text(values_of(config), config.choices, None), encoding="utf-8")
    done = launch(config, stages_of(config)[0], directory, resume=False).train
    units = (done["tokens"] or done["samples"]) / done["steps"]
    rates = [row.tokens_per_second for row in read_metrics(directory / "metrics.csv") if row.step > WARM_FROM]
    return float(units / max(rate for rate in rates if rate is not None))


def free_memory(kind: str) -> int:
    """Bytes that a program could still take on this machine's device, as far as it tells: else 0."""
    if kind == "cuda":
        return torch.cuda.mem_get_info()[0]
    told = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", told.read_text()) if told.is_file() else None
    return 1024 * int(found[1]) if found else 0


class Clock(lightning.Callback):
    """Notes when optimizer steps end, and stops the fit after `steps` warm ones."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.ends: dict[int, float] = {}

    def on_train_batch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule, *_: Any) -> None:
        if trainer.global_step not in self.ends:
            wait(module.device)
            self.ends[trainer.global_step] = speed.now()
        trainer.should_stop = trainer.global_step >= WARM_FROM + self.steps

    def seconds(self) -> float:
        return min(self.ends[step + 1] - self.ends[step] for step in range(WARM_FROM, WARM_FROM + self.steps))
