"""Walks the stages of a run that change the model: train, then each link of the chain. It knows no method by name.

    train -> stages/00-train -> link -> stages/01-int8 -> ... -> (pipeline.proof) artifact, receipt, gates

Every stage that changes the model leaves a snapshot in the artifact's own format, written whole or not at all. `resume`
starts after the last one that is there, or at the checkpoint of the fit that was cut off.
"""

from __future__ import annotations

import copy
import gc
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from torch import Tensor, nn

from pipeline import checkpoints
from pipeline.artifact import store
from pipeline.chain import Stage, stages
from pipeline.compression.base import Context, Method, Teacher
from pipeline.data.base import DataBundle
from pipeline.errors import ConfigError, LeanfitError
from pipeline.fitting import Fitted, checkpoint_directory, fit
from pipeline.launch import launch
from pipeline.layers.experts import split_as_in, stacked_experts
from pipeline.layers.lora import fill_dense
from pipeline.layers.offload import release
from pipeline.layers.quantize import not_finite
from pipeline.memory.measure import Peak, measure_peak
from pipeline.models.architecture import describe, positions
from pipeline.nodes import Leader
from pipeline.recording import forget, recorded, records, space_problems
from pipeline.report.progress import Progress
from pipeline.resuming import beyond, finished_run
from pipeline.schema import RunConfig
from pipeline.stage_input import (
    ADAPTED,
    adapted,
    artifact_of,
    base_model,
    beside_compressed,
    calibration_problems,
    context_of,
    data_problems,
    guest_problems,
    load_checkpoint,
    shapes,
    stage_input,
)
from pipeline.tasks.base import Quality, Task
from pipeline.teacher import FrozenTeacher


@dataclass
class Run:
    """What the stages of one run share; `result` is filled as they finish."""

    config: RunConfig
    directory: Path
    task: Task
    data: DataBundle
    tokenizer: Any | None
    earlier: list[dict[str, Any]]
    """Links that an artifact had before this run compressed it further."""
    progress: Progress
    result: dict[str, Any]
    links: list[dict[str, Any]] = field(default_factory=list)
    nodes: Leader | None = None
    """The other machines, where this one leads."""
    begun: bool = False
    """Whether a stage is done: from then on nothing that goes wrong is a config that never ran."""
    planned: dict[str, int] = field(default_factory=dict)
    """Predicted bytes by phase; `train: NAME` is a link's own fit."""
    doing: str = "train"
    """What runs now: train, compress: NAME, or evaluate."""

    @property
    def device(self) -> str:
        return self.config.device.kind()

    def snapshot(self, stage: Stage) -> Path:
        return self.directory / "stages" / stage.directory


def stages_of(config: RunConfig) -> list[Stage]:
    """The stages of a run; of all jobs only `run` trains the base model."""
    return stages(config.chain, config.trainer.max_steps, config.optimizer.lr, config.job in ("run", "plan"))


def begin(run: Run, line: Sequence[Stage]) -> int:
    """Everything that can be refused before anything is written; returns how many leading stages are done already.

    Raises:
        ConfigError: every problem that needs the model's shapes; a resume with nothing to start from or to do.
    """
    changing = changing_stages(line)
    preflight(run.config, run.data, run.tokenizer, run.directory, changing)
    if not run.config.resume:
        return 0
    done = finished(run, changing)
    require_something(run, changing, done)
    return done


def changing_stages(line: Sequence[Stage]) -> list[Stage]:
    """The stages that change the model, each of which leaves a snapshot."""
    return [stage for stage in line if stage.kind in ("train", "link")]


def walk(run: Run, line: Sequence[Stage], done: int) -> None:
    """Every stage but the first `done`, in order, each leaving its snapshot. Fills `run.result` as far as they go."""
    changing = changing_stages(line)
    run.begun = done > 0
    model: nn.Module | None = None
    saving_known = True
    for stage in changing:
        if stage.index < done:
            record = store.read_manifest(run.snapshot(stage))["record"]
        else:
            run.doing = "train" if stage.kind == "train" else f"compress: {stage.name}"
            if model is None:
                with measure_peak(run.device) as opening:
                    model = stage_input(run.config, run.directory, run.data, changing, stage)
                enter_peak(run.result, "load", opening)
            model, record = train(run, stage, model) if stage.kind == "train" else compress(run, stage, model)
            record["peaks"] = {"load": asdict(opening)}
            record = save_snapshot(run, stage, model, record, last=stage is changing[-1])
            if not run.config.keep_stages:
                forget(run.directory, stage)
        run.begun = True
        note(run, stage, record)
        fitted = record["fitted"]
        written = "save" in record.get("peaks", {}) and (not fitted or fitted.get("saving_bytes") is not None)
        saving_known = saving_known and written
    if not saving_known:
        # What the rest of the run took to save would pass for all of it.
        run.result["memory"]["measured"]["save"] = None
        run.progress.say("peak memory of saving is not known: the run was cut off as it saved a stage or its fit")


