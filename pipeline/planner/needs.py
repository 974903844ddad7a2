"""What a config would need, phase by phase, asked of many configs that are much alike: each figure is found once.

By the formula, or traced. A peak is that of the worst phase of the run on one device: training, links that compress,
evaluation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from pipeline.data.base import DataBundle
from pipeline.data.loader import training_batch
from pipeline.device.cpu import CPU
from pipeline.fitting import micro_batch_size
from pipeline.layers.footprint import file_bytes, model_tensors
from pipeline.models.architecture import describe
from pipeline.planner import formula, search
from pipeline.planner.generation import generates
from pipeline.planner.links import evaluate_left, trace_links
from pipeline.planner.live import Peak
from pipeline.planner.plan import (
    Level,
    Phase,
    Plan,
    beside_fit,
    convolutional,
    known,
    plan_evaluation,
    plan_generation,
    plan_links,
    plan_opening,
    plan_saving,
    untraceable,
    validates,
    validation,
)
from pipeline.planner.search import Worst
from pipeline.planner.trained import adapted
from pipeline.planner.training import trace_training, with_fewer_parts
from pipeline.schema import RunConfig
from pipeline.stage_input import beside_compressed, link_under_adapters, shapes
from pipeline.tasks import lookup
from pipeline.walk import stages_of


class Needs:
    """Peaks and bytes on disk of configs whose task, tokenizer and bound of inference are those of `config`."""

    def __init__(self, config: RunConfig) -> None:
        self.task = lookup.get(config.data.task)
        self.tokenizer = config.model.tokenizer()
        self._inference = config.fit.inference
        self._opened: dict[Any, DataBundle] = {}
        self._others: dict[Any, dict[str, Phase]] = {}
        self._unevaluated: dict[Any, Plan] = {}
        self._linked: dict[Any, tuple[Plan, nn.Module | None]] = {}
        self._computed: dict[Any, Peak] = {}
        self._convolutional: dict[Any, bool] = {}
        self._open: dict[Any, dict[str, str]] = {}
        self._stored: dict[Any, int | None] = {}

    def data(self, config: RunConfig) -> DataBundle:
        if config.data not in self._opened:
            self._opened[config.data] = config.data.open(self.tokenizer)
        return self._opened[config.data]

    def fitted(self, config: RunConfig, traced: bool) -> Peak:
        """The peak of stage 0's fit, traced or by the formula; each is found once."""
        data, stage = self.data(config), stages_of(config)[0]
        config = with_fewer_parts(config)
        if not beside_compressed(config, stage):  # links come after it
            config = replace(config, chain={})
        key = (traced, micro_batch_size(config), repr(without_micro(config)))
        if key not in self._computed:
            model = adapted(config, stage, shapes(config, data))
            batch = training_batch(data.train, micro_batch_size(config)[0])
            predict = trace_training if traced else formula.training
            self._computed[key] = predict(config, stage, model, self.task, describe(model), batch)
        return self._computed[key]

    def lower(self, config: RunConfig) -> Peak:
        """The peak of stage 0's fit by the formula, or at least: it is the largest of what several moments hold, each
        linear in the micro batch, so that it lies on the line through two micro batches, or above, beyond them. Not
        through the largest: that one makes a step alone, and no gradients are added up meanwhile. Compiled blocks are
        taken for plain ones: to compile them takes seconds."""
        if config.trainer.compile:
            plain = replace(config, trainer=replace(config.trainer, compile=False))
            return replace(self.lower(plain), plain="of many candidates")
        sizes = sorted({micro_batch_size(config)[0], *search.micro_batches(config)})
        if len(sizes) <= 4 or micro_batch_size(config)[0] in (sizes[0], *sizes[-3:]):
            return self.fitted(config, False)
        least, other, most = (self.fitted(with_micro(config, size), False) for size in (sizes[0], *sizes[-3:-1]))
        slope = (most.bytes - other.bytes) / (sizes[-2] - sizes[-3])
        line = most.bytes - slope * (sizes[-2] - micro_batch_size(config)[0])
        return replace(most, bytes=int(line)) if line > least.bytes else least

    def phases(self, config: RunConfig, traced: bool) -> dict[str, Phase]:
        """Every phase of the run that can be predicted; it generates nothing itself."""
        found = {name: phase for name, phase in self.others(config, traced).items() if name != "generate"}
        for name, phase in self.training(config, traced).items():
            found[name] = max(phase, found.get(name, phase), key=lambda one: one.bytes)
        return found

    def training(self, config: RunConfig, traced: bool) -> dict[str, Phase]:
        """Stage 0's fit, the evaluation in its middle, and its checkpoint where ranks put that together; where stage 0
        does not train, the links' own fits."""
        if stages_of(config)[0].fit is None:
            others = self.others(config, traced)
            return {name: phase for name, phase in others.items() if name.startswith("train")}
        tracing = traced and untraceable(config) is None
        peak = self.fitted(config, tracing) if traced else self.lower(config)
        source = "traced" if tracing else "computed"
        found = {"train": known(config, "train", peak, source, self.convolutional(config))}
        if (beside := self.validation(config, source)) is not None:
            found["validate"] = beside_fit(config, beside, peak)
        if peak.saving is not None:
            writing = Peak(sum(peak.saving.values()), peak.saving, "")
            found["save"] = known(config, "save", writing, source, self.convolutional(config))
        return found

    def worst(self, config: RunConfig, traced: bool) -> Worst:
        """The phase of the run that needs most."""
        return max(self.phases(config, traced).items(), key=lambda phase: phase[1].most)

    def others(self, config: RunConfig, traced: bool = True) -> dict[str, Phase]:
        """Every phase but stage 0's fit. Fits of links depend on what saves memory: they are left out unless traced, or
        where stage 0 has no fit that tells how much that is. Generation is one where its bytes are bound."""
        # A candidate, as it runs, asks for no bound.
        config = replace(config, fit=replace(config.fit, inference=self._inference))
        first, *links = stages_of(config)
        fits = (traced or first.fit is None) and any(link.fit is not None for link in links)
        levers = (traced, micro_batch_size(config), repr(without_micro(config))) if fits else None
        key = (*chained(config), config.trainer.evaluation_batch_size, levers)
        if key not in self._others:
            if config.chain:
                found = self.linked(config, (*chained(config), levers), "trace" if traced or not fits else "formula")
            else:
                found = self.unevaluated(config)
                plan_evaluation(config, self.task, self.data(config), found, "trace")
            self._others[key] = {
                name: phase for name, phase in found.phases.items() if fits or not name.startswith("train")
            }
            self._open[chained(config)] = found.open
        return self._others[key]

    def linked(self, config: RunConfig, key: Any, level: Level) -> Plan:
        """What a chain needs, found once, and the evaluation of what it leaves, in each batch that is asked for."""
        data = self.data(config)
        if key not in self._linked:
            found = Plan()
            plan_opening(config, data, found)
            left = plan_links(config, data, self.tokenizer, found, level)
            if "artifact" in found.disk:
                self._stored[chained(config)] = found.disk["artifact"]
            self._linked[key] = found, left
            return found
        once, left = self._linked[key]
        found = Plan(phases=dict(once.phases), open=dict(once.open))
        if "evaluate" in found.phases:
            assert left is not None
            peak, there = evaluate_left(config, data, left), found.phases["evaluate"]
            found.phases["evaluate"] = known(config, "evaluate", peak, there.source, self.convolutional(config))
        return found

    def unevaluated(self, config: RunConfig) -> Plan:
        """What a model that no link changes needs beside its fit, in whatever batches it is evaluated."""
        key = chained(config)
        if key not in self._unevaluated:
            found = self._unevaluated[key] = Plan()
            data = self.data(config)
            plan_opening(config, data, found)
            plan_saving(config, self.task, data, found, "trace")
            if generates(config, self.task):
                plan_generation(config, self.task, data, found, "trace")
        once = self._unevaluated[key]
        return Plan(phases=dict(once.phases), open=dict(once.open))

    def validation(self, config: RunConfig, source: str) -> Phase | None:
        """An evaluation in the middle of the fit, as `plan.validation` has it."""
        if not validates(config):
            return None
        batch = config.trainer.evaluation_batch_size
        ranks = (config.parallelism, config.optimizer, config.memory) if config.parallelism.distributed else ()
        beside = repr(link_under_adapters(config)), config.memory.loss_chunks, repr(ranks)
        key = ("validate", source, config.model, config.data, config.precision, config.adapter, *beside, batch)
        if key not in self._others:
            self._others[key] = {"validate": validation(config, self.task, self.data(config), source)}
        return self._others[key]["validate"]

    def convolutional(self, config: RunConfig) -> bool:
        if config.model not in self._convolutional:
            self._convolutional[config.model] = convolutional(shapes(config, self.data(config)))
        return self._convolutional[config.model]

    def artifact_bytes(self, config: RunConfig) -> int | None:
        """Bytes of the artifact's weights; None where what a chain leaves cannot be traced."""
        key = chained(config)
        if not config.chain and key not in self._stored:
            model = config.precision.convert(shapes(config, self.data(config)))
            self._stored[key] = file_bytes(model_tensors(model, {}))
        if key not in self._stored:
            self.others(config, traced=False)
        if key not in self._stored:  # of another device no links are planned, but a file is as large
            here = replace(config, device=CPU(name="cpu", memory=None))
            self._stored[key] = trace_links(here, self.data(config), self.tokenizer).stored
        return self._stored[key]

    def unpredicted(self, config: RunConfig) -> dict[str, str]:
        """Phases that were asked for and are not predicted, and why."""
        return self._open.get(chained(config), {})


def chained(config: RunConfig) -> tuple[Any, ...]:
    """What decides what the links of a chain hold and leave."""
    under = link_under_adapters(config)
    return (config.model, config.data, config.precision, repr(config.chain), under and config.adapter)


def without_micro(config: RunConfig) -> RunConfig:
    """For comparing what computes the same."""
    trainer = replace(config.trainer, micro_batch_size=None, evaluation_batch_size=1)
    return replace(config, choices={}, overrides=(), trainer=trainer)


def with_micro(config: RunConfig, size: int) -> RunConfig:
    return replace(config, trainer=replace(config.trainer, micro_batch_size=size))
