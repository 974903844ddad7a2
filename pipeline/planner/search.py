"""The search of `job=fit`: which configs there are beside the one that was typed, and which are looked at closely.

    candidates that the rules let pass -> a lower bound of memory and a step time for each -> the best ten traced

A candidate is the typed config with some keys changed. Always searched is what leaves results as they are: blocks
computed twice, gradients freed early, micro batches, a loss in chunks, kernels of the optimizer, and shards where there
are several devices. Choices that change results are searched if `fit.free` names their group. A key of these that the
command line sets stays as typed, unless its group is named. Nothing here builds a model: what a candidate takes and
how long is asked of functions that are handed in.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from pipeline import registry, rules
from pipeline.device.auto import Auto
from pipeline.device.base import Device
from pipeline.device.cuda import gpus
from pipeline.planner.live import Peak
from pipeline.planner.plan import MARGINS, Phase
from pipeline.schema import RunConfig
from pipeline.stage_input import link_under_adapters
from pipeline.usage import settings

CHUNKS = (4, 16)
TOGETHER = ({"single"}, {"ddp", "fsdp"}, {"ray", "ray_fsdp"})
"""Strategies that are compared with each other without being named: started alike, and the same up to rounding."""
NAMED = {"ddp", "fsdp", "tp", "fsdp_tp", "deepspeed"}
PLACES = ("devices", "nodes", "launcher", "rendezvous", "node_rank", "address")
"""Settings of a strategy that say where it runs, whichever it is."""
GROUPS = ("precision", "optimizer", "adapter")
TRACED = 10
ENOUGH, BEYOND = 5, 10
"""How many of a kind that fit are enough; and how many of a kind are computed after the first of all that fits."""
SAVES = 0.05
"""The share of another's peak that a slower candidate must save to be traced as well."""


@dataclass(frozen=True)
class Candidate:
    """A config, and the overrides that make it of the one that was typed."""

    config: RunConfig
    changes: tuple[str, ...] = ()

    def with_values(self, group: str, **values: Any) -> Candidate:
        """With these values of a group; those that it has already are no change."""
        part = getattr(self.config, group)
        new = {key: value for key, value in values.items() if getattr(part, key) != value}
        if not new:
            return self
        said = tuple(registry.shown(f"{group}.{key}", value) for key, value in new.items())
        return Candidate(replace(self.config, **{group: replace(part, **new)}), (*self.changes, *said))


def plain(config: RunConfig) -> RunConfig:
    """The run that is searched for: `config` without what asks for the search."""
    asked = replace(config.fit, free=(), maximize=None, artifact=None, inference=None, run=False)
    return replace(config, job="run", budget=None, fit=asked)


def typed(config: RunConfig, key: str) -> bool:
    """Whether the command line says the value of a key."""
    return any(re.match(rf"\+*{re.escape(key)}=", line) for line in config.overrides)


def variants(config: RunConfig, artifact: int | None = None) -> list[Candidate]:
    """The config with each choice of the groups that are named free, in all combinations, and with each strategy.

    Args:
        artifact: bytes that the artifact may take, which a method with a budget of its own is given.
    """
    free, base = config.fit.free, plain(config)
    found = [Candidate(base)]
    for group in GROUPS:
        if group in free:
            found = [other for one in found for other in (one, *_choices(one, group))]
    if "compression" in free:
        bound = artifact is not None or config.fit.inference is not None or config.trainer.max_steps == 0
        # Of training alone a method takes something off as the base of adapters.
        counting = [one for one in found if bound or one.config.adapter.trains]
        found += [
            other
            for one in counting
            for other in _methods(one, artifact)
            if bound or link_under_adapters(other.config) is not None
        ]
    found = [other for one in found for other in _strategies(one, "parallelism" in free)]
    return [one for one in found if valid(one)]


def valid(candidate: Candidate) -> bool:
    """Whether the rules let it pass; a device that is not here may be planned for."""
    config = candidate.config
    return not rules.problems(replace(config, job="plan", device=_found(config.device)))