def preflight(config: RunConfig, data: DataBundle, tokenizer: Any, directory: Path, changing: Sequence[Stage]) -> None:
    """Problems that need the model's shapes, found on the meta device before anything is trained in `directory`."""
    trains = changing[0].fit is not None
    if len(changing) == 1 and not trains:
        return
    if config.artifact is not None and checkpoints.exists(Path(config.artifact)):
        model = base_model(config, data)  # whether its weights fit is seen only as they are loaded
    else:
        model = shapes(config, data)
    if artifact_of(config) is not None and (unfit := data_problems(config, model, data)):
        raise ConfigError(unfit)  # links would look at data that the model cannot take
    problems = config.precision.model_problems(model)
    if trains:
        architecture = describe(model)
        problems += config.adapter.preflight(model, architecture)
        problems += config.optimizer.shape_problems(model)
        problems += config.precision.shape_problems(model, architecture)
        problems += config.parallelism.shape_problems(model, architecture)
    # Links enter a mixture in place; a checkpoint that is given as a teacher is one of the model before.
    base = copy.deepcopy(model) if stacked_experts(model) else model
    drawn_for = dict[int | None, nn.Module]()
    for stage in changing[1:]:
        assert stage.method is not None
        model = stage.method.entering(model)
        context = context_of(config, stage, model, base=base)
        if stage.method.needs_calibration:
            drawn_for.setdefault(positions(model), model)
        told: list[str] = []
        try:
            told = stage.method.preflight(model, context)
            after = stage.method.reshaped(model, context)
        except ConfigError as error:  # a teacher or a student that cannot be opened
            told, after = told or list(error.problems), None
        if records(stage) and not told:
            told = space_problems(config, stage, directory, data, context)
        problems += [*told, *guest_problems(stage, context, data, tokenizer)]
        if after is None:  # what later links would get is not known
            break
        model = after
    for model in drawn_for.values():
        problems += calibration_problems(config, model, data, tokenizer)
    if problems:
        raise ConfigError(problems)


def finished(run: Run, changing: list[Stage]) -> int:
    """How many leading stages have a snapshot of the length now asked for."""
    done = 0
    for stage in changing:
        manifest = run.snapshot(stage) / "manifest.json"
        steps = stage.fit.steps if stage.fit else 0
        if not manifest.is_file() or store.read_manifest(run.snapshot(stage))["record"]["steps"] != steps:
            break
        done += 1
    return done


def discard(run: Run, changing: list[Stage], done: int) -> None:
    """Throw away what a shorter run left: stale snapshots, and checkpoints of links whose input will be another.

    A run that trains and is not resumed begins without a checkpoint: one of an earlier run in this directory would be
    what it goes on from once it is cut off, or out of memory, before its own first one.
    """
    for stage in changing[done:]:
        shutil.rmtree(run.snapshot(stage), ignore_errors=True)
    if not done:
        shutil.rmtree(run.directory / ADAPTED, ignore_errors=True)
    for stage in changing[done + 1 if run.config.resume or changing[0].fit is None else done :]:
        shutil.rmtree(checkpoint_directory(run.directory, stage), ignore_errors=True)


def require_something(run: Run, changing: list[Stage], done: int) -> None:
    """Resuming needs something to start from and something left to do.

    Raises:
        ConfigError: no finished stage and no checkpoint; a run that is over; or fewer steps than were taken already.
    """
    asked = changing[0].fit.steps if changing[0].fit else 0
    checkpoint = checkpoint_directory(run.directory, changing[0]) / "last.ckpt"
    where = f"resume={run.directory}"
    if not done and not checkpoints.exists(checkpoint):
        raise ConfigError(f"{where}: nothing to resume, it holds neither checkpoints/last.ckpt nor a finished stage")
    if told := finished_run(run.config, run.directory):
        raise ConfigError(told)
    taken = checkpoints.step(checkpoint) if checkpoints.exists(checkpoint) else 0
    if taken > asked:
        raise ConfigError(beyond(run.directory, taken, asked))


