"""The search of `job=fit` on the real config.

    budget -> what fit.maximize makes of the config -> variants, without those that cannot fit
    -> a step time for every candidate -> peaks in that order: by the formula, the best ten traced -> the fastest timed

Seconds are predicted from operators (`speed`); where the device is here and steps are quick, the fastest are timed as
well.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.data.base import DataBundle
from pipeline.data.loader import evaluation_loader
from pipeline.errors import ConfigError
from pipeline.fitting import micro_batch_size
from pipeline.models.architecture import describe
from pipeline.parallelism.base import Parallelism
from pipeline.planner import search, speed, timing
from pipeline.planner.chosen import Chosen, label
from pipeline.planner.live import ACTIVATIONS, CAST_WEIGHTS, LOGITS_AND_LOSS, by_kind
from pipeline.planner.needs import Needs, with_micro
from pipeline.planner.plan import MARGINS, Phase, capacity, validates
from pipeline.planner.search import Candidate, Looked, Rated, Worst
from pipeline.planner.trained import adapted
from pipeline.planner.transfers import in_files
from pipeline.report.progress import Progress
from pipeline.report.units import format_bytes
from pipeline.schema import RunConfig
from pipeline.sizes import parse_size
from pipeline.stage_input import link_under_adapters, shapes
from pipeline.walk import changing_stages, preflight, stages_of

TIMED_SECONDS = 60.0
"""Timing takes no longer than this, by prediction."""
STARTING = 8.0
"""Seconds until ranks train that are started on one machine."""
ROUNDS = 2
"""Candidates are timed in turns, so that what else the machine does hits all alike."""
WORTH = 0.02
"""The share of a peak that a lever must save to be searched."""
SEQUENCES = 64
"""Tokens that `fit.maximize` makes sequences longer by."""
LONGEST, MOST_GROUPS = 1 << 17, 512
"""Where `fit.maximize` ends: tokens of a sequence, groups of attention heads."""


class BeyondInference(ConfigError):
    """What comes out needs more than `fit.inference`, and how much."""

    def __init__(self, told: str, needed: int) -> None:
        super().__init__(told)
        self.needed = needed


class Search:
    """One search: the typed config, and what candidates share."""

    def __init__(self, config: RunConfig, run_dir: Path, progress: Progress) -> None:
        self.typed, self.progress = config, progress
        self.directory = run_dir
        self.needs = Needs(config)
        self.budget = budget_of(config)
        self.artifact = None if config.fit.artifact is None else parse_size(config.fit.artifact)
        self.inference = None if config.fit.inference is None else parse_size(config.fit.inference)
        self._books: dict[Any, speed.Workbook] = {}
        self._useless: dict[Any, set[tuple[str, Any]]] = {}
        self._moved: dict[Any, int] = {}
        self._halved = 0
        """How often the evaluation batch of the last candidate was halved: others of the same model are much alike."""

    def run(self) -> Chosen:
        """Raises ConfigError where nothing fits: the nearest miss, and what is in the way."""
        base = Candidate(search.plain(self.typed))
        require_shapes(base.config, self.needs.data(base.config))
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
        changes = [*search.unasked(self.typed), *ranked[0].candidate.changes]
        overrides = search.command(self.typed.overrides, changes)
        unknown = self.needs.unpredicted(ranked[0].candidate.config)
        return Chosen(self.budget, ranked, looked, len(candidates), rates, scale, overrides, unknown)

    def preflight(self, config: RunConfig) -> None:
        """Raises ConfigError for what only shapes tell, as the run itself would."""
        stages = changing_stages(stages_of(config))
        preflight(config, self.needs.data(config), self.needs.tokenizer, self.directory, stages)

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
        """Bytes of the weights that one device holds: on a CPU none of those that lie in files; what adapters train
        beside may be compressed."""
        if in_files(config) and config.device.kind() != "cuda":
            return 0
        model = adapted(config, stages_of(config)[0], shapes(config, self.needs.data(config)))
        parts = config.parallelism.ranks if config.parallelism.sharded else 1
        return sum(weight.nbytes for weight in by_kind(model)["weights"]) // parts

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

        def grown(units: int) -> Candidate:
            if wanted == "sequence":
                return base.with_values("data", sequence_length=SEQUENCES * units)
            return search.grown(base, units)

        def fits(one: Candidate, traced: bool) -> bool:
            try:
                return search.valid(one) and self.lean(one, traced) <= self.budget and self.stored(one)
            except ConfigError:  # more tokens than the model has positions, or the data has
                return False

        with self.progress.phase(f"maximizing {wanted}"):
            unit, limit = (1, LONGEST // SEQUENCES) if wanted == "sequence" else (self.unit(grown), MOST_GROUPS)
            about = search.largest(lambda units: fits(grown(unit * units), traced=False), limit // unit)
            units = search.largest(lambda units: fits(grown(unit * units), traced=True), limit // unit, about)
            found = grown(unit * units) if units else base
            if wanted == "sequence" and length(found) < length(base) and fits(base, traced=True):
                return base  # which is no multiple of what sequences grow by
        return found

    def stored(self, one: Candidate) -> bool:
        """Whether `one` keeps the bound of `fit.artifact`, with some choice of the groups that are named free."""
        if self.artifact is None:
            return True
        for other in search.variants(replace(one.config, fit=self.typed.fit), self.artifact):
            try:
                size = self.needs.artifact_bytes(other.config)
            except ConfigError:  # a method that these shapes do not go with
                continue
            if size is None or size <= self.artifact:
                return True
        return False

    def unit(self, grown: Callable[[int], Candidate]) -> int:
        """The least number of groups of attention heads that passes the preflight: ranks may split them, or groups of
        weights have to divide them."""
        for groups in range(1, MOST_GROUPS):
            one = grown(groups)
            try:
                if search.valid(one):
                    self.preflight(one.config)
                    return groups
            except ConfigError:
                continue
        return MOST_GROUPS

    def lean(self, one: Candidate, traced: bool) -> int:
        """What it needs at least, with its margin. Raises ConfigError as `evaluated` does."""
        return self.needs.worst(self.leanest(self.evaluated(one)).config, traced)[1].most

    def variants(self, base: Candidate) -> list[Candidate]:
        """Variants that pass the preflight, keep the bounds of what comes out, and can fit at all."""
        asked = replace(base.config, fit=self.typed.fit)
        found: list[Candidate] = []
        stored: list[tuple[int, int, Candidate]] = []
        told: list[str] = []
        beyond: list[tuple[int, int, BeyondInference]] = []
        every = search.variants(asked, self.artifact)
        for number, one in enumerate(every):
            self.progress.far(f"evaluation with {number} of {len(every)} choices of what is free")
            one = Candidate(one.config, (*base.changes, *one.changes))
            try:
                if one.changes:
                    self.preflight(one.config)
                one = self.evaluated(one)
            except BeyondInference as error:
                beyond.append((error.needed, len(beyond), error))
                continue
            except ConfigError as error:
                told += error.problems
                continue
            size = 0 if self.artifact is None else self.needs.artifact_bytes(one.config)
            if size is None:
                told.append(f"fit.artifact={self.typed.fit.artifact}: what {label(one)} leaves cannot be traced")
            elif self.artifact is None or size <= self.artifact:
                found.append(one)
            else:
                stored.append((size, len(stored), one))
        if not found and not stored:
            raise min(beyond)[2] if beyond else ConfigError(told)
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
            BeyondInference: evaluation keeps the bound of `fit.inference` with no batch, or generation does not.
        """
        batch = one.config.trainer.evaluation_batch_size
        fixed = search.typed(self.typed, "trainer.evaluation_batch_size")
        sizes = [batch] if fixed else [batch >> halved for halved in range(batch.bit_length())]

        def tried(place: int) -> Candidate:
            return one.with_values("trainer", evaluation_batch_size=sizes[place])

        def within(phases: dict[str, Phase]) -> bool:
            return all(phases[name].most <= self.budget for name in ("evaluate", "validate") if name in phases)

        @cache
        def keeps(place: int) -> bool:
            found = tried(place)
            if self.beyond_inference(found) is not None or not within(self.needs.others(found.config, traced=False)):
                return False
            # What is evaluated beside the fit hangs on what that keeps, and what holds least takes several to find.
            if not validates(found.config) or within(self.needs.phases(found.config, traced=False)):
                return True
            return within(self.needs.phases(self.leanest(found).config, traced=False))

        place = min(self._halved, len(sizes) - 1)
        while place + 1 < len(sizes) and not keeps(place):
            place += 1
        while place and keeps(place - 1):
            place -= 1
        self._halved = place
        if (over := self.beyond_inference(tried(place))) is not None:
            what = f"{label(one)}: " if one.changes else ""
            raise BeyondInference(f"fit.inference={self.typed.fit.inference}: {what}{over[0]}", over[1])
        return tried(place)

    def beyond_inference(self, one: Candidate) -> tuple[str, int] | None:
        """What breaks the bound of `fit.inference`, if something does, and the bytes it takes."""
        if self.inference is None:
            return None
        trainer, tokens = one.config.trainer, one.config.generate.max_new_tokens
        others = self.needs.others(one.config, traced=False)
        takes = {
            f"evaluation takes {{}} of {trainer.evaluation_batch_size} at once": others.get("evaluate"),
            f"generation of {tokens} tokens takes {{}}": others.get("generate"),
        }
        over = {what: phase for what, phase in takes.items() if phase is not None and phase.most > self.inference}
        if not over:
            return None
        what, phase = max(over.items(), key=lambda took: took[1].most)
        return what.format(format_bytes(phase.bytes)), phase.bytes

    def candidates(self, base: Candidate) -> tuple[list[tuple[Candidate, float]], speed.Rates]:
        """Every candidate with its predicted seconds, in order of preference; and the rates that these are from."""
        variants = self.variants(base)
        config = base.config
        listed: list[tuple[Candidate, speed.Work | None]] = []
        hopeless: list[Rated] = []
        for number, variant in enumerate(variants):
            self.progress.far(f"training with {number} of {len(variants)} choices of what is free")
            stage = next((one for one in stages_of(variant.config) if one.fit is not None), None)
            if stage is None:
                listed.append((variant, None))
                continue
            every = self.levers(variant)
            if len(variants) > 1 and not self.may_fit(self.rated(variant, traced=False)):
                lean = self.rated(self.leanest(variant, every), traced=False)
                if not self.may_fit(lean):
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
        rates = speed.rates_of(config.device.kind(), dtypes, has_devices(config))
        found = [(one, 0.0 if work is None else self.seconds(one, work, rates)) for one, work in listed]
        largest_first = self.typed.fit.maximize == "micro_batch"
        found.sort(
            key=lambda pair: (
                -micro_batch_size(pair[0].config)[0] if largest_first else 0, pair[1], -self.kept(pair[0].config),
                len(pair[0].changes),
            )
        )  # fmt: skip
        return found, rates

    def may_fit(self, computed: Rated) -> bool:
        """Whether it fits by the formula at its lowest."""
        return computed.phase.bytes * (1 - MARGINS["computed"]) <= self.budget

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
        """Whether a lever makes training, or the evaluation in its middle, need less."""
        without = variant.with_values("memory", activation_checkpointing=mode)
        plain, saving = (self.needs.training(one.config, traced=False) for one in (
            without, without.with_values("memory", **{name: value})
        ))  # fmt: skip
        return any(saving[phase].bytes < (1 - WORTH) * plain[phase].bytes for phase in plain)

    def kept(self, config: RunConfig) -> int:
        """Where compression is searched, bytes of the artifact: the more of them, the less is lost."""
        return (self.needs.artifact_bytes(config) or 0) if "compression" in self.typed.fit.free else 0

    def seconds(self, one: Candidate, work: speed.Work, rates: speed.Rates) -> float:
        moved = 0 if one.config.memory.activation_offload == "none" else self.moved(one)
        return speed.step_seconds(one.config, work, rates, moved)

    def moved(self, one: Candidate) -> int:
        """Bytes of a micro batch that offloading its activations moves: its share of those of the largest one. The
        optimizer, and the other levers but checkpointing, leave them as they are."""
        config, sizes = one.config, search.micro_batches(one.config)
        mode, under = config.memory.activation_checkpointing, repr(link_under_adapters(config))
        key = (config.model, config.data, config.precision, config.adapter, under, config.parallelism, mode, sizes[0])
        if key not in self._moved:
            memory = replace(self.typed.memory, activation_offload="none", optimizer_offload="none", loss_chunks=1)
            memory = replace(memory, activation_checkpointing=mode, release_gradients=False, step_in_backward=False)
            largest = with_micro(replace(config, memory=memory, optimizer=self.typed.optimizer), sizes[0])
            kinds = self.needs.fitted(largest, False).kinds
            self._moved[key] = sum(kinds.get(kind, 0) for kind in (ACTIVATIONS, LOGITS_AND_LOSS, CAST_WEIGHTS))
        return self._moved[key] * micro_batch_size(config)[0] // sizes[0]

    def book(self, config: RunConfig) -> speed.Workbook:
        """Of the candidates with this model and data."""
        key = (config.model, config.data)
        if key not in self._books:
            data = self.needs.data(config)
            sample = next(iter(evaluation_loader(data.train, 1)))
            self._books[key] = speed.Workbook(lambda: shapes(config, data), self.needs.task, sample)
        return self._books[key]

    def levers(self, base: Candidate) -> list[Candidate]:
        """`base` with everything that leaves its results as they are."""
        model = shapes(base.config, self.needs.data(base.config))
        batch_norm = any(isinstance(module, _BatchNorm) for module in model.modules())
        return list(search.levers(base, self.typed.fit.free, bool(describe(model).blocks), batch_norm))

    def leanest(self, base: Candidate, every: Sequence[Candidate] | None = None) -> Candidate:
        """What holds least by the formula of `every`, the levers of `base`: small micro batches hold few activations, a
        single one a step adds up no gradients."""
        alike: dict[tuple[bool, bool], list[Candidate]] = {}
        for one in self.levers(base) if every is None else every:
            memory = one.config.memory
            moved = memory.activation_offload != "none" and memory.activation_checkpointing == "none"
            alike.setdefault((micro_batch_size(one.config)[1] == 1, moved), []).append(one)
        least = [leanest(some) for some in alike.values()]
        return least[0] if len(least) == 1 else min(least, key=lambda one: self.computed(one)[1].most)

    def computed(self, one: Candidate) -> Worst:
        return self.needs.worst(one.config, traced=False)

    def traced(self, one: Candidate) -> Worst:
        return self.needs.worst(one.config, traced=True)

    def look(self, candidates: list[tuple[Candidate, float]]) -> Looked:
        """Peaks of candidates, with a line for each that is traced."""
        number = 0

        def trace(one: Candidate) -> Worst:
            nonlocal number
            number += 1
            with self.progress.phase(f"tracing {number}: {' '.join(one.changes) or 'as typed'}"):
                return self.traced(one)

        return search.closest(candidates, self.budget, self.computed, trace, kind=strategy)

    def rated(self, one: Candidate, traced: bool) -> Rated:
        return Rated(one, 0.0, *self.needs.worst(one.config, traced))

    def miss(self, looked: Looked) -> str:
        """Why nothing fits: the nearest miss, and what takes most of it."""
        one = looked.nearest()
        kind, held = search.term(one.phase)
        over = one.phase.most - self.budget
        what = " ".join(one.candidate.changes) or "the config as typed"
        return (
            f"{self.said()}: nothing fits. The nearest, {what}, needs {format_bytes(one.phase.bytes)} to {one.name}, "
            f"{format_bytes(over)} too much with its margin; in the way is {kind}, {format_bytes(held)}. "
            f"{way_out(one.name, kind, self.typed)}"
        )

    def timed(self, ranked: list[Rated]) -> tuple[list[Rated], float]:
        """Those that fit, the fastest of them timed and in that order; and measured over predicted seconds."""
        best = each_strategy_first(ranked)[: self.typed.fit.measure]
        first = [one for one in best if one.seconds and self.is_here(one)]
        on_ranks = sum(one.candidate.config.parallelism.distributed for one in first)
        rounds = 1 if on_ranks else ROUNDS  # steps of ranks are quicker than their start
        warm = timing.STEPS * ROUNDS // rounds
        seconds = sum((timing.WARM_FROM + warm) * one.seconds for one in first) + on_ranks * STARTING
        if rounds * seconds > TIMED_SECONDS:
            first = []
        times: dict[int, list[float]] = {id(one): [] for one in first}
        for turn in range(rounds if first else 0):
            with self.progress.phase(f"timing {len(first)} of them, round {turn + 1} of {rounds}"):
                for one in first:
                    config = one.candidate.config
                    times[id(one)].append(timing.measured(config, self.needs.data(config), self.needs.task, warm))
        found = [replace(one, measured=min(times[id(one)])) if id(one) in times else one for one in ranked]
        ratios = [one.measured / one.seconds for one in found if one.measured is not None]
        if self.typed.fit.maximize != "micro_batch":
            found.sort(key=lambda one: (one.measured is None, one.measured or one.seconds))
        return found, statistics.median(ratios) if ratios else 1.0

    def is_here(self, one: Rated) -> bool:
        """Whether the devices of a candidate are this machine's, and have the room."""
        device, parallelism = one.candidate.config.device, one.candidate.config.parallelism
        if parallelism.nodes > 1 or not has_devices(one.candidate.config):
            return False
        sharing = parallelism.devices if device.kind() == "cpu" else 1
        return sharing * one.phase.bytes <= timing.free_memory(device.kind())


