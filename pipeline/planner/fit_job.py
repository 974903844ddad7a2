"""`job=fit`: the search on the real config, and what it chose.

    budget -> what fit.maximize makes of the config -> variants, without those that cannot fit
    -> a step time for every candidate -> peaks in that order: by the formula, the best ten traced -> the fastest timed

A peak is that of the worst phase of the run on one device: training, links that compress, evaluation. Seconds are
predicted from operators (`speed`); where the device is here and steps are quick, the fastest are timed as well.
"""

from __future__ import annotations

import re
import shlex
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.data.base import DataBundle
from pipeline.data.loader import evaluation_loader
from pipeline.device.cpu import CPU
from pipeline.errors import ConfigError
from pipeline.fitting import micro_batch_size
from pipeline.layers.footprint import file_bytes, model_tensors
from pipeline.models.architecture import describe
from pipeline.planner import formula, search, speed
from pipeline.planner.generation import generates
from pipeline.planner.links import trace_links
from pipeline.planner.live import Peak
from pipeline.planner.plan import (
    MARGINS,
    Phase,
    Plan,
    adapted,
    beside_fit,
    capacity,
    convolutional,
    known,
    plan_evaluation,
    plan_generation,
    plan_links,
    untraceable,
    validation,
)
from pipeline.planner.search import Candidate, Looked, Rated, Worst
from pipeline.planner.training import trace_training, with_fewer_parts
from pipeline.recipes import lock_text
from pipeline.report.console import console, mode
from pipeline.report.fit_table import fit_table
from pipeline.report.plots import Point, memory_against_speed
from pipeline.report.progress import Progress
from pipeline.report.result import write_text
from pipeline.report.units import format_bytes, format_seconds
from pipeline.schema import RunConfig, values_of
from pipeline.sizes import parse_size
from pipeline.stage_input import shapes
from pipeline.tasks import lookup
from pipeline.walk import Run, changing_stages, preflight, stages_of

RECIPE = "fit.recipe.yaml"
TIMED_SECONDS = 60.0
"""Timing takes no longer than this, by prediction."""
ROUNDS = 2
"""Candidates are timed in turns, so that what else the machine does hits all alike."""
LABELLED = 6
"""Points of the plot that are named."""
WORTH = 0.02
"""The share of a peak that a lever must save to be searched."""
LONGEST, MOST_GROUPS = 1 << 17, 512
"""Where `fit.maximize` ends: tokens of a sequence, groups of attention heads."""


@dataclass(frozen=True)
class Chosen:
    """What the search found: those that fit, best first; all that it looked at; and what is typed to run the best."""

    budget: int
    ranked: list[Rated]
    looked: Looked
    searched: int
    rates: speed.Rates
    scale: float
    """Measured over predicted seconds; 1 where nothing was timed."""
    overrides: list[str]
    open: dict[str, str]
    """Phases of the best that are not predicted, and why."""

    @property
    def best(self) -> Rated:
        return self.ranked[0]

    def seconds(self, one: Rated) -> float:
        """A step's, as measured, else as predicted and scaled."""
        return one.measured if one.measured is not None else one.seconds * self.scale

    def points(self) -> list[Rated]:
        """All that was looked at, each once: timed or traced where it was."""
        closely = {id(one.candidate): one for one in [*self.looked.traced, *self.ranked]}
        rest = [one for one in self.looked.computed if id(one.candidate) not in closely]
        return [*closely.values(), *rest]

    def said(self) -> str:
        """In one line what was chosen, and from what."""
        best = self.best
        seconds = "timed" if best.measured is not None else f"predicted, rates {self.rates.source}"
        return (
            f"Of {self.searched} candidates the fastest that fits in {format_bytes(self.budget)}: "
            f"{format_bytes(best.phase.bytes)} to {best.name}, {format_seconds(self.seconds(best))} a step ({seconds}):"
        )

    def command(self) -> str:
        return shlex.join(["python", "run.py", *self.overrides])

    def record(self) -> dict[str, Any]:
        """`fit` of result.json."""
        return {
            "budget": self.budget,
            "searched": self.searched,
            "traced": len(self.looked.traced),
            "rates": self.rates.source,
            "command": self.command(),
            "ranking": [
                {
                    "changes": list(one.candidate.changes),
                    "bytes": one.phase.bytes,
                    "phase": one.name,
                    "source": one.phase.source,
                    "seconds_predicted": one.seconds * self.scale,
                    "seconds_measured": one.measured,
                }
                for one in self.ranked
            ],
        }

    def recipe(self) -> str:
        """The best as a recipe that says everything."""
        config = self.best.candidate.config
        said = " ".join(self.best.candidate.changes) or "nothing to change"
        return f"# Chosen by job=fit for {format_bytes(self.budget)}: {said}\n" + lock_text(
            values_of(config), config.choices, None
        )


