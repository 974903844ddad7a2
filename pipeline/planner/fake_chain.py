"""A chain of links on fake tensors, link by link: what each holds while it prepares, trains and compresses.

What runs is what a run calls: the method's own `prepare`, `callbacks`, `loss` and `finalize`, on a model, a teacher and
a calibration set of the real shapes and number, without their memory or values (see `supposed` for what is answered
where a method looks at values).
"""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from pipeline import stage_input
from pipeline.artifact import store
from pipeline.chain import Stage
from pipeline.compression.base import Answer, Context, Teacher
from pipeline.data.base import DataBundle
from pipeline.data.calibration import calibration_batches
from pipeline.data.loader import training_batch
from pipeline.errors import first_line
from pipeline.fitting import micro_batch_size
from pipeline.layers.distillation import head_size
from pipeline.layers.sparsity import MASK, masked_layers
from pipeline.models.architecture import describe, positions
from pipeline.planner import formula
from pipeline.planner.fakes import fake_batch, faked, kernels_of, put_into_files
from pipeline.planner.gpu import on_host
from pipeline.planner.live import Peak
from pipeline.planner.supposed import Supposing
from pipeline.planner.trained import adapted
from pipeline.planner.training import traced_fit
from pipeline.planner.transfers import in_files, opens_in_memory, reading, traced_saving
from pipeline.planner.workspaces import BIASED
from pipeline.schema import RunConfig
from pipeline.tasks import lookup
from pipeline.tasks.base import Task
from pipeline.teacher import FrozenTeacher, frozen
from pipeline.walk import changing_stages, stages_of, teacher_tensors

MEASURED = 4
"""Steps of a link's fit that are traced; of the last two a run measures the peak, as of any fit."""


@dataclass
class Links:
    """Predicted peaks by link: `train` of its own fit, with its teacher; `compress` of `prepare` and `finalize`. And of
    the evaluation of what the chain leaves, and its generation. `open`: {phase: why it is not predicted}. `computed`:
    links of which `compress` is the method's own formula, and not traced."""

    train: dict[str, Peak] = field(default_factory=dict)
    compress: dict[str, Peak] = field(default_factory=dict)
    load: Peak | None = None
    """What is left, as it is read back; None where it lies in files."""
    reads: dict[int, Peak] = field(default_factory=dict)
    """The same of what each stage leaves, by its index: a run that is resumed goes on from there."""
    save: Peak | None = None
    """Of all that stages leave the one that takes most to be written."""
    evaluate: Peak | None = None
    generate: Peak | None = None
    stored: int | None = None
    """Bytes of the artifact's weights; those that are masked and quantized may take less."""
    left: nn.Module | None = None
    """What is left, as its artifact gives it back, on the meta device."""
    open: dict[str, str] = field(default_factory=dict)
    computed: set[str] = field(default_factory=set)
    untraced: dict[str, str] = field(default_factory=dict)
    """{phase: why it is computed and not traced}."""

    def take(self, computed: Links) -> None:
        """What is open here and known there."""
        for link in computed.compress.keys() - self.compress.keys():
            self.compress[link] = computed.compress[link]
            self.computed.add(link)
            del self.open[f"compress: {link}"]
        for link in computed.train.keys() - self.train.keys():
            self.train[link] = computed.train[link]
            self.untraced[f"train: {link}"] = "a link before it, or it, cannot be traced"
            self.open.pop(f"train: {link}", None)
        for phase in ("save", "evaluate", "generate"):
            if phase in self.open and phase not in computed.open:
                setattr(self, phase, getattr(computed, phase))
                self.untraced[phase] = self.open.pop(phase)
        self.load, self.stored = self.load or computed.load, self.stored or computed.stored
        self.left = self.left or computed.left

    def phases(self) -> dict[str, Peak]:
        """As a plan names them: `compress` is the link that holds most."""
        found = {f"train: {link}": peak for link, peak in self.train.items()}
        if self.compress and not any(phase.startswith("compress") for phase in self.open):
            found["compress"] = max(self.compress.values(), key=lambda peak: peak.bytes)
        if self.save is not None and "save" not in self.open:
            found["save"] = self.save
        if self.evaluate is not None:
            found["evaluate"] = self.evaluate
        if self.generate is not None:
            found["generate"] = self.generate
        return found


