"""The training of a run on fake tensors: the composed model, loss, optimizer and Lightning's own loop, without memory.

What is traced is what runs: the same LightningModule, precision plugin, checkpointing and gradient clipping. Two
optimizer steps are taken: the second finds all of the optimizer's state there, and each later one is like it. A GPU's
pool may still grow in the third, which is written down as the second was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor, nn

from pipeline.chain import Stage
from pipeline.compression.base import StageLoss
from pipeline.fitting import TaskModule, levers, micro_batch_size, quiet_lightning, trainer_of
from pipeline.memory.saving import apply_activation_checkpointing
from pipeline.models.base import Architecture
from pipeline.planner import compiled
from pipeline.planner.fakes import fake_batch, faked, kernels_of, tracing
from pipeline.planner.live import ACTIVATIONS, STEP_DONE, Event, Live, Peak, Timeline
from pipeline.planner.pool import reserved
from pipeline.planner.replaying import replaying
from pipeline.schema import RunConfig
from pipeline.tasks.base import Batch, Task
from pipeline.trainer.compiling import compiled_blocks, compiled_criterion

STEPS = 2


class TracedModule(TaskModule):
    """Marks what storages are for. Nothing is moved or converted: fake tensors cannot be."""

    live: Live

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TracedModule:
        return self

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.live.phase = ACTIVATIONS
        return super().training_step(batch, batch_idx)


class Phases(lightning.Callback):
    """Says to `live` which part of a step runs, and what gradients and optimizer state are when they are there."""

    def __init__(self, live: Live) -> None:
        self.live = live

    def on_train_batch_start(self, trainer: lightning.Trainer, module: Any, batch: Batch, *_: Any) -> None:
        self.live.mark(f"step {trainer.global_step}")
        self.live.mark("forward")
        self.live.hold(batch.values(), "batch")

    def on_before_backward(self, *_: Any) -> None:
        self.live.phase = "backward"
        self.live.mark("backward")

    def on_after_backward(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.live.hold((p.grad for p in module.parameters() if p.grad is not None), "gradients")
        self.live.phase = "optimizer step"

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.live.mark("optimizer step")

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        for optimizer in trainer.optimizers:
            for state in optimizer.state.values():
                self.live.hold((v for v in state.values() if isinstance(v, Tensor)), "optimizer state")
        self.live.phase = "other"


class StepIsDone(lightning.Callback):
    """Marks when a step is done and all other callbacks were called: then checkpoints are written."""

    def __init__(self, live: Live) -> None:
        self.live = live

    def on_train_batch_end(self, *_: Any) -> None:
        self.live.mark(STEP_DONE)


def trace_training(
    config: RunConfig,
    stage: Stage,
    model: nn.Module,
    task: Task,
    architecture: Architecture,
    batch: Batch,
) -> Peak:
    """The peak over a warm step of the fit of `stage`, or over its only one.

    Args:
        model: on the meta device; it is filled with fake tensors in place.
        batch: one micro batch, whose shapes and dtypes count.
    """
    assert stage.fit is not None
    with tracing(config):
        faked(model)
        live = Live(*kernels_of(config))
        steps = min(STEPS, stage.fit.steps)
        peak = traced_fit(config, stage, model, task, architecture, batch, live, steps, since=steps - 1)
        if config.device.kind() == "cuda":  # whose pool keeps what steps before took
            longer = Timeline(with_another_step(live.timeline, steps - 1), live.timeline.marks, cuda=True)
            most = longer.peak(longer.since(f"step {steps - 1}"))
            peak = replace(most, course=peak.course, kept=peak.kept, reserved=reserved(longer.events))
        return peak


def with_fewer_parts(config: RunConfig) -> RunConfig:
    """With two micro batches where there are more: they hold as much."""
    micro, accumulation = micro_batch_size(config)
    batch = micro * min(accumulation, 2) * config.parallelism.data_ranks
    return replace(config, trainer=replace(config.trainer, batch_size=batch, micro_batch_size=micro))


def traced_fit(
    config: RunConfig,
    stage: Stage,
    model: nn.Module,
    task: Task,
    architecture: Architecture,
    batch: Batch,
    live: Live,
    steps: int,
    since: int,
    callbacks: Sequence[lightning.Callback] = (),
    loss: StageLoss | None = None,
) -> Peak:
    """The peak from the optimizer step `since` on of a fit of so many `steps`, of a `model` of fake tensors.

    `callbacks` and `loss` are those of a link's method. To be called within `tracing`.
    """
    assert stage.fit is not None
    config = with_fewer_parts(config)
    _, accumulation = micro_batch_size(config)
    another = config.device.kind() == "cuda"  # batch, of the step that `trace_training` writes down
    blocks = [block.name for block in architecture.blocks]
    parts = [Phases(live), *callbacks, *levers(config, model, callbacks), StepIsDone(live)]
    with quiet_lightning(), ExitStack() as stack:
        compiler = compiled.Imitation()
        if config.trainer.compile:
            stack.enter_context(compiled_blocks(model, blocks, compiler))
        stack.callback(apply_activation_checkpointing(model, blocks, config.memory.activation_checkpointing))
        plugin = config.precision.plugin("cpu")
        if getattr(plugin, "scaler", None) is not None:
            plugin.scaler = NeverOverflows("cpu")  # type: ignore[attr-defined]
        trainer = trainer_of(
            config, "cpu", steps, parts, [plugin], devices=1, limit_val_batches=0, enable_checkpointing=False
        )
        module = TracedModule(model, task, config, stage.fit, loss, architecture, Path())
        module.live = live
        if config.trainer.compile:
            module.criterion = compiled_criterion(compiler)
        live.hold_model(model)
        stack.enter_context(live.telling_loss(model, architecture))
        model.train()
        # A program decodes by itself, and is one for all blocks alike.
        with live, compiled.without_kernels() if config.trainer.compile else replaying(live):
            trainer.fit(module, Batches(batch, steps * accumulation + another), weights_only=False)
        peak = live.timeline.peak(live.timeline.since(f"step {since}"))
        return replace(peak, kept=live.timeline.held_at(STEP_DONE), plain=compiler.plain)


def with_another_step(timeline: Timeline, last: int) -> list[Event]:
    """The events of a fit as if a step came after the `last` (its number): the same again, with storages of its own.
    As they are where that step did not leave what it had found.
    """
    began = next(number for number, (_, name) in enumerate(timeline.marks) if name == f"step {last}")
    starts = [at for at, name in timeline.marks[:began] if name == STEP_DONE]
    if not starts:
        return timeline.events
    end = next(at for at, name in reversed(timeline.marks) if name == STEP_DONE)
    before = timeline.events[: starts[-1]]
    events = timeline.events[starts[-1] : end]
    made = {id(block) for block, sign, _ in events if sign > 0}
    gone = {id(block) for block, sign, _ in events if sign < 0}
    found = [block for block, sign, _ in before if sign > 0 and id(block) in gone and id(block) not in made]
    left = [block for block, sign, _ in events if sign > 0 and id(block) not in gone]
    if [block.bytes for block in found] != [block.bytes for block in left]:
        return timeline.events
    own = {id(block): twin for block, twin in zip(found, left, strict=True)}
    again = [(own.setdefault(id(block), replace(block)), sign, operator) for block, sign, operator in events]
    return [*timeline.events[:end], *again]


class Batches:
    """A loader that makes each batch when it is asked for; of no known length, which would be counted with tensors."""

    def __init__(self, batch: Batch, count: int) -> None:
        self.batch, self.count = batch, count

    def __iter__(self) -> Iterator[Batch]:
        return (fake_batch(self.batch) for _ in range(self.count))


class NeverOverflows(torch.amp.GradScaler):
    """Takes each step: whether gradients overflowed is a value, which fake tensors have not."""

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        return optimizer.step(*args, **kwargs)