class Search:
    """One search: the typed config, its data, and what candidates share."""

    def __init__(self, config: RunConfig, run_dir: Path, result: dict[str, Any], progress: Progress) -> None:
        self.typed, self.progress = config, progress
        self.directory, self.result = run_dir, result
        self.task = lookup.get(config.data.task)
        self.tokenizer = config.model.tokenizer()
        self.budget = budget_of(config)
        self.artifact = None if config.fit.artifact is None else parse_size(config.fit.artifact)
        self.inference = None if config.fit.inference is None else parse_size(config.fit.inference)
        self._opened: dict[Any, DataBundle] = {}
        self._others: dict[Any, dict[str, Phase]] = {}
        self._computed: dict[Any, Peak] = {}
        self._books: dict[Any, speed.Workbook] = {}
        self._convolutional: dict[Any, bool] = {}
        self._open: dict[Any, dict[str, str]] = {}
        self._stored: dict[Any, int | None] = {}
        self._useless: dict[Any, set[tuple[str, Any]]] = {}

    def run(self) -> Chosen:
        """Raises ConfigError where nothing fits: the nearest miss, and what is in the way."""
        base = Candidate(search.plain(self.typed))
        require_shapes(base.config, self.data(base.config))
        self.preflight(base.config)
        self.require_room(base.config)
        base = self.maximized(base)
        with self.progress.phase("searching"):
            candidates, rates = self.candidates(base)
        looked = self.look(candidates)
        ranked = looked.fitting(self.budget)
        if not ranked:
            raise ConfigError(self.miss(looked))
        ranked, scale = self.timed(ranked)
        overrides = search.command(self.typed.overrides, ranked[0].candidate.changes)
        best = ranked[0].candidate.config
        unknown = self._open.get((best.model, best.data, best.precision, repr(best.chain)), {})
        return Chosen(self.budget, ranked, looked, len(candidates), rates, scale, overrides, unknown)

    def data(self, config: RunConfig) -> DataBundle:
        if config.data not in self._opened:
            self._opened[config.data] = config.data.open(self.tokenizer)
        return self._opened[config.data]

    def preflight(self, config: RunConfig) -> None:
        """Raises ConfigError for what only shapes tell, as the run itself would."""
        run = Run(config, self.directory, self.task, self.data(config), self.tokenizer, [], self.progress, self.result)
        preflight(run, changing_stages(stages_of(config)))

    def require_room(self, config: RunConfig) -> None:
        """Raises ConfigError where the budget is below the weights alone, whatever else is done."""
        least = min(
            self.weights(one.config) for one in search.variants(replace(config, fit=self.typed.fit), self.artifact)
        )
        if least > self.budget:
            raise ConfigError(
                f"{self.said()} is below the weights alone, {format_bytes(least)}; give more, "
                f"{'' if 'precision' in self.typed.fit.free else 'fit.free=[precision], '}or a smaller model"
            )

    def weights(self, config: RunConfig) -> int:
        """Bytes of the weights that one device holds."""
        model = config.precision.convert(shapes(config, self.data(config)))
        parts = config.parallelism.ranks if config.parallelism.sharded else 1
        return sum(weight.nbytes for weight in model.parameters()) // parts

    def said(self) -> str:
        """The budget as it was typed."""
        if self.typed.budget is not None:
            return f"budget={self.typed.budget}"
        given = self.typed.device.memory
        return f"budget={self.budget} (of this device)" if given is None else f"device.memory={given}"

    def maximized(self, base: Candidate) -> Candidate:
        """`base` with the longest sequences, or the largest model, of which some candidate fits by the formula."""
        wanted = self.typed.fit.maximize
        if wanted not in ("sequence", "parameters"):
            return base
        grow: Callable[[int], Candidate | None] = partial(search.grown, base)
        limit = MOST_GROUPS
        if wanted == "sequence":
            if getattr(base.config.data, "sequence_length", None) is None:
                raise ConfigError(f"fit.maximize=sequence: data={base.config.choices['data']} has no sequences")
            grow, limit = lambda units: base.with_values("data", sequence_length=64 * units), LONGEST // 64
        elif grow(1) is None:
            told = (
                f"fit.maximize=parameters: model={base.config.choices['model']} has no layers, heads and width to grow"
            )
            raise ConfigError(f"{told}; choose model=gpt or model=llama")

        def fits(units: int) -> bool:
            grown = grow(units)
            if grown is None or not search.valid(grown):
                return False
            try:
                return self.computed(self.leanest(self.evaluated(grown)))[1].most <= self.budget
            except ConfigError:  # more tokens than the model has positions, or the data has
                return False

        with self.progress.phase(f"maximizing {wanted}"):
            units = search.largest(fits, limit)
        found = grow(units) if units else None
        return base if found is None else found

    def variants(self, base: Candidate) -> list[Candidate]:
        """Variants that pass the preflight, keep the bounds of what comes out, and can fit at all."""
        asked = replace(base.config, fit=self.typed.fit)
        found: list[Candidate] = []
        stored: list[tuple[int, int, Candidate]] = []
        told: list[str] = []
        for one in search.variants(asked, self.artifact):
            one = Candidate(one.config, (*base.changes, *one.changes))
            try:
                if one.changes:
                    self.preflight(one.config)
                one = self.evaluated(one)
            except ConfigError as error:
                told += error.problems
                continue
            size = 0 if self.artifact is None else self.artifact_bytes(one.config)
            if size is None:
                told.append(f"fit.artifact={self.typed.fit.artifact}: what {label(one)} leaves cannot be traced")
            elif self.artifact is None or size <= self.artifact:
                found.append(one)
            else:
                stored.append((size, len(stored), one))
        if not found and not stored:
            raise ConfigError(told)
        if not found:
            size, _, least = min(stored)
            what = " ".join(least.changes) or "the config as typed"
            raise ConfigError(
                f"fit.artifact={self.typed.fit.artifact}: the smallest, {what}, takes {format_bytes(size)}; "
                f"{'give more' if 'compression' in self.typed.fit.free else 'give more, or fit.free=[compression]'}"
            )
        return found

    def evaluated(self, one: Candidate) -> Candidate:
        """With the largest evaluation batch, halved from the one that was typed, that keeps budget and bound.

        Raises:
            ConfigError: evaluation keeps the bound of `fit.inference` with no batch, or generation does not.
        """
        size = one.config.trainer.evaluation_batch_size
        fixed = search.typed(self.typed, "trainer.evaluation_batch_size")
        while True:
            tried = one.with_values("trainer", evaluation_batch_size=size)
            others = self.others(tried.config, traced=False)
            used = [(others[name].most, name) for name in ("evaluate", "generate") if name in others]
            most, phase = max(used, default=(0, ""))
            bounded = self.inference is None or most <= self.inference
            lean = self.phases(self.leanest(tried).config, traced=False)
            if bounded and all(lean[name].most <= self.budget for name in ("evaluate", "validate") if name in lean):
                return tried
            if size == 1 or fixed:
                break
            size //= 2
        if not bounded:
            takes = format_bytes(others[phase].bytes)
            what = f"evaluation takes {takes} of {size} at once"
            if phase == "generate":
                what = f"generation of {tried.config.generate.max_new_tokens} tokens takes {takes}"
            raise ConfigError(f"fit.inference={self.typed.fit.inference}: {what}")
        return tried

    def candidates(self, base: Candidate) -> tuple[list[tuple[Candidate, float]], speed.Rates]:
        """Every candidate with its predicted seconds, in order of preference; and the rates that these are from."""
        variants = self.variants(base)
        config = base.config
        here = config.device.memory is None and not config.device.problems(config.parallelism.devices)
        listed: list[tuple[Candidate, speed.Work | None]] = []
        hopeless: list[Rated] = []
        for variant in variants:
            stage = stages_of(variant.config)[0]
            if stage.fit is None:
                listed.append((variant, None))
                continue
            every = self.levers(variant)
            lean = self.rated(leanest(every), traced=False)
            if len(variants) > 1 and lean.phase.bytes * (1 - MARGINS["computed"]) > self.budget:
                hopeless.append(lean)
                continue
            every = self.worthwhile(variant, every)
            work = self.book(variant.config).work(variant.config, stage)
            listed += [(one, work) for one in every]
        if not listed:
            raise ConfigError(
                self.miss(Looked([], [self.rated(Looked(hopeless, []).nearest().candidate, traced=True)]))
            )
        dtypes = {dtype for work in {id(work): work for _, work in listed}.values() if work for dtype in work.dtypes()}
        rates = speed.rates_of(config.device.kind(), dtypes, here)
        found = [(one, 0.0 if work is None else self.seconds(one, work, rates)) for one, work in listed]
        largest_first = self.typed.fit.maximize == "micro_batch"
        found.sort(
            key=lambda pair: (
                -micro_batch_size(pair[0].config)[0] if largest_first else 0, pair[1], -self.kept(pair[0].config),
                len(pair[0].changes),
            )
        )  # fmt: skip
        return found, rates

    def worthwhile(self, variant: Candidate, every: list[Candidate]) -> list[Candidate]:
        """Without levers that save next to nothing, be it beside blocks that are kept or blocks computed twice."""
        memory = variant.config.memory
        key = (variant.config.model, variant.config.data)
        if key not in self._useless:
            modes = {one.config.memory.activation_checkpointing for one in every} & {"none", "full"}
            settings = [("loss_chunks", chunks) for chunks in search.CHUNKS] + [("release_gradients", True)]
            self._useless[key] = {
                (name, value)
                for name, value in settings
                if any(getattr(one.config.memory, name) == value for one in every)
                and not any(self.saves(variant, mode, name, value) for mode in modes)
            }
        useless = {(name, value) for name, value in self._useless[key] if getattr(memory, name) != value}
        return [one for one in every if not any(getattr(one.config.memory, name) == value for name, value in useless)]

    def saves(self, variant: Candidate, mode: str, name: str, value: Any) -> bool:
        without = variant.with_values("memory", activation_checkpointing=mode)
        peaks = [self.known(one.config, False).bytes for one in (
            without, without.with_values("memory", **{name: value})
        )]  # fmt: skip
        return peaks[1] < (1 - WORTH) * peaks[0]

    def kept(self, config: RunConfig) -> int:
        """Where compression is searched, bytes of the artifact: the more of them, the less is lost."""
        return (self.artifact_bytes(config) or 0) if "compression" in self.typed.fit.free else 0

    def seconds(self, one: Candidate, work: speed.Work, rates: speed.Rates) -> float:
        moved = 0
        if one.config.memory.activation_offload != "none":
            kept = replace(one.config, memory=replace(one.config.memory, activation_offload="none"))
            moved = self.known(kept, False).kinds.get("activations", 0)
        return speed.step_seconds(one.config, work, rates, moved)

    def book(self, config: RunConfig) -> speed.Workbook:
        """Of the candidates with this model and data."""
        key = (config.model, config.data)
        if key not in self._books:
            data = self.data(config)
            sample = next(iter(evaluation_loader(data.train, 1)))
            self._books[key] = speed.Workbook(lambda: shapes(config, data), self.task, sample)
        return self._books[key]

    def levers(self, base: Candidate) -> list[Candidate]:
        """`base` with everything that leaves its results as they are."""
        model = shapes(base.config, self.data(base.config))
        batch_norm = any(isinstance(module, _BatchNorm) for module in model.modules())
        return list(search.levers(base, self.typed.fit.free, bool(describe(model).blocks), batch_norm))

    def leanest(self, base: Candidate) -> Candidate:
        return leanest(self.levers(base))

    def computed(self, one: Candidate) -> Worst:
        return self.worst(one.config, traced=False)

    def traced(self, one: Candidate) -> Worst:
        return self.worst(one.config, traced=True)

    def worst(self, config: RunConfig, traced: bool) -> Worst:
        """The phase of the run that needs most."""
        return max(self.phases(config, traced).items(), key=lambda phase: phase[1].most)

    def phases(self, config: RunConfig, traced: bool) -> dict[str, Phase]:
        """Every phase of the run that can be predicted."""
        found = dict(self.others(config, traced))
        if stages_of(config)[0].fit is not None:
            traced = traced and untraceable(config) is None
            peak, source = (self.known(config, True), "traced") if traced else (self.lower(config), "computed")
            found["train"] = known(config, "train", peak, source, self.convolutional(config))
            if (beside := self.validation(config)) is not None:
                found["validate"] = beside_fit(config, beside, peak)
        return found

    def validation(self, config: RunConfig) -> Phase | None:
        """An evaluation in the middle of the fit, without what the fit keeps meanwhile."""
        if not config.trainer.evaluate_every:
            return None
        key = ("validate", config.model, config.data, config.precision, config.adapter, evaluation_batch(config))
        if key not in self._others:
            bare = validation(config, self.task, self.data(config))
            self._others[key] = {} if bare is None else {"validate": bare}
        return self._others[key].get("validate")

    def convolutional(self, config: RunConfig) -> bool:
        if config.model not in self._convolutional:
            self._convolutional[config.model] = convolutional(shapes(config, self.data(config)))
        return self._convolutional[config.model]

    def lower(self, config: RunConfig) -> Peak:
        """The peak of stage 0's fit by the formula, or at least: it is the largest of what several moments hold, each
        linear in the micro batch, so that it lies on the line through two micro batches, or above, beyond them."""
        sizes = sorted({micro_batch_size(config)[0], *search.micro_batches(config)})
        if len(sizes) <= 3 or micro_batch_size(config)[0] in (sizes[0], *sizes[-2:]):
            return self.known(config, False)
        least, other, most = (self.known(with_micro(config, size), False) for size in (sizes[0], *sizes[-2:]))
        slope = (most.bytes - other.bytes) / (sizes[-1] - sizes[-2])
        line = most.bytes - slope * (sizes[-1] - micro_batch_size(config)[0])
        return replace(most, bytes=int(line)) if line > least.bytes else least

    def known(self, config: RunConfig, traced: bool) -> Peak:
        """The peak of stage 0's fit, traced or by the formula; each is found once."""
        data, stage = self.data(config), stages_of(config)[0]
        config = with_fewer_parts(config)
        key = (traced, micro_batch_size(config), repr(without_micro(config)))
        if key not in self._computed:
            model = adapted(config, stage, shapes(config, data))
            batch = next(iter(evaluation_loader(data.train, micro_batch_size(config)[0])))
            known = trace_training if traced else formula.training
            self._computed[key] = known(config, stage, model, self.task, describe(model), batch)
        return self._computed[key]

    def others(self, config: RunConfig, traced: bool = True) -> dict[str, Phase]:
        """Every phase but stage 0's fit. Fits of links depend on what saves memory: they are left out unless traced."""
        fits = traced and any(method.trains for method in config.chain.values())
        levers = (config.memory, micro_batch_size(config)) if fits else None
        key = (config.model, config.data, config.precision, repr(config.chain), evaluation_batch(config), levers)
        if key not in self._others:
            found, data = Plan(), self.data(config)
            if config.chain:
                plan_links(config, data, self.tokenizer, found, "trace")
                if "artifact" in found.disk:
                    self._stored[config.model, config.data, config.precision, repr(config.chain)] = found.disk[
                        "artifact"
                    ]
            else:
                plan_evaluation(config, self.task, data, found, "trace")
                if generates(config, self.task):
                    plan_generation(config, self.task, data, found, "trace")
            self._others[key] = {
                name: phase for name, phase in found.phases.items() if fits or not name.startswith("train")
            }
            self._open[key[:4]] = found.open
        return self._others[key]

    def artifact_bytes(self, config: RunConfig) -> int | None:
        """Bytes of the artifact's weights; None where what a chain leaves cannot be traced."""
        if not config.chain:
            model = config.precision.convert(shapes(config, self.data(config)))
            return file_bytes(model_tensors(model, {}))
        key = (config.model, config.data, config.precision, repr(config.chain))
        self.others(config, traced=False)
        if key not in self._stored:  # of another device no links are planned, but a file is as large
            here = replace(config, device=CPU(name="cpu", memory=None))
            self._stored[key] = trace_links(here, self.data(config), self.tokenizer).stored
        return self._stored[key]

    def look(self, candidates: list[tuple[Candidate, float]]) -> Looked:
        """Peaks of candidates, with a line for each that is traced."""
        number = 0

        def trace(one: Candidate) -> Worst:
            nonlocal number
            number += 1
            with self.progress.phase(f"tracing {number}: {' '.join(one.changes) or 'as typed'}"):
                return self.traced(one)

        return search.closest(candidates, self.budget, self.computed, trace)

    def rated(self, one: Candidate, traced: bool) -> Rated:
        return Rated(one, 0.0, *self.worst(one.config, traced))

    def miss(self, looked: Looked) -> str:
        """Why nothing fits: the nearest miss, and what takes most of it."""
        one = looked.nearest()
        kind, held = search.term(one.phase)
        over = one.phase.most - self.budget
        what = " ".join(one.candidate.changes) or "the config as typed"
        return (
            f"{self.said()}: nothing fits. The nearest, {what}, needs {format_bytes(one.phase.bytes)} to {one.name}, "
            f"{format_bytes(over)} too much with its margin; in the way is {kind}, {format_bytes(held)}. "
            f"{way_out(kind, self.typed)}"
        )

    def timed(self, ranked: list[Rated]) -> tuple[list[Rated], float]:
        """Those that fit, the fastest of them timed and in that order; and measured over predicted seconds."""
        first = ranked[: self.typed.fit.measure]
        config = first[0].candidate.config if first else self.typed
        steps = ROUNDS * (speed.Clock.WARM_FROM + speed.STEPS)
        quick = sum(one.seconds for one in first) * steps <= TIMED_SECONDS
        here = config.device.memory is None and not config.device.problems(config.parallelism.devices)
        free = speed.free_memory(config.device.kind()) if here else 0
        first = [
            one
            for one in first
            if quick and one.seconds and not one.candidate.config.parallelism.distributed and one.phase.bytes <= free
        ]
        times: dict[int, list[float]] = {id(one): [] for one in first}
        for turn in range(ROUNDS if first else 0):
            with self.progress.phase(f"timing {len(first)} of them, round {turn + 1} of {ROUNDS}"):
                for one in first:
                    config = one.candidate.config
                    times[id(one)].append(speed.measured(config, self.data(config), self.task))
        found = [replace(one, measured=min(times[id(one)])) if one in first else one for one in ranked]
        ratios = [one.measured / one.seconds for one in found if one.measured is not None]
        if self.typed.fit.maximize != "micro_batch":
            found.sort(key=lambda one: (one.measured is None, one.measured or one.seconds))
        return found, statistics.median(ratios) if ratios else 1.0