class Chain:
    """A chain on fake tensors. `stored`: it goes on with an artifact. `in_files`: weights lie in files, as those of an
    artifact or a local checkpoint do where nothing trains."""

    def __init__(self, config: RunConfig, data: DataBundle, tokenizer: Any) -> None:
        self.config, self.data, self.tokenizer = config, data, tokenizer
        self.dtype = config.precision.weight_dtype
        self.stored = stage_input.artifact_of(config) is not None
        self.trains = stage_input.trains(changing_stages(stages_of(config)))
        self.in_files = in_files(config)
        self.live = self.counting()

    def counting(self) -> Supposing:
        self.live = Supposing(*kernels_of(self.config))
        self.live.multiply(BIASED)  # the model was evaluated before
        return self.live

    def entering(self, first: Stage) -> nn.Module:
        """What stage 0 leaves."""
        config = self.config
        model = stage_input.shapes(config, self.data)
        if stage_input.beside_compressed(config, first):
            with unset_fake_temporarily():
                model = adapted(config, first, model)
        if self.stored:
            give_masks(model, masked_in(Path(str(config.artifact))))
        faked(model, None if self.stored else self.dtype)
        if self.in_files:
            put_into_files(model)
        return model

    def linked(self, found: Links, stage: Stage, model: nn.Module, untraced: str | None) -> nn.Module:
        """The model as it leaves `stage`, whose peaks are entered in `found`."""
        method = stage.method
        assert method is not None
        context = self.context(stage, model)
        preparing = self.counting()
        preparing.hold_model(model)
        preparing.phase = "working set"
        with preparing:
            model = method.prepare(method.entering(model), context)
        context = replace(context, architecture=describe(model))
        if stage.fit is not None:
            if untraced is None:
                found.train[stage.name] = self.trained(stage, model, context)
                self.live.forget()
                gc.collect()  # as a run does then
            else:
                shapes = faked(copy.deepcopy(model), device="meta")
                with unset_fake_temporarily():
                    self.declared(found, stage, shapes, untraced)
        finalizing = self.counting()
        finalizing.hold_model(model)
        finalizing.phase = "working set"
        with finalizing:
            model = method.finalize(model, context)
        peaks = [live.timeline.peak() for live in (preparing, finalizing)]
        found.compress[stage.name] = max(peaks, key=lambda peak: peak.bytes)
        return model.eval()

    def saved(self, found: Links, stage: Stage, model: nn.Module, task: Task) -> None:
        """Enter what it takes to write what `stage` leaves, if that is the most so far."""
        try:
            peak = traced_saving(self.config, model, task, self.data, stage)
        except Exception as error:  # the stages after it can be planned all the same
            found.open["save"] = f"cannot be traced: {first_line(error)}"
        else:
            found.save = max(peak, found.save or peak, key=lambda peak: peak.bytes)
            if opens_in_memory(self.config):
                found.reads[stage.index] = reading(self.config, model, stage)

    def trained(self, stage: Stage, model: nn.Module, context: Context) -> Peak:
        """The fit of a link."""
        assert stage.fit is not None
        assert stage.method is not None
        micro, _ = micro_batch_size(self.config)
        with unset_fake_temporarily():
            batch = training_batch(self.data.train, micro)
        steps = min(MEASURED, stage.fit.steps)
        live = self.counting()
        live.hold(teacher_tensors(context.teacher), "teacher")
        return traced_fit(
            self.config, stage, model, lookup.get(self.config.data.task), context.architecture, batch, live,
            steps, max(0, steps - 2), stage.method.callbacks(context), stage.method.loss(context),
        )  # fmt: skip

    def declared(self, found: Links, stage: Stage, model: nn.Module, untraced: str = "") -> None:
        """Enter the fit of a link by the formula: the method's callbacks are not in it.

        `model`: on the meta device; it is filled with fake tensors in place. `untraced`: why it is not traced.
        """
        config, architecture = self.config, describe(model)
        phase, task = f"train: {stage.name}", lookup.get(config.data.task)
        batch = training_batch(self.data.train, micro_batch_size(config)[0])

        def given() -> Context:
            assert stage.method is not None
            context = replace(stage_input.context_of(config, stage, model), architecture=architecture)
            return replace(context, teacher=self.teacher(stage)) if stage.method.needs_teacher else context

        try:
            found.train[stage.name] = formula.training(config, stage, model, task, architecture, batch, given)
        except Exception as error:  # whatever torch makes of tensors without values
            found.open[phase] = f"{untraced}{'; ' if untraced else ''}cannot be computed: {first_line(error)}"
        else:
            if untraced:
                found.untraced[phase] = untraced

    def context(self, stage: Stage, model: nn.Module) -> Context:
        """What the method is given: a calibration set and models of fake tensors."""
        assert stage.method is not None
        context = stage_input.context_of(self.config, stage, model)
        if stage.method.needs_calibration:
            with unset_fake_temporarily():
                batches = calibration_batches(self.config.calibration, self.data, self.tokenizer, positions(model))
            context = replace(
                context, calibration=functools.cache(lambda: [on_host(self.config, fake_batch(b)) for b in batches])
            )
        if stage.method.needs_teacher:
            context = replace(context, teacher=self.teacher(stage))
        opened = context.open_model
        assert opened is not None
        return replace(context, open_model=lambda key: faked(twin(opened(key)), self.dtype))

    def teacher(self, stage: Stage) -> Teacher:
        with unset_fake_temporarily():
            base = stage_input.shapes(self.config, self.data)
            shapes = stage_input.context_of(self.config, stage, base).teacher
            assert shapes is not None
            model = copy.deepcopy(shapes.model)
        assert stage.method is not None
        frozen(faked(model, self.dtype))
        if stage.method.records_teacher:
            return ReadTeacher(model, getattr(stage.method, "top_k", None))
        return FrozenTeacher(lambda: model)


