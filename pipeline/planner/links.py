"""The links of a chain, and what they leave, before they run: traced on fake tensors (`fake_chain`), or as the methods
themselves declare it. Each link is given the model that the one before has left, and the last one's is evaluated."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from pipeline import stage_input
from pipeline.artifact import store
from pipeline.chain import Stage
from pipeline.compression.pruning import Pruner
from pipeline.data.base import DataBundle
from pipeline.data.calibration import calibration_batches
from pipeline.errors import first_line
from pipeline.models.architecture import positions
from pipeline.planner.evaluation import trace_evaluation, traced_evaluation
from pipeline.planner.fake_chain import Chain, Links, as_loaded, give_masks, twin
from pipeline.planner.fakes import as_opened, faked, kernels_of, put_into_files
from pipeline.planner.generation import generates, trace_generation, traced_generation
from pipeline.planner.gpu import as_on_device
from pipeline.planner.live import Peak
from pipeline.planner.supposed import Supposing
from pipeline.planner.trained import adapted
from pipeline.planner.transfers import opens_in_memory, reading, stored_bytes
from pipeline.planner.unreal import unreal
from pipeline.planner.workspaces import WITH_BIAS, WORKSPACES, workspace
from pipeline.schema import RunConfig
from pipeline.tasks import lookup
from pipeline.tasks.base import Task
from pipeline.tasks.causal_lm import PROMPT_TOKENS
from pipeline.teacher import frozen
from pipeline.walk import changing_stages, stages_of


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
    with unreal(config):
        chain = Chain(config, data, tokenizer)
        try:
            model = chain.entering(line[0])
            chain.saved(found, line[0], model, task)
            if stage_input.beside_compressed(config, line[0]) and config.device.kind() == "cpu":  # else on its host
                # Beside what was trained, the dense model that it stands for.
                chain.saved(found, line[0], faked(stage_input.shapes(config, data), chain.dtype), task)
            for stage in line[1:]:
                model = chain.linked(found, stage, model, untraced)
                chain.saved(found, stage, model, task)
                del left[0]
            found.load = reading(config, model) if opens_in_memory(config) else None
            found.stored = stored_bytes(config, model)
            loaded = as_loaded(model)
            found.left = faked(copy.deepcopy(loaded), device="meta")
            if not chain.trains:  # what lay in files is read, but by an evaluation on a CPU
                faked(loaded)
            if "generate" in left:
                found.generate = traced_generation(config, loaded, task, PROMPT_TOKENS, chain.counting)
                as_opened(loaded)
                del left[0]
            if not opens_in_memory(config):
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
    with unreal(config):
        return traced_generation(config, frozen(faked(model)), task, prompt, lambda: Supposing(*kernels_of(config)))


def declare_links(config: RunConfig, data: DataBundle, tokenizer: Any) -> Links:
    """The same by formula, for a model of any size: what the methods themselves say that `prepare` and `finalize` hold,
    where they know, the fits of those that have the task's loss, and what the chain leaves, where no values decide what
    that is. It takes a second or two for 8B weights."""
    with as_on_device(config):
        return declared_links(config, data, tokenizer)


def declared_links(config: RunConfig, data: DataBundle, tokenizer: Any) -> Links:
    """To be called within `as_on_device`."""
    found = Links()
    first, *links = changing_stages(stages_of(config))
    model: nn.Module | None = stage_input.shapes(config, data)
    assert model is not None
    if stage_input.beside_compressed(config, first):
        model = adapted(config, first, model)
    else:
        model.to(config.precision.weight_dtype)
    task = lookup.get(config.data.task)
    chain = Chain(config, data, tokenizer)

    def saved(stage: Stage, model: nn.Module) -> None:
        with unreal(config):
            chain.saved(found, stage, faked(twin(model)), task)

    saved(first, model)
    if stage_input.beside_compressed(config, first) and config.device.kind() == "cpu":  # else on its host
        dense = stage_input.shapes(config, data).to(config.precision.weight_dtype)  # that it stands for
        saved(first, dense)
    for stage in links:
        assert stage.method is not None
        method = stage.method
        model = method.entering(model)
        context = stage_input.context_of(config, stage, model)
        if method.needs_calibration:
            batches = calibration_batches(config.calibration, data, tokenizer, positions(model))
            on_meta = [{name: tensor.to("meta") for name, tensor in batch.items()} for batch in batches]
            context = replace(context, calibration=functools.partial(list, on_meta))
        terms = method.memory(model, context)
        if terms is None:
            found.open[f"compress: {stage.name}"] = f"no formula is known for {method.name} of this model"
        else:
            if taken := workspace(config):
                terms = {**terms, WORKSPACES: taken + sum(WITH_BIAS)}
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
            chain.declared(found, stage, trained)
        model = method.left(model, context)
        if model is None:
            why = f"what {stage.name} leaves is known by its values alone"
            found.open |= dict.fromkeys(("save", *after(config)), why)
            return found
        saved(stage, model)
    try:
        declare_left(config, data, chain, found, model)
    except Exception as error:  # whatever torch makes of tensors without values
        found.open |= dict.fromkeys(after(config), f"cannot be computed: {first_line(error)}")
    return found


def after(config: RunConfig) -> list[str]:
    """The phases of what a chain leaves."""
    return ["generate", "evaluate"] if generates(config, lookup.get(config.data.task)) else ["evaluate"]


def declare_left(config: RunConfig, data: DataBundle, chain: Chain, found: Links, model: nn.Module) -> None:
    """Enter what opens, evaluates and generates with `model`, which a chain leaves, by formula."""
    task = lookup.get(config.data.task)
    if opens_in_memory(config):
        found.load = reading(config, model)
    with unreal(config):
        found.stored = stored_bytes(config, faked(twin(model)))
    found.left = as_loaded(model)
    if generates(config, task):
        with unreal(config), unset_fake_temporarily():  # for the kernels of quantized layers
            found.generate = trace_generation(config, twin(found.left), task)
    found.evaluate = evaluate_left(config, data, found.left)


def evaluate_left(config: RunConfig, data: DataBundle, left: nn.Module) -> Peak:
    """The evaluation of what a chain leaves, of the meta device, in the batches of `config`."""
    in_files = not opens_in_memory(config)
    with unreal(config), unset_fake_temporarily():  # for the kernels of quantized layers
        return trace_evaluation(config, twin(left), lookup.get(config.data.task), data, in_files=in_files)