@cache
def _found(device: Device) -> Device:
    """The device that `device=auto` finds: looking takes a millisecond, and rules look often."""
    return device.chosen()[0] if isinstance(device, Auto) else device


def _choices(candidate: Candidate, group: str, among: Sequence[str] | None = None) -> Iterator[Candidate]:
    """The other choices of a group, with what the command line or a recipe says of its keys; those that lack such a key
    are left out."""
    config = candidate.config
    part, chosen = getattr(config, group), str(config.choices[group])
    own = settings(registry.conf_root() / group / f"{chosen}.yaml")
    places = PLACES if group == "parallelism" else ()
    said = {
        key: value
        for key, value in vars(part).items()
        if key != "name" and (typed(config, f"{group}.{key}") or _listed(value) != own.get(key)) and key not in places
    }
    for choice in among or registry.available(group):
        values = settings(registry.conf_root() / group / f"{choice}.yaml")
        if choice == chosen or not said.keys() <= values.keys():
            continue
        kept = {key: getattr(part, key) for key in places if hasattr(part, key) and key in values}
        other, problems = registry.decode_choice(
            group, {**values, **{key: _listed(value) for key, value in {**said, **kept}.items()}}, group, lambda key: ""
        )
        if problems or other == part:
            continue
        moved = tuple(f"{group}.{key}={value}" for key, value in kept.items() if value != values[key])
        choices = {**config.choices, group: choice}
        yield Candidate(
            replace(config, **{group: other}, choices=choices), (*candidate.changes, f"{group}={choice}", *moved)
        )


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _methods(candidate: Candidate, artifact: int | None) -> Iterator[Candidate]:
    """No compression, and each method of quantization that trains nothing, as the only link."""
    config = candidate.config
    for choice in registry.available("compression"):
        values = settings(registry.conf_root() / "compression" / f"{choice}.yaml")
        if choice == "none":
            chain: dict[str, Any] = {}
        else:
            cls = registry.lookup("compression", choice)
            if cls.kind != "quantization" or cls.trains or cls.must_follow or ("budget" in values and not artifact):
                continue
            values |= {"budget": artifact} if "budget" in values else {}
            method, problems = registry.decode_choice("compression", values, f"compression.{choice}", lambda key: "")
            if problems:
                continue
            chain = {choice: method}
        if list(chain) == list(config.chain):
            continue
        said = [f"compression={choice}"]
        said += [f"compression.{choice}.budget={artifact}"] if values.get("budget") else []
        choices = {**config.choices, "compression": list(chain) or "none"}
        yield Candidate(replace(config, chain=chain, choices=choices), (*candidate.changes, *said))


def _strategies(candidate: Candidate, named: bool) -> Iterator[Candidate]:
    """The strategy that was typed, and those that are compared with it; shards kept whole between the passes, too."""
    config = candidate.config
    name = config.parallelism.name
    others = next((group for group in TOGETHER if name in group), {name})
    found = [candidate]
    if named and config.parallelism.ranks > 1:
        others = others | NAMED
    if config.parallelism.ranks > 1:
        found += _choices(candidate, "parallelism", sorted(others - {name}))
    elif named and config.device.kind() == "cuda" and (here := gpus()) > 1:
        spread = list(_choices(candidate, "parallelism", sorted(NAMED)))
        found += [one.with_values("parallelism", devices=here) for one in spread]
    for one in found:
        yield one
        if getattr(one.config.parallelism, "reshard", None) is True:
            yield one.with_values("parallelism", reshard=False)


