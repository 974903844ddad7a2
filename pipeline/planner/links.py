"""The links of a chain on fake tensors: what each holds while it prepares, trains and compresses, and what it leaves.

What is traced is what runs: the method's own `prepare`, `callbacks`, `loss` and `finalize`, on a model, a teacher and a
calibration set of the real shapes and number, without their memory or values (see `supposed` for what is answered where
a method looks at values). Each link is given the model that the one before has left, and the last one's is evaluated.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from pipeline import checkpoints, stage_input
from pipeline.artifact import store
from pipeline.chain import Stage
from pipeline.compression.base import Answer, Context, Teacher
from pipeline.compression.pruning import Pruner
from pipeline.data.base import DataBundle
from pipeline.data.calibration import calibration_batches
from pipeline.data.loader import evaluation_loader
from pipeline.errors import first_line
from pipeline.fitting import micro_batch_size
from pipeline.layers import kernels, offload, pulse
from pipeline.layers.distillation import head_size
from pipeline.layers.footprint import file_bytes, model_tensors
from pipeline.layers.sparsity import MASK, masked_layers
from pipeline.models.architecture import describe, positions
from pipeline.planner import formula
from pipeline.planner.evaluation import trace_evaluation, traced_evaluation
from pipeline.planner.fakes import fake_batch, faked, kernels_of, put_into_files, tracing
from pipeline.planner.generation import generates, trace_generation, traced_generation
from pipeline.planner.live import FILES, Peak
from pipeline.planner.supposed import Supposing
from pipeline.planner.trained import adapted
from pipeline.planner.training import traced_fit
from pipeline.planner.transfers import opens_in_memory, reading, traced_saving
from pipeline.planner.workspaces import BIASED, WITH_BIAS, WORKSPACES, workspace
from pipeline.schema import RunConfig
from pipeline.tasks import lookup
from pipeline.tasks.base import Task
from pipeline.tasks.causal_lm import PROMPT_TOKENS
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
    save: Peak | None = None
    """Of all that stages leave the one that takes most to be written."""
    evaluate: Peak | None = None
    generate: Peak | None = None
    stored: int | None = None
    """Bytes of the artifact's weights; masked ones may take less."""
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


def trace_links(config: RunConfig, data: DataBundle, tokenizer: Any, untraced: str | None = None) -> Links:
    """What the links of `config.chain` hold on a CPU, and the evaluation after them. Takes seconds; allocates nothing
    of the model's size. Where a link cannot be traced, `open` says why, of it and of all that comes after it.

    Args:
        tokenizer: the run's, for a calibration set of its own text.
        untraced: why fits are not traced with this config, where they are not; all else is.
    """
    found = Links()
    line = changing_stages(stages_of(config))
    task = lookup.get(config.data.task)
    left = [*(f"compress: {stage.name}" for stage in line[1:]), *after(config)]
    with _unreal(config):
        chain = _Chain(config, data, tokenizer)
        try:
            model = chain.entering(line[0])
            chain.saved(found, model, task)
            if stage_input.beside_compressed(config, line[0]) and config.device.kind() == "cpu":  # else on its host
                # Beside what was trained, the dense model that it stands for.
                chain.saved(found, faked(stage_input.shapes(config, data), chain.dtype), task)
            for stage in line[1:]:
                model = chain.linked(found, stage, model, untraced)
                chain.saved(found, model, task)
                del left[0]
            found.load = reading(config, model) if opens_in_memory(config, line) else None
            loaded = as_loaded(model)
            found.stored = file_bytes(model_tensors(loaded, {}))
            if "generate" in left:
                found.generate = traced_generation(config, loaded, task, PROMPT_TOKENS, chain.counting)
                del left[0]
            if not chain.trains:
                put_into_files(loaded)
            found.evaluate = traced_evaluation(config, loaded, task, data, chain.counting())
            del left[0]
        except Exception as error:  # whatever torch, or a method, makes of values that are not there
            why = f"cannot be traced: {first_line(error)}"
            found.open |= {phase: why if phase == left[0] else f"{left[0]} comes before it" for phase in left}
            fits = [f"train: {stage.name}" for stage in line[1:] if stage.fit and stage.name not in found.train]
            found.open |= dict.fromkeys(["save", *fits], f"{left[0]} comes before it")
    if any(phase.startswith("compress") for phase in found.open):
        found.take(declare_links(config, data, tokenizer))
    return found


def trace_artifact(config: RunConfig, artifact: Path, task: Task, prompt: int) -> Peak:
    """What `job=generate` holds with an artifact, after a prompt of so many tokens. Raises ArtifactError as
    `store.load` does."""
    model = store.blueprint(artifact, quantized=True)
    with _unreal(config):
        return traced_generation(config, frozen(faked(model)), task, prompt, lambda: Supposing(*kernels_of(config)))