def twin(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device; among fake tensors, torch would take the copies for some."""
    with unset_fake_temporarily():
        return copy.deepcopy(model)


class ReadTeacher:
    """A teacher whose logits are read from disk: of the shapes that it gives, or `top_k` of them and their classes."""

    def __init__(self, model: nn.Module, top_k: int | None) -> None:
        self.model, self.top_k = model, top_k
        self.architecture = describe(model)

    def __call__(self, batch: Mapping[str, Tensor], observe: Sequence[str] = ()) -> Answer:
        head = head_size(self.model)
        assert head is not None  # or nothing could be recorded
        inputs = next(iter(batch.values()))
        rows = tuple(inputs.shape) if inputs.ndim == 2 else (len(inputs),)
        if self.top_k is None:
            return Answer(torch.empty(*rows, head, dtype=torch.float16).float(), {})
        stored = torch.empty(*rows, self.top_k, dtype=torch.float16).float()
        return Answer(stored, {}, torch.empty(*rows, self.top_k, dtype=torch.int64))


def as_loaded(model: nn.Module) -> nn.Module:
    """The model as its artifact gives it back: in eval mode, without gradients, what was masked as zeros alone."""
    for _, layer in list(masked_layers(model)):
        del layer._buffers[MASK]
    return frozen(model)


def masked_in(artifact: Path) -> list[str]:
    """The layers whose masks a chain which goes on with an artifact finds in it."""
    records = store.read_manifest(artifact)["layers"].items()
    return [name for name, record in records if record["scheme"] == "float"]


def give_masks(model: nn.Module, layers: Iterable[str]) -> None:
    """Room for a mask, on the meta device, in each of the named layers."""
    for name in layers:
        layer = model.get_submodule(name)
        shape = layer.get_parameter("weight").shape
        layer.register_buffer(MASK, torch.empty(shape, dtype=torch.bool, device="meta"))
