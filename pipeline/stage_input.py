"""What a stage begins with: its model, its context, and the models that a link brings in from outside.

    base_model, or the snapshot of the stage before -> adapters or the method's `prepare` -> the fit

A rank of a distributed fit rebuilds just this for itself.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from pipeline import checkpoints
from pipeline.artifact import store
from pipeline.chain import Stage
from pipeline.compression.base import Context, Method
from pipeline.compression.pruning import kept_share
from pipeline.data.base import DataBundle, DataSpec
from pipeline.data.calibration import calibration_batches
from pipeline.earlier_run import as_locked, lock_of
from pipeline.errors import ConfigError, first_line
from pipeline.layers.lora import held_tensors
from pipeline.layers.sparsity import MASK
from pipeline.models.architecture import describe, positions
from pipeline.models.base import TaskName
from pipeline.models.hf import spec_problems
from pipeline.models.unfilled import shapes_alone
from pipeline.schema import RunConfig
from pipeline.teacher import FrozenTeacher, frozen, open_directory, vocabulary_problems

FIRST = Stage(0, "train", "train").directory
"""Where stage 0 leaves its output."""
ADAPTED = f"stages/{FIRST}-adapters"
"""Where stage 0 leaves its output beside that, as the next link takes it, where adapters cannot be merged (QLoRA)."""
TASKS: dict[str, TaskName] = {"input_ids": "causal_lm", "pixel_values": "image_classification"}
"""What a model of transformers is called with -> its task."""
GUESTS = ("teacher", "student")
"""Settings of a link that name a model outside of its chain."""


def artifact_of(config: RunConfig) -> Path | None:
    """The artifact that stage 0 goes on with; None: a fresh or pretrained model, which a checkpoint may fill."""
    path = None if config.artifact is None else Path(config.artifact)
    return None if path is None or checkpoints.exists(path) else path


def base_model(config: RunConfig, data: DataBundle, offload_to: Path | None = None) -> nn.Module:
    """Stage 0's input: fresh or pretrained weights from the model choice, or those of `artifact=`.

    With `offload_to`, pretrained weights and an artifact's lie in files in that directory instead of in memory.
    """
    if (stored := artifact_of(config)) is not None:
        return store.load(stored, trainable=True, offload_to=offload_to)
    torch.manual_seed(config.trainer.seed)
    if offload_to is None or config.artifact is not None:
        model = config.model.build(data.spec)
    else:
        model = config.model.build_offloaded(data.spec, config.precision.weight_dtype, offload_to)
    if config.artifact is not None:
        model = filled(model, config, Path(config.artifact), f"artifact={config.artifact}")
    return config.precision.convert(model)


def filled(model: nn.Module, config: RunConfig, checkpoint: Path, said: str) -> nn.Module:
    """`model` with the weights of a checkpoint and the adapters of `config`, merged. Raises as `load_checkpoint` does,
    which is given `said`."""
    if config.adapter.trains:
        model = config.adapter.attach(model, describe(model), config.trainer.seed)
    load_checkpoint(model, checkpoint, said, next(model.parameters()).device.type)
    return config.adapter.merge(model)


def shapes(config: RunConfig, data: DataBundle) -> nn.Module:
    """Stage 0's input on the meta device: an artifact's layers as they are stored, quantized ones too."""
    if (stored := artifact_of(config)) is not None:
        store.check(stored)
        return store.blueprint(stored, quantized=True)
    return shapes_alone(lambda: config.model.build(data.spec))


def data_problems(config: RunConfig, model: nn.Module, data: DataBundle) -> list[str]:
    """What keeps the artifact of `config`, of these shapes, from taking data that it was not made with."""
    said, task = f"artifact={config.artifact}", TASKS.get(str(getattr(model, "main_input_name", None)))
    if task in (None, config.data.task):
        return spec_problems(said, cast(Any, model).config, data.spec)
    its, given = (name.replace("_", " ") for name in (str(task), config.data.task))
    return [
        f"data={config.choices['data']} is for {given}, {said} is a model for {its}; "
        "leave out data=CHOICE, to have the data that it was made with"
    ]


def load_checkpoint(model: nn.Module, path: Path, said: str = "", device: str = "cpu") -> None:
    """Weights of a Lightning checkpoint that a fit of ours wrote, into `model`, in place; `said` names the setting.

    Raises:
        ConfigError: no checkpoint, or one of another model.
    """
    said = said or f"artifact={path}"
    try:
        state = checkpoints.weights(path, device)
    except Exception as error:  # whatever an altered file makes torch and pickle raise
        raise ConfigError(f"{said} cannot be read as a checkpoint: {first_line(error, 100)}") from error
    weights = {name.removeprefix("model."): value for name, value in state.items()}
    modules = dict(model.named_modules())
    for name, value in weights.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == MASK and layer in modules:
            model.get_submodule(layer).register_buffer(MASK, value)
    given = {**held_tensors(model), **weights}
    try:
        model.load_state_dict(given)
    except RuntimeError as error:
        differing = differences(model.state_dict(), given) or first_line(error)
        told = f"{said}: its weights are not those of the model that was chosen: {differing}"
        raise ConfigError(f"{told}; {remedy(said, path, given)}") from error


def differences(wanted: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> str:
    """How weights differ from those that a model wants, in a few words, with the first of each kind."""
    missing = [name for name in wanted if name not in given]
    unknown = [name for name in given if name not in wanted]
    other = [
        f"{name}: {list(given[name].shape)}, the model's is {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    kinds = (("missing", missing), ("too many", unknown), ("of another shape", other))
    return ", ".join(
        f"{len(names)} {'tensors' if len(names) > 1 else 'tensor'} {what} ({names[0]})"
        for what, names in kinds
        if names
    )


def remedy(said: str, checkpoint: Path, weights: Mapping[str, torch.Tensor]) -> str:
    """What to give instead, where the weights of a checkpoint that `said` names do not fit."""
    lock, link = lock_of(checkpoint), checkpoint.parent
    if link.parent.name == "checkpoints":
        return f"it is of the link '{link.name}', which may change shapes; give the artifact directory of its run"
    if not said.startswith("artifact="):
        apart = "give it where its run left it, beside recipe.lock.yaml, or the artifact directory of that run"
        return apart if lock is None else "its run had other data; give a model of the same kind"
    adapted = [name.removesuffix(".lora_A") for name in weights if name.endswith(".lora_A")]
    if any(f"{layer}.weight" not in weights for layer in adapted):
        return "it has adapters without the compressed layers beside which they trained; give the artifact of its run"
    keys = "model=CHOICE, its model.* settings"
    if any(".lora_" in name for name in weights):
        keys += ", adapter=CHOICE, its adapter.* settings"
    if lock is not None:
        return f"leave out {keys} and data.sequence_length, to have those of its run"
    return f"give {keys} and data.sequence_length of the run that wrote it"


def stage_input(config: RunConfig, directory: Path, data: DataBundle, line: Sequence[Stage], stage: Stage) -> nn.Module:
    """The model as it enters `stage`: the base model, or the snapshot that the stage before left.

    Where nothing trains, its weights lie in files in the run's directory.
    """
    offload_to = None if trains(line) else directory
    if stage.index == 0:
        return base_model(config, data, offload_to)
    if stage.index == 1 and (directory / ADAPTED).is_dir():
        return store.load(directory / ADAPTED, trainable=True)
    return store.load(directory / "stages" / line[stage.index - 1].directory, trainable=True, offload_to=offload_to)


def trains(line: Sequence[Stage]) -> bool:
    """Whether any stage has a fit: weights that are written at every step belong in memory."""
    return any(stage.fit is not None for stage in line)


def prepared(
    config: RunConfig, directory: Path, data: DataBundle, tokenizer: Any, line: Sequence[Stage], stage: Stage
) -> tuple[nn.Module, Context]:
    """The model as the fit of `stage` begins with it, and the method's context: what a rank rebuilds for itself."""
    model = stage_input(config, directory, data, line, stage)
    context = context_of(config, stage, model, data, tokenizer, directory)
    if stage.method:
        model = stage.method.prepare(stage.method.entering(model), context)
        context = replace(context, architecture=describe(model))
    return adapted(config, stage, model, context), context