def declare_links(config: RunConfig, data: DataBundle, tokenizer: Any) -> Links:
    """The same by formula, for a model of any size: what the methods themselves say that `prepare` and `finalize` hold,
    where they know, the fits of those that have the task's loss, and what the chain leaves, where no values decide what
    that is. It takes a second or two for 8B weights."""
    found = Links()
    first, *links = changing_stages(stages_of(config))
    model: nn.Module | None = stage_input.shapes(config, data)
    assert model is not None
    if stage_input.beside_compressed(config, first):
        model = adapted(config, first, model)
    else:
        model.to(config.precision.weight_dtype)
    task = lookup.get(config.data.task)
    chain = _Chain(config, data, tokenizer)

    def saved(model: nn.Module) -> None:
        with _unreal(config):
            chain.saved(found, faked(twin(model)), task)

    saved(model)
    if stage_input.beside_compressed(config, first) and config.device.kind() == "cpu":  # else on its host
        saved(stage_input.shapes(config, data).to(config.precision.weight_dtype))  # the dense one that it stands for
    for stage in links:
        assert stage.method is not None
        method, context = stage.method, stage_input.context_of(config, stage, model)
        if method.needs_calibration:
            batches = calibration_batches(config.calibration, data, tokenizer, positions(model))
            on_meta = [{name: tensor.to("meta") for name, tensor in batch.items()} for batch in batches]
            context = replace(context, calibration=functools.partial(list, on_meta))
        terms = method.memory(model, context)
        if terms is None:
            found.open[f"compress: {stage.name}"] = f"no formula is known for {method.name} of this model"
        else:
            if taken := workspace(config):
                terms = {**terms, WORKSPACES: taken + WITH_BIAS}
            found.compress[stage.name] = Peak(sum(terms.values()), terms, "")
            found.computed.add(stage.name)
        model = method.reshaped(model, context)
        if isinstance(method, Pruner):
            give_masks(model, method.layers(model, context))
        if stage.fit is not None:
            trained = copy.deepcopy(model)
            if method.kind == "quantization":
                with torch.device("meta"), Supposing():
                    trained = method.prepare(trained, context)
            declare_fit(found, chain, stage, trained)
        model = method.left(model, context)
        if model is None:
            why = f"what {stage.name} leaves is known by its values alone"
            found.open |= dict.fromkeys(("save", *after(config)), why)
            return found
        saved(model)
    try:
        declare_left(config, data, chain, found, model)
    except Exception as error:  # whatever torch makes of tensors without values
        found.open |= dict.fromkeys(after(config), f"cannot be computed: {first_line(error)}")
    return found


def after(config: RunConfig) -> list[str]:
    """The phases of what a chain leaves."""
    return ["generate", "evaluate"] if generates(config, lookup.get(config.data.task)) else ["evaluate"]


def declare_left(config: RunConfig, data: DataBundle, chain: _Chain, found: Links, model: nn.Module) -> None:
    """Enter what opens, evaluates and generates with `model`, which a chain leaves, by formula."""
    task = lookup.get(config.data.task)
    if opens_in_memory(config, changing_stages(stages_of(config))):
        found.load = reading(config, model)
    loaded = as_loaded(model)
    found.stored = file_bytes(model_tensors(loaded, {}))
    continued = twin(loaded)
    with _unreal(config), unset_fake_temporarily():  # for the kernels of quantized layers
        if generates(config, task):
            found.generate = trace_generation(config, continued, task)
        found.evaluate = trace_evaluation(config, loaded, task, data, in_files=not chain.trains)


def declare_fit(found: Links, chain: _Chain, stage: Stage, model: nn.Module, untraced: str = "") -> None:
    """Enter the fit of a link by the formula: the method's callbacks are not in it.

    `model`: on the meta device; it is filled with fake tensors in place. `untraced`: why it is not traced.
    """
    config, architecture = chain.config, describe(model)
    phase, task = f"train: {stage.name}", lookup.get(config.data.task)
    batch = next(iter(evaluation_loader(chain.data.train, micro_batch_size(config)[0])))

    def given() -> Context:
        assert stage.method is not None
        context = replace(stage_input.context_of(config, stage, model), architecture=architecture)
        return replace(context, teacher=chain.teacher(stage)) if stage.method.needs_teacher else context

    try:
        found.train[stage.name] = formula.training(config, stage, model, task, architecture, batch, given)
    except Exception as error:  # whatever torch makes of tensors without values
        found.open[phase] = f"{untraced}{'; ' if untraced else ''}cannot be computed: {first_line(error)}"
    else:
        if untraced:
            found.untraced[phase] = untraced