def levers(candidate: Candidate, free: Sequence[str], blocks: bool, batch_norm: bool) -> Iterator[Candidate]:
    """Everything that leaves the results of `candidate` as they are, in all combinations that the rules let pass.

    Args:
        blocks: whether the model has blocks to compute twice.
        batch_norm: whether its results depend on the micro batch, which is then searched only if named.
    """
    config = candidate.config
    memory, optimizer = config.memory, config.optimizer

    def fixed(key: str) -> bool:
        return typed(config, key) and key.partition(".")[0] not in free

    modes = ["none", "full", "selective"] if blocks and not fixed("memory.activation_checkpointing") else []
    chunks = [] if fixed("memory.loss_chunks") else [1, *CHUNKS]
    micro: list[int | None] = (
        [] if typed(config, "trainer.micro_batch_size") and "micro_batch" not in free else [*micro_batches(config)]
    )
    if batch_norm and "micro_batch" not in free:
        micro = []
    if config.trainer.micro_batch_size is None:  # null says the largest
        micro = micro[1:]
    early = [(memory.release_gradients, memory.step_in_backward)]
    if not (fixed("memory.release_gradients") or fixed("memory.step_in_backward")):
        early += [(False, False), (True, False), (False, True)]
    kernels = [getattr(optimizer, "implementation", None)]
    if kernels[0] not in (None, "auto") and not typed(config, "optimizer.implementation"):
        kernels.append("auto")
    places: list[str] = []
    if "memory" in free:
        places = ["none", "host", "disk"] if config.device.kind() == "cuda" else ["none", "disk"]
    for mode, chunk, size, (release, within), kernel, activation, state in itertools.product(
        _once(memory.activation_checkpointing, modes),
        _once(memory.loss_chunks, chunks),
        _once(config.trainer.micro_batch_size, micro),
        _once(early[0], early),
        _once(kernels[0], kernels),
        _once(memory.activation_offload, places),
        _once(memory.optimizer_offload, places),
    ):
        one = candidate.with_values("trainer", micro_batch_size=size)
        one = one.with_values(
            "memory",
            activation_checkpointing=mode,
            loss_chunks=chunk,
            release_gradients=release,
            step_in_backward=within,
            activation_offload=activation,
            optimizer_offload=state,
        )
        if kernel is not None:
            one = one.with_values("optimizer", implementation=kernel)
        if one is candidate or valid(one):
            yield one


def _once(first: Any, others: Sequence[Any]) -> list[Any]:
    """`first`, then the others, each once."""
    return list(dict.fromkeys([first, *others]))


def micro_batches(config: RunConfig) -> list[int]:
    """Micro batches that make the stated global batch, largest first."""
    share, rest = divmod(config.trainer.batch_size, config.parallelism.data_ranks)
    return [] if rest else [size for size in range(share, 0, -1) if share % size == 0]


@dataclass(frozen=True)
class Rated:
    """A candidate with what is predicted of it: seconds a step, and the peak of the phase of this name, which needs
    most."""

    candidate: Candidate
    seconds: float
    name: str
    phase: Phase
    measured: float | None = None
    """Seconds a step, where it was timed."""

    def fits(self, budget: int) -> bool:
        """Whether its peak stays within, with its margin."""
        return self.phase.most <= budget


Worst = tuple[str, Phase]
"""The phase that needs most, by name."""


@dataclass(frozen=True)
class Looked:
    """What a search looked at, in order of preference: by the formula alone, and closely."""

    computed: list[Rated]
    traced: list[Rated]

    def fitting(self, budget: int) -> list[Rated]:
        return [one for one in self.traced if one.fits(budget)]

    def nearest(self) -> Rated:
        """The one that needs least."""
        return min(self.traced or self.computed, key=lambda one: one.phase.bytes)