def adapted(config: RunConfig, stage: Stage, model: nn.Module, context: Context) -> nn.Module:
    """What stage 0 trains: `model` with the adapters, beside layers that the first link holds compressed (QLoRA)."""
    if stage.kind != "train" or stage.fit is None or not config.adapter.trains:
        return model
    if (link := link_under_adapters(config)) is not None:
        name, method = link
        model = method.finalize(method.entering(model), replace(context, stage=name))
    return config.adapter.attach(model, context.architecture, context.seed)


def link_under_adapters(config: RunConfig) -> tuple[str, Method] | None:
    """The first link where adapters train beside what it compressed; None where they train beside float weights."""
    link = next(iter(config.chain.items()), None)
    return link if link is not None and config.adapter.trains and link[1].holds_adapters else None


def beside_compressed(config: RunConfig, stage: Stage) -> bool:
    """Whether `stage` trains adapters beside what the first link holds compressed."""
    return stage.kind == "train" and stage.fit is not None and link_under_adapters(config) is not None


def context_of(
    config: RunConfig,
    stage: Stage,
    model: nn.Module,
    data: DataBundle | None = None,
    tokenizer: Any = None,
    directory: Path | None = None,
    base: nn.Module | None = None,
) -> Context:
    """What the method of `stage` is given; without `data` and the run's `directory` (the preflight) nothing that must
    be computed, and of other models the shapes alone. There `base` is the model before all links, `model` otherwise."""
    base = model if base is None else base
    calibration = None
    if data is not None and stage.method is not None and stage.method.needs_calibration:
        calibration = functools.cache(
            functools.partial(calibration_batches, config.calibration, data, tokenizer, positions(model))
        )
    opened: Callable[[str], nn.Module] = functools.partial(open_guest, config, stage, base, directory is None)
    if directory is None:  # shapes are looked at more than once, and to open a model is to check its files
        opened = functools.cache(opened)
    return Context(
        stage=stage.name,
        architecture=describe(model),
        device=config.device.kind(),
        steps=stage.fit.steps if stage.fit else 0,
        seed=config.trainer.seed,
        calibration=calibration,
        teacher=teacher_of(config, stage, base, data, directory, opened),
        open_model=opened,
        first=stage.index == 1,
        kept=kept_before(config, stage),
    )