class _Chain:
    """A chain on fake tensors. `stored`: it goes on with an artifact. `in_files`: weights lie in files, as those of an
    artifact or a local checkpoint do where nothing trains."""

    def __init__(self, config: RunConfig, data: DataBundle, tokenizer: Any) -> None:
        self.config, self.data, self.tokenizer = config, data, tokenizer
        self.dtype = config.precision.weight_dtype
        self.stored = config.artifact is not None and not checkpoints.exists(Path(config.artifact))
        self.trains = stage_input.trains(changing_stages(stages_of(config)))
        self.in_files = not self.trains and (self.stored or (config.artifact is None and config.model.lies_in_files()))
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
            model = method.prepare(model, context)
        context = replace(context, architecture=describe(model))
        if stage.fit is not None:
            if untraced is None:
                found.train[stage.name] = self.trained(stage, model, context)
                self.live.forget()
                gc.collect()  # as a run does then
            else:
                shapes = faked(copy.deepcopy(model), device="meta")
                with unset_fake_temporarily():
                    declare_fit(found, self, stage, shapes, untraced)
        finalizing = self.counting()
        finalizing.hold_model(model)
        finalizing.phase = "working set"
        with finalizing:
            model = method.finalize(model, context)
        peaks = [live.timeline.peak() for live in (preparing, finalizing)]
        found.compress[stage.name] = max(peaks, key=lambda peak: peak.bytes)
        return model.eval()

    def saved(self, found: Links, model: nn.Module, task: Task) -> None:
        """Enter what it takes to write what a stage leaves, if that is the most so far."""
        try:
            peak = traced_saving(self.config, model, task, self.data)
        except Exception as error:  # the stages after it can be planned all the same
            found.open["save"] = f"cannot be traced: {first_line(error)}"
        else:
            found.save = max(peak, found.save or peak, key=lambda peak: peak.bytes)

    def trained(self, stage: Stage, model: nn.Module, context: Context) -> Peak:
        """The fit of a link."""
        assert stage.fit is not None
        assert stage.method is not None
        micro, _ = micro_batch_size(self.config)
        with unset_fake_temporarily():
            batch = next(iter(evaluation_loader(self.data.train, micro)))
        steps = min(MEASURED, stage.fit.steps)
        live = self.counting()
        live.hold(teacher_tensors(context.teacher), "teacher")
        return traced_fit(
            self.config, stage, model, lookup.get(self.config.data.task), context.architecture, batch, live,
            steps, max(0, steps - 2), stage.method.callbacks(context), stage.method.loss(context),
        )  # fmt: skip

    def context(self, stage: Stage, model: nn.Module) -> Context:
        """What the method is given: a calibration set and models of fake tensors."""
        assert stage.method is not None
        context = stage_input.context_of(self.config, stage, model)
        if stage.method.needs_calibration:
            with unset_fake_temporarily():
                batches = calibration_batches(self.config.calibration, self.data, self.tokenizer, positions(model))
            context = replace(context, calibration=functools.cache(lambda: [fake_batch(batch) for batch in batches]))
        context = replace(context, device="cpu")  # whose operators are traced, whatever the device
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


@contextlib.contextmanager
def _unreal(config: RunConfig) -> Iterator[None]:
    """Fake tensors, and what stands in for that which they cannot do: be moved, be told apart by their address, lie in
    files, be packed for a kernel."""
    kernels.choose(torch.device("cpu"), torch.float32, 1)  # which kernel is exact here is found by trying it, for good

    def address(tensor: Tensor) -> int:
        return int(tensor.untyped_storage()._cdata) + int(tensor.storage_offset()) * tensor.itemsize

    def copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        # torch would copy the bytes behind a tensor that has an address.
        if id(tensor) not in memo:
            made = torch.empty_like(tensor)
            memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
        return cast(Tensor, memo[id(tensor)])

    def written(tensor: Tensor, directory: Path, dtype: torch.dtype) -> Tensor:
        made = torch.empty(0, dtype=dtype)
        FILES[made.untyped_storage()._cdata] = made.untyped_storage()
        return made.resize_(tensor.shape)

    def place(tensor: Tensor) -> Path | None:
        return Path() if tensor.untyped_storage()._cdata in FILES else None

    # Only names that no other module takes for its own: one first imported meanwhile would keep what stands in for it.
    with (
        tracing(config),
        pulse.planned(),
        mock.patch.object(nn.Module, "to", lambda module, *_, **__: module),
        mock.patch.object(FakeTensor, "data_ptr", address),
        mock.patch.object(FakeTensor, "__deepcopy__", copied),
        mock.patch.object(kernels, "fbgemm_pack", _packed),
        mock.patch.object(kernels, "_fbgemm", _product),
        mock.patch.object(kernels, "peak", _peak),
        mock.patch.object(offload, "_written", written),
        mock.patch.object(offload, "_place", place),
    ):
        yield


class _Packed(NamedTuple):
    outputs: int


def _packed(weight: Tensor, weight_scale: Tensor) -> _Packed:
    """FBGEMM's own form is made of a quantized tensor with scales and zero points; it lies where torch sees none."""
    _ = weight.clone(), weight_scale.double(), torch.empty(len(weight), dtype=torch.int64)
    return _Packed(len(weight))


def _product(rows: Tensor, zero_point: int, packed: _Packed, step: float = 1.0) -> Tensor:
    """FBGEMM's product holds its sums as integers beside its result."""
    sums = torch.empty(*rows.shape[:-1], packed.outputs, dtype=torch.int32)
    return torch.empty(sums.shape, dtype=torch.float32)


def _peak(x: Tensor) -> float:
    """Not a mock's own answer: a mock keeps what it was asked about."""
    return 1.0