def run_fit(run: Run, stage: Stage, model: nn.Module, context: Context) -> Fitted | None:
    """The stage's own fit, here or in workers; `model` holds the trained weights afterwards."""
    if stage.fit is None:
        return None
    method = stage.method
    if run.config.parallelism.distributed:
        last = checkpoint_directory(run.directory, stage) / "last.ckpt"
        goes_on = run.config.resume and checkpoints.exists(last)
        if goes_on and (first := run.config.parallelism.holding.leaves_out) is not None:
            run.progress.say(
                f"what powersgd left out of gradients is in no checkpoint: {first} steps with whole ones come first"
            )
        fitted = launch(run.config, stage, run.directory, resume=run.config.resume, nodes=run.nodes)
        load_checkpoint(model, last)
        if method:
            take_over(method.callbacks(context), last)
        return fitted
    fitted = fit(
        run.config, stage, model, run.task, run.data, context.architecture, run.directory,
        callbacks=method.callbacks(context) if method else [], loss=method.loss(context) if method else None,
        progress=run.progress, resume=run.config.resume, beside=partial(teacher_tensors, context.teacher),
    )  # fmt: skip
    gc.collect()  # the optimizer's state goes round in circles with the trainer, and would stay
    return fitted


def take_over(callbacks: Iterable[Callback], path: Path) -> None:
    """What a method's callbacks came to know in workers, from the checkpoint that these left."""
    states = checkpoints.callback_states(path)
    for callback in callbacks:
        if callback.state_key in states:
            callback.load_state_dict(states[callback.state_key])


def teacher_tensors(teacher: Teacher | None) -> list[Tensor]:
    """What a fit holds of a teacher that answers in every step."""
    if not isinstance(teacher, FrozenTeacher):
        return []
    return [*teacher.model.parameters(), *teacher.model.buffers()]