def budget_of(config: RunConfig) -> int:
    """Bytes: what was given, else what the device has."""
    found = capacity(config) if config.budget is None else parse_size(config.budget)
    if found is None:
        raise ConfigError(
            f"job=fit needs budget=SIZE (6GiB say) or device.memory=SIZE: device={config.choices['device']} does not "
            "tell how much memory it has"
        )
    return found


def has_devices(config: RunConfig) -> bool:
    """Whether what is planned for is this machine, and it has the devices of a node."""
    return config.device.memory is None and not config.device.problems(config.parallelism.devices)


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


def length(one: Candidate) -> int:
    """Tokens of a sequence; 0: there are none."""
    return getattr(one.config.data, "sequence_length", 0)


def strategy(one: Candidate) -> Parallelism:
    """What ranks do to work together. Rates say less of it than of all else, so the best with each are timed."""
    return one.config.parallelism


def each_strategy_first(ranked: Sequence[Rated]) -> list[Rated]:
    """The best with each strategy, then the second best, and so on."""
    place: Counter[Parallelism] = Counter()
    turns = []
    for one in ranked:
        turns.append((place[strategy(one.candidate)], one))
        place[strategy(one.candidate)] += 1
    return [one for _, one in sorted(turns, key=lambda turn: turn[0])]


def leanest(every: list[Candidate]) -> Candidate:
    """Of candidates that are much alike the one that holds least by what it saves, without looking at peaks."""

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


def way_out(phase: str, kind: str, config: RunConfig) -> str:
    """What makes room in a phase where `kind` is in the way."""
    if phase == "compress" and any(method.needs_calibration for method in config.chain.values()):
        return "Give more, or fewer calibration.samples, or a smaller calibration.batch_size"
    shorter = "a shorter data.sequence_length" if hasattr(config.data, "sequence_length") else "a smaller model"
    named = {
        "weights": ("precision", "or a smaller model"),
        "gradients": ("adapter", "or a smaller model"),
        "optimizer state": ("optimizer", "or adapter"),
    }
    if phase in ("evaluate", "validate") and kind not in named:  # what `memory` saves, training holds
        batch = "trainer.evaluation_batch_size"  # halved already, unless it was typed
        smaller = search.typed(config, batch) and config.trainer.evaluation_batch_size > 1
        return f"Give more, or {f'a smaller {batch}' if smaller else shorter}"
    group, other = named.get(kind, ("memory", f"or {shorter}"))
    if group in config.fit.free:
        return "Give more, or take a smaller model"
    return f"Give more, fit.free=[{group}] {other}"