def kept_before(config: RunConfig, stage: Stage) -> Callable[[str], float]:
    """Of a layer's weights, the share that the links before `stage`, or the artifact they go on with, have kept."""
    links: list[Method] = []
    artifact = artifact_of(config)
    for method in itertools.takewhile(lambda method: method is not stage.method, config.chain.values()):
        links.append(method)
        if getattr(method, "student", None):  # another model
            links.clear()
            artifact = None
    counts = functools.cache(lambda: {} if artifact is None else store.kept_weights(artifact))

    def share(name: str) -> float:
        kept, elements = counts().get(f"{name}.weight", (1, 1))
        return min(kept_share(links, name), kept / elements)

    return share


def teacher_of(
    config: RunConfig,
    stage: Stage,
    model: nn.Module,
    data: DataBundle | None,
    directory: Path | None,
    shapes: Callable[[str], nn.Module],
) -> FrozenTeacher | None:
    """The teacher of a link that needs one; for the preflight (without `data` and `directory`) its `shapes`."""
    if stage.method is None or not stage.method.needs_teacher:
        return None
    other = guests(stage).get("teacher")
    if data is None or directory is None:
        return FrozenTeacher(lambda: shapes("teacher") if other else model)
    if other is None:
        first = directory / "stages" / FIRST
        return FrozenTeacher(lambda: frozen(store.load(first)), lambda: store.blueprint(first))
    alike = checkpoints.exists(Path(other)) and lock_of(Path(other)) is None
    like = base_model(config, data) if alike else model  # earlier links may have changed it
    return FrozenTeacher(
        lambda: frozen(open_guest(config, stage, like, False, "teacher")),
        lambda: open_guest(config, stage, like, True, "teacher"),
    )


def guests(stage: Stage) -> dict[str, str]:
    """What the link says for those of `GUESTS` that it has."""
    given = {key: getattr(stage.method, key, None) for key in GUESTS}
    return {key: value for key, value in given.items() if isinstance(value, str) and value != "self"}


def open_guest(config: RunConfig, stage: Stage, model: nn.Module, meta: bool, key: str) -> nn.Module:
    """The model that the link's setting `key` names; a checkpoint fills a model of the run that wrote it, or a copy of
    `model` where that left no lock. With `meta`, its shapes.

    Raises:
        ConfigError: it cannot be opened, or is not what it should be.
    """
    value = str(getattr(stage.method, key))
    path, said = Path(value), f"compression.{stage.name}.{key}={value}"
    if not checkpoints.exists(path):
        guest = open_directory(path, said, meta=meta, trainable=key != "teacher")
        return guest if meta or key == "teacher" else config.precision.convert(guest)
    lock, device = lock_of(path), "meta" if meta else "cpu"
    if lock is None:
        guest = copy.deepcopy(model).to(device)
        load_checkpoint(guest, path, said, device)
        return guest
    theirs = as_locked(config, lock)
    if theirs.data.task != config.data.task:
        mine, other = (task.replace("_", " ") for task in (config.data.task, theirs.data.task))
        raise ConfigError(f"{said} is of a run for {other}, this one is for {mine}; give a model of the same kind")
    spec = replace(spec_of(model), sequence_length=getattr(theirs.data, "sequence_length", None))
    # Opened in the middle of a fit, whose random numbers it must leave as they are.
    with torch.random.fork_rng([]), torch.device("meta") if meta else contextlib.nullcontext():
        return config.precision.convert(filled(theirs.model.build(spec), theirs, path, said))


def spec_of(model: nn.Module) -> DataSpec:
    """What the data of this run says to a model that is to be built, by the config of one that was."""
    said = {"vocabulary": "vocab_size", "classes": "num_labels", "channels": "num_channels", "image_size": "image_size"}
    return DataSpec(**{key: getattr(model.config, name, None) for key, name in said.items()})


def guest_problems(stage: Stage, context: Context, data: DataBundle, tokenizer: Any) -> list[str]:
    """Directories whose model knows other tokens than this run, or takes shorter sequences than its data has."""
    problems = []
    for key, value in guests(stage).items():
        directory, said = Path(value), f"compression.{stage.name}.{key}={value}"
        problems += vocabulary_problems(directory, said, tokenizer)
        length = data.spec.sequence_length
        if length is not None and context.open_model is not None:
            with contextlib.suppress(ConfigError):  # told by the method's own preflight
                limit = positions(context.open_model(key))
                if limit is not None and limit < length:
                    problems.append(f"{said} takes {limit} tokens, data.sequence_length={length}; give a longer one")
    return problems


def calibration_problems(config: RunConfig, model: nn.Module, data: DataBundle, tokenizer: Any) -> list[str]:
    """What keeps the calibration set from being drawn."""
    try:
        calibration_batches(config.calibration, data, tokenizer, positions(model))
    except ConfigError as error:
        return list(error.problems)
    return []