def closest(
    candidates: Sequence[tuple[Candidate, float]],
    budget: int,
    compute: Callable[[Candidate], Worst],
    trace: Callable[[Candidate], Worst],
    most: int = TRACED,
    kind: Callable[[Candidate], Hashable] = lambda candidate: None,
) -> Looked:
    """The best of `candidates` traced, at most so many; they come with their seconds, in order of preference.

    Those which by the formula at its lowest do not fit are passed over, and so are those which do not save anything
    worth while beside a better one of their `kind` that fits. How far a trace was from the formula is taken to hold for
    the next one. Where none of these fits, the one that needs least is traced besides.
    """
    looked = Looked([], [])
    fitting: dict[Hashable, list[int]] = {}
    since: Counter[Hashable] = Counter()
    off: float | None = None
    for candidate, seconds in candidates:
        own = kind(candidate)
        kept = fitting.get(own, [])
        if len(looked.traced) == most:
            break
        if len(kept) == ENOUGH or since[own] == BEYOND:
            continue
        since[own] += bool(fitting)
        computed = Rated(candidate, seconds, *compute(candidate))
        looked.computed.append(computed)
        held = computed.phase.bytes
        below = computed.phase.below or MARGINS["computed"]
        if held * (off or 1 - below) > budget or any(other * (1 - SAVES) <= held for other in kept):
            continue
        one = Rated(candidate, seconds, *trace(candidate))
        looked.traced.append(one)
        off = one.phase.bytes / held
        if one.fits(budget):
            fitting.setdefault(own, []).append(held)
    if looked.computed and not fitting:
        least = min(looked.computed, key=lambda one: one.phase.bytes)
        if all(one.candidate is not least.candidate for one in looked.traced):
            looked.traced.append(Rated(least.candidate, least.seconds, *trace(least.candidate)))
    return looked


def largest(fits: Callable[[int], bool], limit: int, about: int = 0) -> int:
    """The largest whole number from 1 up to `limit` that fits, where all below one that fits do; 0: not even 1 does.
    It is sought from `about` on, in steps that double."""
    good = bad = about
    step = 1
    if about == 0 or fits(about):
        while bad == good:
            bad = min(good + step, limit + 1)
            if bad <= limit and fits(bad):
                good, step = bad, 2 * step
    else:
        while good == bad:
            good = max(0, bad - step)
            if good and not fits(good):
                bad, step = good, 2 * step
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def grown(candidate: Candidate, step: int) -> Candidate:
    """With a model of so many groups of attention heads, in the proportions it has.

    Heads keep their size, so the width follows; layers and the feed-forward grow alike. More steps, more parameters.
    """
    model: Any = candidate.config.model
    groups = getattr(model, "key_value_heads", model.heads)
    heads = model.heads // groups * step
    sizes = {
        "layers": max(1, round(model.layers * heads / model.heads)),
        "heads": heads,
        "width": model.width // model.heads * heads,
    }
    if hasattr(model, "key_value_heads"):
        sizes["key_value_heads"] = step
    if getattr(model, "intermediate", None):
        sizes["intermediate"] = max(64, round(model.intermediate * heads / model.heads / 64) * 64)
    return candidate.with_values("model", **sizes)


def command(overrides: Sequence[str], changes: Sequence[str]) -> list[str]:
    """The overrides that make a candidate: what was typed, without what asked for the search, and its changes."""
    keys = {line.partition("=")[0] for line in changes}
    asked = re.compile(r"\+*(job|budget|fit\.(?!on_oom=)\w+)=")
    if "compression" in keys:  # another method has not the typed one's settings
        asked = re.compile(rf"{asked.pattern}|\+*compression\.")
    kept = [line for line in overrides if not asked.match(line) and line.lstrip("+").partition("=")[0] not in keys]
    return [*kept, *changes]


def unasked(config: RunConfig) -> Iterator[str]:
    """Overrides that take back a search that a recipe, beside the command line, may ask for."""
    if config.choices.get("recipe") is None:
        return
    run = plain(config)
    there = {"job": (config.job, run.job), "budget": (config.budget, run.budget)}
    there |= {f"fit.{key}": (value, getattr(run.fit, key)) for key, value in vars(config.fit).items()}
    for key, (value, without) in there.items():
        if value != without or (typed(config, key) and key not in ("fit.measure", "fit.on_oom")):
            yield registry.shown(key, _listed(without))


def term(peak: Peak) -> tuple[str, int]:
    """What takes most at a peak, and its bytes."""
    return max(peak.kinds.items(), key=lambda kind: kind[1])
