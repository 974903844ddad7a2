"""One fit: a model, a task and the settings of a stage become a Lightning Trainer that runs. Nothing else builds one.

What a step computes depends only on (seed, step, rank), never on what ran before in the process: the loader's order is a
function of its position, and the generators behind dropout are reseeded at each step. So a run that was killed and
resumed ends in the same weights, bit for bit.
"""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import nn

from pipeline.chain import Fit, Stage
from pipeline.data.base import DataBundle
from pipeline.data.loader import evaluation_loader, train_loader
from pipeline.layers.masks import HoldMasks, has_masks
from pipeline.memory.measure import MeasureTraining
from pipeline.memory.saving import ReleaseGradients, apply_activation_checkpointing
from pipeline.models.base import Architecture
from pipeline.report.metrics import MetricsCsv
from pipeline.schema import RunConfig
from pipeline.tasks.base import Batch, Task

StageLoss = Callable[[nn.Module, Batch, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Fitted:
    """What a fit did. `seconds` and the rates leave out checkpoints' writing, validation and the measured steps' tracing.

    units: predicted tokens or samples. peak_bytes: allocated, over warm optimizer steps; None where not measured.
    """

    steps: int
    samples: int
    units: int
    seconds: float
    samples_per_second: float | None
    units_per_second: float | None
    loss_first: float | None
    loss_last: float | None
    peak_bytes: int | None

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Fitted:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that a run killed while saving keeps its former checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        with partial.open("wb") as stream:
            torch.save(checkpoint, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(target)


class SaveLast(Checkpoint):
    """`last.ckpt` every `every` optimizer steps and after the last, at the one point where a step is wholly done."""

    def __init__(self, path: Path, every: int, last: int) -> None:
        self.path, self.every, self.last = path, every, last
        self.saved = -1

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step != self.saved and step > 0 and (step % self.every == 0 or step == self.last):
            self.saved = step
            trainer.save_checkpoint(self.path)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.saved = trainer.global_step


class Clock(lightning.Callback):
    """Seconds of optimizer steps, data loading included; checkpoints, validation and the steps in `skipped` left out.

    The state travels in the checkpoint, so that a resumed fit reports the whole of it. CUDA runs behind the clock, but
    the queue is short compared with a run; a synchronisation at each step would cost speed.
    """

    def __init__(self, skipped: Callable[[int], bool]) -> None:
        self.skipped = skipped
        self.seconds = 0.0
        self.timed = 0
        self.first: torch.Tensor | None = None
        self.recent: deque[torch.Tensor] = deque(maxlen=10)
        self.marked = 0.0

    def mark(self) -> None:
        self.marked = time.perf_counter()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.mark()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.mark()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"].detach()
        self.first = loss if self.first is None else self.first
        self.recent.append(loss)
        if not self.skipped(batch_idx // trainer.accumulate_grad_batches):
            self.seconds += time.perf_counter() - self.marked
            self.timed += 1

    def state_dict(self) -> dict[str, Any]:
        first = None if self.first is None else float(self.first)
        return {"seconds": self.seconds, "timed": self.timed, "first": first, "recent": [float(x) for x in self.recent]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self.timed = state_dict["seconds"], state_dict["timed"]
        self.first = torch.tensor(state_dict["first"])
        self.recent.extend(torch.tensor(x) for x in state_dict["recent"])


class TaskModule(lightning.LightningModule):
    """The LightningModule around a model: the task's loss (or the stage's), the optimizer and its schedule."""

    def __init__(
        self, model: nn.Module, task: Task, config: RunConfig, fit: Fit, loss: StageLoss | None, clock: Clock
    ) -> None:
        super().__init__()
        self.model, self.task, self.config, self.fit, self.stage_loss = model, task, config, fit, loss
        self.clock = clock

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # A large odd stride keeps the streams of ranks apart.
        torch.manual_seed(self.config.trainer.seed + 1_000_003 * (batch_idx + 1) + 15_485_863 * self.global_rank)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.clock.mark()  # Lightning calls this after every callback, so after a checkpoint was written

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        loss = self.task.loss(self.model, batch)
        return loss if self.stage_loss is None else self.stage_loss(self.model, batch, loss)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss = self.task.loss(self.model, batch)
        self.log("val_loss", loss, on_epoch=True, batch_size=self.task.count(batch))

    def configure_optimizers(self) -> Any:
        optimizer = self.config.optimizer.build(self.model.parameters(), lr=self.fit.lr)
        factor, steps = self.config.optimizer.factor, self.fit.steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def micro_batch_size(config: RunConfig) -> tuple[int, int]:
    """(samples a device takes at once, accumulation) that make the stated global batch."""
    world = config.parallelism.devices * config.parallelism.nodes
    micro = config.trainer.micro_batch_size or config.trainer.batch_size // world
    return micro, config.trainer.batch_size // (micro * world)


def checkpoint_directory(run_dir: Path, stage: Stage) -> Path:
    """Stage 0 keeps the plain place, so that its path is known without knowing the chain."""
    root = run_dir / "checkpoints"
    return root if stage.index == 0 else root / stage.directory


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Lightning's own lines go to the log file only; its warnings about choices we make on purpose are dropped."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",  # memory-mapped data needs none
            ".*`training_step` returned.*",
            ".*lr_scheduler.step.*before.*optimizer.step.*",  # a step that the loss scaler skipped
            ".*Checkpoint directory .* exists.*",
            ".*treespec, LeafSpec.*",  # lightning's own use of a deprecated torch name
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


def fit(
    config: RunConfig,
    stage: Stage,
    model: nn.Module,
    task: Task,
    data: DataBundle,
    architecture: Architecture,
    run_dir: Path,
    *,
    callbacks: list[lightning.Callback],
    loss: StageLoss | None = None,
    resume: bool = False,
) -> Fitted:
    """Train `model` in place for `stage.fit`, from `last.ckpt` of this stage where `resume` and it exists."""
    assert stage.fit is not None
    steps = stage.fit.steps
    device = config.device.kind()
    micro, accumulation = micro_batch_size(config)
    checkpoints = checkpoint_directory(run_dir, stage)
    last = checkpoints / "last.ckpt"

    removal = apply_activation_checkpointing(
        model, [block.name for block in architecture.blocks], config.memory.activation_checkpointing
    )
    meter = MeasureTraining() if stage.index == 0 else None
    skipped: Callable[[int], bool] = (lambda step: step in meter.skipped_steps) if meter else (lambda step: False)
    clock = Clock(skipped)
    metrics = MetricsCsv(
        run_dir / "metrics.csv", stage=stage.name, log_every=config.trainer.log_every, count=task.count, skip=skipped
    )
    parts: list[lightning.Callback] = [*callbacks, clock, metrics]
    if has_masks(model) and not any(isinstance(part, HoldMasks) for part in parts):
        parts.append(HoldMasks())
    if config.memory.release_gradients:
        parts.append(ReleaseGradients())
    if meter is not None:
        parts.append(meter)
    parts.append(SaveLast(last, config.trainer.checkpoint_every, steps))
    every = config.trainer.evaluate_every
    if every:
        parts.append(
            ModelCheckpoint(
                dirpath=checkpoints, filename="best", monitor="val_loss", save_top_k=1, enable_version_counter=False
            )
        )
    with quiet_lightning():
        trainer = lightning.Trainer(
            accelerator=device,
            devices=config.parallelism.devices,
            num_nodes=config.parallelism.nodes,
            strategy=config.parallelism.strategy(device),
            plugins=[config.precision.plugin(device), AtomicCheckpointIO()],
            max_steps=steps,
            max_epochs=-1,
            accumulate_grad_batches=accumulation,
            gradient_clip_val=config.trainer.grad_clip,
            val_check_interval=every * accumulation if every else None,
            check_val_every_n_epoch=None if every else 1,
            limit_val_batches=None if every else 0,
            num_sanity_val_steps=0,
            callbacks=parts,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=run_dir,
        )
        module = TaskModule(model, task, config, stage.fit, loss, clock)
        model.train()
        trainer.fit(
            module,
            train_loader(
                data.train, batch_size=micro, seed=config.trainer.seed, rank=trainer.global_rank, world=trainer.world_size
            ),
            evaluation_loader(data.evaluation, config.trainer.evaluation_batch_size) if every else None,
            ckpt_path=last if resume and last.is_file() else None,
            weights_only=False,
        )
    removal()
    if clock.first is None and not last.is_file():
        raise RuntimeError(f"stage '{stage.name}' trained no step")
    return summary(clock, meter, task, data, config, steps)


def summary(
    clock: Clock, meter: MeasureTraining | None, task: Task, data: DataBundle, config: RunConfig, steps: int
) -> Fitted:
    """The figures of a finished fit; rates over the steps that this process ran and timed."""
    _, accumulation = micro_batch_size(config)
    example = data.train[0]
    per_sample = task.count({name: value.unsqueeze(0) for name, value in example.items()})
    samples = steps * config.trainer.batch_size
    timed = clock.timed / accumulation * config.trainer.batch_size
    rate = timed / clock.seconds if clock.seconds else None
    return Fitted(
        steps=steps,
        samples=samples,
        units=samples * per_sample,
        seconds=clock.seconds,
        samples_per_second=rate,
        units_per_second=rate * per_sample if rate else None,
        loss_first=float(clock.first) if clock.first is not None else None,
        loss_last=sum(float(x) for x in clock.recent) / len(clock.recent) if clock.recent else None,
        peak_bytes=meter.peak_bytes if meter else None,
    )