def fit(config: RunConfig, run_dir: Path, result: dict[str, Any]) -> RunConfig:
    """Search, show what was found, leave the best as a recipe; returns its config, which runs as `job=run`.

    Raises:
        ConfigError: what keeps the typed config from running; or nothing fits.
    """
    with Progress({}, mode(console(), config.sweep)) as progress:
        chosen = Search(config, run_dir, result, progress).run()
    best = chosen.best
    result["fit"] = chosen.record()
    if best.name in result["memory"]["predicted"]:
        result["memory"]["predicted"][best.name] = best.phase.bytes
    write_text(run_dir / RECIPE, chosen.recipe())
    batch = config.trainer.batch_size
    memory_against_speed(
        [
            Point(label(one.candidate) if one in chosen.ranked[:LABELLED] else "",
                  one.phase.bytes, batch / chosen.seconds(one))
            for one in chosen.points() if one.seconds
        ],
        "samples/s", chosen.budget, run_dir / "pareto.png",
    )  # fmt: skip
    if not config.sweep:
        console().print(fit_table(result["fit"]["ranking"]))
        for phase, why in chosen.open.items():
            console().print(f"not predicted: {phase}: {why}", soft_wrap=True, markup=False)
        for line in (chosen.said(), f"  {chosen.command()}", f"  python run.py recipe={run_dir / RECIPE}"):
            console().print(line, soft_wrap=True, markup=False)
    return best.candidate.config


