"""One fit: a model, a task and the settings of a stage become a Lightning Trainer that runs. Nothing else builds one.

What a step computes depends only on (seed, step, rank), never on what ran before in the process: the loader's order
is a function of its position, and the generators behind dropout are reseeded at each step. So a run that was killed
and resumed ends in the same weights, bit for bit.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast
from unittest import mock

import lightning.pytorch as lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import nn

from pipeline import checkpoints
from pipeline.chain import Fit, Stage
from pipeline.compression.base import StageLoss
from pipeline.data.base import DataBundle
from pipeline.data.loader import evaluation_loader, train_loader
from pipeline.errors import LeanfitError
from pipeline.last_step import SaveWhereMemoryEnds
from pipeline.layers.chunked_loss import require_plain_head
from pipeline.layers.lora import held_tensors
from pipeline.layers.masks import HoldMasks, has_masks
from pipeline.layers.quantize import not_finite
from pipeline.memory.measure import (
    MeasureTraining,
    MeasureValidation,
    Peak,
    bucket_bytes,
    measure_peak,
    training_tensors,
)
from pipeline.memory.offload import ActivationOffload, offload_optimizer, store
from pipeline.memory.saving import ReleaseGradients, StepInBackward, apply_activation_checkpointing
from pipeline.models.base import Architecture
from pipeline.parallelism.shards import clip_gradients, is_sharded, local, place_gradients
from pipeline.preemption import StopAfterStep, stop_file
from pipeline.report.metrics import MetricsCsv
from pipeline.report.progress import Progress
from pipeline.schema import RunConfig
from pipeline.tasks.base import Batch, Task
from pipeline.trainer.compiling import FirstStepCompiles, compiled_blocks, compiled_criterion


@dataclass(frozen=True)
class Fitted:
    """What a fit did: `train` of result.json, and the peak of allocated bytes (None where it was not measured), with
    what CUDA's pool had reserved for them."""

    train: dict[str, Any]
    peak_bytes: int | None
    earlier_seconds: float = 0.0
    """What this fit took, up to its last checkpoint, before it was interrupted and resumed."""
    reserved_bytes: int | None = None
    saving_bytes: int | None = None
    """The peak while the last checkpoint was written; of several ranks that of the first, which holds most."""
    validating: dict[str, int | None] = field(default_factory=lambda: asdict(Peak()))
    """The peak while the model was evaluated in the middle of the fit."""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Fitted:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