def train(run: Run, stage: Stage, model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """Stage 0. Its record carries what `before` means: quality of the trained model, and the training's figures."""
    context = context_of(run.config, stage, model)
    fitted = run_fit(run, stage, adapted(run.config, stage, model, context), context)
    if fitted:
        run.begun = True
        model = run.config.adapter.merge(model)
    with run.progress.phase("evaluating"):
        quality = evaluate(run, model, stage.name if stage.fit else None)
    record = {"steps": stage.fit.steps if stage.fit else 0, "fitted": asdict(fitted) if fitted else None, "detail": {}}
    return model, {**record, "quality": asdict(quality), "seconds": 0.0}


def compress(run: Run, stage: Stage, model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """One link: prepare, its own fit if it trains, finalize."""
    method = stage.method
    assert method is not None
    started = time.perf_counter()
    context = context_of(run.config, stage, model, run.data, run.tokenizer, run.directory)
    with run.progress.phase(f"preparing: {stage.name}"):
        model.to(run.device)
        with measure_peak(run.device, [*model.parameters(), *model.buffers()]) as preparing:
            model = method.prepare(method.entering(model), context)
    context = replace(context, architecture=describe(model))
    if records(stage):
        with run.progress.phase(f"recording the teacher: {stage.name}"):
            context = recorded(run.config, stage, run.directory, run.data, context, run.progress.say)
    fitted = run_fit(run, stage, model, context)
    with run.progress.phase(f"compressing: {stage.name}"):
        model.to(run.device)
        with measure_peak(run.device, [*model.parameters(), *model.buffers()]) as finalizing:
            model = method.finalize(model, context)
        model.eval()
        detail = {**method.detail(model, context), **context.facts}
    return model, {
        "steps": stage.fit.steps if stage.fit else 0,
        "fitted": asdict(fitted) if fitted else None,
        "detail": detail,
        "quality": None,
        "seconds": time.perf_counter() - started + (fitted.earlier_seconds if fitted else 0.0),
        "peak_bytes": most(preparing.bytes, finalizing.bytes),
        "reserved_bytes": most(preparing.reserved, finalizing.reserved),
    }


def most(*sizes: int | None) -> int | None:
    """The largest of those that are known."""
    return max((size for size in sizes if size is not None), default=None)


def save_snapshot(run: Run, stage: Stage, model: nn.Module, record: dict[str, Any], *, last: bool) -> dict[str, Any]:
    """Write the model as it leaves `stage`. A link's quality is measured here, the last's on the artifact itself.

    The record, with the peaks of opening and saving, says to a run that is resumed what they were.
    """
    if stage.kind == "link" and not last:
        with run.progress.phase(f"evaluating: {stage.name}"):
            record["quality"] = asdict(evaluate(run, model, stage.name))
    places = {run.snapshot(stage): model}
    if beside_compressed(run.config, stage):
        # The next link gets what was trained. `before` is the dense model that it stands for; it is written last.
        dense = fill_dense(split_as_in(model, base_model(run.config, run.data)), model.cpu())
        places = {run.directory / ADAPTED: model, run.snapshot(stage): dense}
    release()  # what making the model took
    peaks = []
    with run.progress.phase("saving"):
        for place, saved in places.items():
            with measure_peak(run.device, [*saved.parameters(), *saved.buffers()]) as writing:
                write_snapshot(run, stage, saved, place, record)
            peaks.append(writing)
    largest = Peak(most(*(peak.bytes for peak in peaks)), most(*(peak.reserved for peak in peaks)))
    record["peaks"]["save"] = asdict(largest)
    store.annotate(run.snapshot(stage), {"record": record})
    release()  # what writing it took: the process that reads it back needs room beside this one
    return record


def enter_peak(result: dict[str, Any], phase: str, peak: Peak) -> None:
    """Enter a measured peak of a phase that a run has more than one of: the largest counts."""
    for kind, size in (("measured", peak.bytes), ("reserved", peak.reserved)):
        result["memory"][kind][phase] = most(result["memory"][kind][phase], size)


def write_snapshot(run: Run, stage: Stage, model: nn.Module, place: Path, record: dict[str, Any]) -> None:
    """The model as it leaves `stage`, as an artifact at `place`."""
    store.save(
        model.cpu(),
        place,
        chain=[*run.earlier, *(link_settings(s) for s in chain_until(run.config, stage))],
        tokenizer=run.tokenizer,
        probe=run.task.probe(run.data),
        calibration=asdict(run.config.calibration) if calibrated(run.config, stage) else None,
        extra={
            "record": record,
            "task": run.task.name,
            "data": asdict(run.config.data),
            "fingerprint": run.data.fingerprint,
        },
    )


def chain_until(config: RunConfig, stage: Stage) -> list[tuple[str, Method]]:
    return list(config.chain.items())[: stage.index]


def calibrated(config: RunConfig, stage: Stage) -> bool:
    """Whether any link up to `stage` looked at the calibration set."""
    return any(method.needs_calibration for _, method in chain_until(config, stage))


def link_settings(link: tuple[str, Method]) -> dict[str, Any]:
    name, method = link
    return {"name": name, "method": method.name, "config": asdict(method)}


def evaluate(run: Run, model: nn.Module, stage: str | None = None) -> Quality:
    """Quality on the held-out split, in the model's own dtype, on the run's device, as `stage` has left the model.

    Raises:
        LeanfitError: it is no finite number; the stage is named, and a weight that holds NaN or infinity.
    """
    model.to(run.device)
    with run.config.precision.evaluation_context(run.device):
        found = run.task.evaluate(model, run.data, run.config.trainer.evaluation_batch_size, run.device)
    if math.isfinite(found.value) and math.isfinite(found.loss):
        return found
    wrong = not_finite(model.named_parameters())
    out_of_range = f"all weights are finite, what they give in precision {run.config.precision.label} is not"
    cause = out_of_range if wrong is None else f"{wrong} holds NaN or infinity"
    left = "" if stage is None else f" after stage '{stage}'"
    raise LeanfitError(f"{found.metric}{left} is {found.value:g}, of a loss of {found.loss:g} nats: {cause}")


def note(run: Run, stage: Stage, record: Mapping[str, Any]) -> None:
    """Enter a finished stage into the result."""
    size = store.tensor_bytes(run.snapshot(stage))
    fitted = record["fitted"]
    for phase, peak in record.get("peaks", {}).items():
        enter_peak(run.result, phase, Peak(**peak))
    if fitted:
        enter_peak(run.result, "save", Peak(fitted.get("saving_bytes")))
    if stage.index == 0:
        quality = record["quality"]
        run.result["quality"].update(
            metric=quality["metric"], direction=quality["direction"], before=quality["value"],
            loss_before=quality["loss"], baseline=run.task.baseline(run.data), n=quality["n"],
        )  # fmt: skip
        run.result["size"]["bytes_before"] = size
        if fitted:
            run.result["train"] = fitted["train"]
            run.result["memory"]["measured"]["train"] = fitted["peak_bytes"]
            run.result["memory"]["reserved"]["train"] = fitted.get("reserved_bytes")
            enter_peak(run.result, "validate", Peak(**fitted.get("validating", {})))
        return
    assert stage.method is not None
    run.result["stages"].append(
        {
            "name": stage.name,
            "method": stage.method.name,
            "config": asdict(stage.method),
            "seconds": record["seconds"],
            "quality_after": record["quality"]["value"] if record["quality"] else None,
            "bytes_after": size,
            "train": fitted["train"] if fitted else None,
            "memory": {
                "train": fitted["peak_bytes"] if fitted else None,
                "compress": record.get("peak_bytes"),
                "train_predicted": run.planned.get(f"train: {stage.name}"),
            },
            "detail": record["detail"],
        }
    )
    enter_peak(run.result, "compress", Peak(record.get("peak_bytes"), record.get("reserved_bytes")))