def label(candidate: Candidate) -> str:
    """Its changes, short: keys without their group."""
    return ", ".join(re.sub(r"^[\w.]*\.", "", change) for change in candidate.changes) or "as typed"


def budget_of(config: RunConfig) -> int:
    """Bytes: what was given, else what the device has."""
    found = capacity(config) if config.budget is None else parse_size(config.budget)
    if found is None:
        raise ConfigError(
            f"job=fit needs budget=SIZE (6GiB say) or device.memory=SIZE: device={config.choices['device']} does not "
            "tell how much memory it has"
        )
    return found


def require_shapes(config: RunConfig, data: DataBundle) -> nn.Module:
    """The model on the meta device. Raises ConfigError where it cannot be built there."""
    try:
        return shapes(config, data)
    except ConfigError:
        raise
    except Exception as error:  # whatever a model's own code raises
        told = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"model={config.choices['model']} cannot be built on the meta device, where its shapes are looked at: "
            f"{type(error).__name__}: {told}"
        ) from error


def without_micro(config: RunConfig) -> RunConfig:
    """For comparing what computes the same."""
    trainer = replace(config.trainer, micro_batch_size=None, evaluation_batch_size=1)
    return replace(config, choices={}, overrides=(), trainer=trainer)


def evaluation_batch(config: RunConfig) -> int:
    return config.trainer.evaluation_batch_size


def with_micro(config: RunConfig, size: int) -> RunConfig:
    return replace(config, trainer=replace(config.trainer, micro_batch_size=size))


def leanest(every: list[Candidate]) -> Candidate:
    """The one that holds least by what it saves, without looking at peaks."""

    def holds(one: Candidate) -> tuple[int, ...]:
        memory = one.config.memory
        return (
            micro_batch_size(one.config)[0],
            {"full": 0, "selective": 1, "none": 2}[memory.activation_checkpointing],
            memory.activation_offload == "none",
            memory.optimizer_offload == "none",
            not memory.step_in_backward,
            not memory.release_gradients,
            -memory.loss_chunks,
        )

    return min(every, key=holds)


def way_out(kind: str, config: RunConfig) -> str:
    """What makes room where `kind` is in the way."""
    named = {
        "weights": ("precision", "or a smaller model"),
        "gradients": ("adapter", "or a smaller model"),
        "optimizer state": ("optimizer", "or adapter"),
    }
    group, other = named.get(kind, ("memory", "or a shorter data.sequence_length"))
    if group in config.fit.free:
        return "Give more, or take a smaller model"
    return f"Give more, fit.free=[{group}] {other}"