class AtomicCheckpointIO(TorchCheckpointIO):
    """Keeps the former checkpoint until the new one is whole; reads what several ranks saved in parts, too."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        checkpoints.save(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return checkpoints.read(Path(path))


class SaveLast(Checkpoint):
    """`last.ckpt` every `every` optimizer steps and after the last, at the one point where a step is wholly done."""

    def __init__(self, path: Path, every: int, last: int, beside: Callable[[], Iterable[torch.Tensor]]) -> None:
        self.path, self.every, self.last, self.beside = path, every, last, beside
        self.peak_bytes: int | None = None
        self.saved = -1
        self.started = time.perf_counter()
        self.earlier_seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.earlier_seconds + time.perf_counter() - self.started}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.earlier_seconds = state_dict["seconds"]

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self.last:  # steps are measured no more by then
            alive = [*training_tensors(trainer, pl_module, batch), *self.beside()]
            with measure_peak(pl_module.device.type, alive, bucket_bytes(trainer.strategy.model)) as peak:
                self.save(trainer)
            self.peak_bytes = peak.bytes
        elif step > 0 and (step % self.every == 0 or step == self.last):
            self.save(trainer)

    def save(self, trainer: lightning.Trainer) -> None:
        """Now, unless this step is saved already."""
        if trainer.global_step != self.saved:
            self.saved = trainer.global_step
            trainer.save_checkpoint(self.path)

    def save_alone(self, trainer: lightning.Trainer) -> None:
        """As `save`, by a rank that has all of the model, while the others wait for it elsewhere or are gone."""
        write = trainer.strategy.checkpoint_io.save_checkpoint
        with mock.patch.multiple(trainer.strategy, save_checkpoint=write, barrier=lambda *_: None):
            self.save(trainer)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.saved = trainer.global_step


class StopWhereItDiverged(lightning.Callback):
    """Ends a fit whose loss is not a number any more: what follows would be wasted, and its report nonsense.

    On an accelerator only the first step and log steps look, since looking waits for the device. In the first step no
    learning rate is to blame yet: a weight that came with NaN or infinity in it is named.
    """

    def __init__(self, stage: str, lr: float, every: int) -> None:
        self.stage, self.lr, self.every = stage, lr, every
        self.first = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.first = trainer.global_step

    def on_before_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: torch.Tensor
    ) -> None:
        if trainer.global_step != self.first or torch.isfinite(loss):
            return
        # Of a weight in shards each rank asks for its own: the others' loss may be finite, and they would not answer.
        weights = ((name, local(weight)) for name, weight in pl_module.get_submodule("model").named_parameters())
        if wrong := not_finite(weights):
            raise LeanfitError(
                f"the loss of stage '{self.stage}' is {loss.item()} from the start: {wrong} holds NaN or infinity"
            )

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"]
        looks = loss.device.type == "cpu" or trainer.global_step % self.every == 0
        if looks and not torch.isfinite(loss):
            raise LeanfitError(
                f"training diverged: the loss of stage '{self.stage}' is {float(loss)} at step {trainer.global_step}; "
                f"lower its learning rate ({self.lr:g}), or clip gradients (trainer.grad_clip=1.0)"
            )


ACCUMULATION = "accumulation"
"""Where a checkpoint says how many micro batches made a step."""


def recount(checkpoint: dict[str, Any], accumulation: int) -> None:
    """Count the micro batches of `checkpoint`, saved between two steps, as if each step had had `accumulation`.

    Lightning tells by their number where a step ends and when to evaluate.
    """
    more = checkpoint["global_step"] * (accumulation - checkpoint.get(ACCUMULATION, accumulation))
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        counts.update({key: count + more for key, count in counts.items()})


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of `device`, as `torch.manual_seed` does.

    That one notes a stack trace for each kind of device that is not in use, which took 5% of a small model's step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


class TaskModule(lightning.LightningModule):
    """The LightningModule around a model: the task's loss (or the stage's), the optimizer and its schedule."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: RunConfig,
        fit: Fit,
        loss: StageLoss | None,
        architecture: Architecture,
        run_dir: Path,
    ) -> None:
        super().__init__()
        self.model, self.task, self.config, self.fit, self.stage_loss = model, task, config, fit, loss
        self.architecture, self.run_dir = architecture, run_dir
        self.criterion = compiled_criterion() if config.trainer.compile else None
        where = config.memory.activation_offload
        self.offload = None if where == "none" else ActivationOffload(model, store(where, run_dir))

    def configure_model(self) -> None:
        # Lightning calls it again for each entry point; a model is spread over devices once.
        if self.device_mesh is not None and not is_sharded(self.model.parameters()):
            self.config.parallelism.shard(self.model, self.architecture, self.device_mesh)

    def on_train_start(self) -> None:
        wrapped = self.trainer.strategy.model
        if self.config.parallelism.distributed and wrapped is not None:
            self.config.parallelism.begin(wrapped)

    def on_after_backward(self) -> None:
        if self.config.parallelism.sharded:
            place_gradients(self.model.parameters())

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        if self.config.parallelism.sharded and gradient_clip_val:
            clip_gradients(self.model.parameters(), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # A large odd stride keeps apart the streams of ranks that see different samples.
        rank = self.global_rank // self.config.parallelism.tensor_ranks
        seed_generators(self.config.trainer.seed + 1_000_003 * (batch_idx + 1) + 15_485_863 * rank, self.device)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # What is rounded by chance is so alike on all ranks: their copies of the weights stay one.
        if self.config.precision.rounds_stochastically:
            seed_generators(self.config.trainer.seed + 1_000_003 * (self.global_step + 1) + 32_452_843, self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        with nullcontext() if self.offload is None else self.offload.saving(batch):
            if self.stage_loss is None:
                return self.task_loss(batch)
            return self.stage_loss(self.model, batch, self.task_loss)

    def task_loss(self, batch: Batch) -> torch.Tensor:
        return self.task.loss(self.model, batch, self.config.memory.loss_chunks, self.criterion)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # A checkpoint holds what is trained and other float tensors; quantized ones come from the base model again.
        for name in held_tensors(self):
            checkpoint["state_dict"].pop(name, None)  # of several ranks one holds all
        checkpoint[ACCUMULATION] = self.trainer.accumulate_grad_batches

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        recount(checkpoint, self.trainer.accumulate_grad_batches)
        if "state_dict" in checkpoint:  # a strategy on a mesh has loaded its weights by now
            checkpoint["state_dict"].update(held_tensors(self))

    def on_validation_epoch_start(self) -> None:
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        self.validated = torch.zeros(2, dtype=exact, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss = self.task_loss(batch)
        if cast(Any, self.trainer.val_dataloaders).batch_sampler.counts(batch_idx):
            count = self.task.count(batch)
            self.validated[0] += loss.detach().to(self.validated) * count
            self.validated[1] += count

    def on_validation_epoch_end(self) -> None:
        # Not by Lightning's own mean over devices: it rounds how much each has seen, on average, to a whole number.
        total, count = self.trainer.strategy.reduce(self.validated, reduce_op="sum")
        self.log("val_loss", total / count)

    def configure_optimizers(self) -> Any:
        optimizer = self.config.optimizer.build(self.model, lr=self.fit.lr)
        self.config.precision.prepare_training(self.model, optimizer)
        if self.config.memory.optimizer_offload != "none":
            offload_optimizer(optimizer, store(self.config.memory.optimizer_offload, self.run_dir))
        factor, steps = self.config.optimizer.factor, self.fit.steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def micro_batch_size(config: RunConfig) -> tuple[int, int]:
    """(samples a device takes at once, accumulation) that make the stated global batch."""
    world = config.parallelism.data_ranks
    micro = config.trainer.micro_batch_size or config.trainer.batch_size // world
    return micro, config.trainer.batch_size // (micro * world)


def fit_inputs(config: RunConfig, stage: Stage, data: DataBundle) -> Iterator[Batch]:
    """The inputs, without labels, of every batch that the stage's fit trains on, on all its devices together.

    As one device would see them, in its order: the samples of a step are the same however many share it.
    """
    assert stage.fit is not None
    micro, _ = micro_batch_size(config)
    loader = train_loader(data.train, batch_size=micro, seed=config.trainer.seed)
    for batch in islice(loader, stage.fit.steps * config.trainer.batch_size // micro):
        yield {name: tensor for name, tensor in batch.items() if name != "labels"}


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
            ".*You defined a `validation_step` but have no.*",  # evaluate_every=0
            ".*lr_scheduler.step.*before.*optimizer.step.*",  # a step that the loss scaler skipped
            ".*Checkpoint directory .* exists.*",
            ".*returned a view tensor. An in-place op.*",  # blocks of OPT under FSDP; nothing writes in place
            ".*treespec, LeafSpec.*",  # lightning's own use of a deprecated torch name
            ".*`srun` command is available.*",  # ranks are started by `parallelism.launcher`
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


def levers(config: RunConfig, model: nn.Module, callbacks: Sequence[lightning.Callback]) -> list[lightning.Callback]:
    """The callbacks that change what a step holds or does, beside a method's own `callbacks`."""
    parts: list[lightning.Callback] = []
    if has_masks(model) and not any(isinstance(part, HoldMasks) for part in callbacks):
        parts.append(HoldMasks())
    if config.memory.step_in_backward:
        parts.append(StepInBackward())
    elif config.memory.release_gradients or config.parallelism.holding.buckets == "views":
        parts.append(ReleaseGradients(once=not config.memory.release_gradients))
    return parts


def forget(callbacks: Sequence[lightning.Callback]) -> None:
    """Lightning binds its module's `log` to each callback. One that outlives the fit, as the progress bar does, would
    keep the module, the trainer, and with it the optimizer's state."""
    for callback in callbacks:
        for name in ("log", "log_dict"):
            vars(callback).pop(name, None)


def trainer_of(
    config: RunConfig,
    device: str,
    steps: int,
    callbacks: Sequence[lightning.Callback],
    plugins: Sequence[Any],
    **settings: Any,
) -> lightning.Trainer:
    """Lightning's Trainer as a fit has it; `settings` are those that a trace of it does without."""
    return lightning.Trainer(
        accelerator=device,
        plugins=[*plugins, config.parallelism.environment()],
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=micro_batch_size(config)[1],
        gradient_clip_val=config.trainer.grad_clip,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **settings,
    )


def fit(
    config: RunConfig,
    stage: Stage,
    model: nn.Module,
    task: Task,
    data: DataBundle,
    architecture: Architecture,
    run_dir: Path,
    *,
    callbacks: Sequence[lightning.Callback] = (),
    progress: Progress | None = None,
    loss: StageLoss | None = None,
    resume: bool = False,
    beside: Callable[[], Iterable[torch.Tensor]] = tuple,
) -> Fitted:
    """Train `model` in place for `stage.fit`, from `last.ckpt` of this stage where `resume` and it exists.

    `beside`: tensors that the fit holds and `model` does not, a teacher's, for the peak that is measured.
    """
    assert stage.fit is not None
    steps = stage.fit.steps
    device = config.device.kind()
    micro, accumulation = micro_batch_size(config)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    directory = checkpoint_directory(run_dir, stage)
    last = directory / "last.ckpt"

    if config.memory.loss_chunks > 1:
        require_plain_head(model, f"memory.loss_chunks={config.memory.loss_chunks}")
    blocks = [block.name for block in architecture.blocks]
    compiling = None
    if config.trainer.compile:
        compiling = FirstStepCompiles(stage.name, len(blocks), progress.say if progress else None)
    first = (config.parallelism.holding.leaves_out or 0) + 2
    meter = MeasureTraining((first, first + 1), beside)
    metrics = MetricsCsv(
        run_dir / "metrics.csv",
        stage=stage.name,
        count=task.count,
        data_ranks=config.parallelism.data_ranks,
        log_every=config.trainer.log_every,
        unit=task.unit,
        skip=lambda step: step - 1 in meter.skipped_steps or (compiling is not None and step == compiling.step),
    )
    diverged = StopWhereItDiverged(stage.name, stage.fit.lr, config.trainer.log_every)
    parts: list[lightning.Callback] = [*callbacks, diverged, metrics, *([progress] if progress else [])]
    if compiling is not None:
        parts.append(compiling)
    parts += levers(config, model, callbacks)
    validating = MeasureValidation(beside)
    parts += [meter, validating]
    saver = SaveLast(last, config.trainer.checkpoint_every, steps, beside)
    parts += [saver, StopAfterStep(saver.save, stop_file(run_dir, stage))]
    # Ranks run out of memory one by one, so shards cannot be put together; steps in backward change weights before a
    # step is whole.
    if config.fit.on_oom == "adapt" and not (config.parallelism.sharded or config.memory.step_in_backward):
        parts.append(SaveWhereMemoryEnds(saver.save_alone))
    every = config.trainer.evaluate_every
    if every:
        parts.append(
            ModelCheckpoint(
                dirpath=directory, filename="best", monitor="val_loss", save_top_k=1, enable_version_counter=False
            )
        )
    with quiet_lightning(), ExitStack() as undo:
        undo.callback(config.precision.convert_layers(model, architecture))
        if compiling is not None:
            undo.enter_context(compiled_blocks(model, blocks))
        undo.callback(apply_activation_checkpointing(model, blocks, config.memory.activation_checkpointing))
        trainer = trainer_of(
            config, device, steps, parts, [config.precision.plugin(device), AtomicCheckpointIO()],
            devices=config.parallelism.devices,
            num_nodes=config.parallelism.nodes,
            strategy=config.parallelism.strategy(device),
            val_check_interval=every * accumulation if every else None,
            check_val_every_n_epoch=None if every else 1,
            limit_val_batches=None if every else 0,
            default_root_dir=run_dir,
        )  # fmt: skip
        module = TaskModule(model, task, config, stage.fit, loss, architecture, run_dir)
        if module.offload is not None:
            undo.callback(module.offload.close)
        model.train()
        ranks = config.parallelism
        place = {"rank": trainer.global_rank // ranks.tensor_ranks, "world": ranks.data_ranks}
        trainer.fit(
            module,
            train_loader(data.train, batch_size=micro, seed=config.trainer.seed, **place),
            evaluation_loader(data.evaluation, config.trainer.evaluation_batch_size, **place) if every else None,
            ckpt_path=last if resume and checkpoints.exists(last) else None,
            weights_only=False,
        )
    forget(parts)
    model.zero_grad(set_to_none=True)  # those of the last step would stay beside the model wherever it goes
    return Fitted(
        {**metrics.totals(), "trainable_parameters": trained},
        meter.peak_bytes,
        saver.earlier_seconds,
        meter.reserved_bytes,
        saver.peak_bytes,
        asdict(Peak(validating.peak_bytes, validating.reserved_bytes)),
    )
