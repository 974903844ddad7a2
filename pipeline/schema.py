"""The root of a config and its groups, as frozen dataclasses. Defaults live in conf/, never here."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt

from pipeline import registry
from pipeline.adapters.base import Adapter
from pipeline.calibration.settings import Calibration
from pipeline.compression.base import Method
from pipeline.data.base import Data
from pipeline.device.base import Device
from pipeline.errors import ConfigError, did_you_mean
from pipeline.memory.settings import Memory
from pipeline.models.base import Model
from pipeline.optimizers.base import Optimizer
from pipeline.parallelism.base import Parallelism
from pipeline.precision.base import Precision
from pipeline.registry import Absent
from pipeline.sizes import Size
from pipeline.trainer.settings import Trainer

if TYPE_CHECKING:
    from pipeline.provenance import Composition

PathText = TypeVar("PathText", str, str | None)
Job = Literal["run", "plan", "fit", "compress", "evaluate", "verify", "generate"]
Free = Literal["memory", "optimizer", "precision", "parallelism", "adapter", "compression", "micro_batch"]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Limits the finished artifact must keep; a broken one exits 3. None: no limit.

    max_quality_drop: relative, in the worse direction. max_quality_points: absolute. min_ratio: size before / after.
    """

    max_quality_drop: Annotated[float, Ge(0)] | None
    max_quality_points: Annotated[float, Ge(0)] | None
    min_ratio: Annotated[float, Gt(0)] | None


@dataclass(frozen=True, kw_only=True)
class Generate:
    """`job=generate`. Greedy at temperature 0."""

    max_new_tokens: Annotated[int, Ge(1)]
    temperature: Annotated[float, Ge(0)]


@dataclass(frozen=True, kw_only=True)
class Planning:
    """How a run is planned, and what it makes of its plan.

    level: `trace` runs it on fake tensors, in seconds; `formula` computes, in less and less exactly.
    enforce: one that is predicted not to fit in memory stops before it starts.
    calibrate: what it measures is kept for later plans on this machine (~/.cache/leanfit), which are corrected by it.
    """

    level: Literal["trace", "formula"]
    enforce: bool
    calibrate: bool


@dataclass(frozen=True, kw_only=True)
class Search:
    """`job=fit`: what it may change, and what it looks for.

    `free`: groups whose choice changes results (or, of `memory`, takes far longer), searched only if named here.
    `maximize`: the largest that fits in place of the fastest. `artifact`, `inference`: bytes, `2MB` say, that the
    artifact's weights and its evaluation may take. `run`: the winner runs. `measure`: how many of the fastest are timed
    for a few steps, where the device is here. `on_oom`: what a run makes of memory that ran out: it stops and says what
    needs less, or goes on from its last checkpoint with that.
    """

    free: tuple[Free, ...]
    maximize: Literal["micro_batch", "sequence", "parameters"] | None
    artifact: Size | None
    inference: Size | None
    run: bool
    measure: Annotated[int, Ge(0)]
    on_oom: Literal["stop", "adapt"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run. `chain` maps stage names, in order, to the methods' settings; empty for `compression=none`."""

    job: Job
    model: Model
    data: Data
    chain: Mapping[str, Method]
    precision: Precision
    parallelism: Parallelism
    device: Device
    optimizer: Optimizer
    adapter: Adapter
    memory: Memory
    calibration: Calibration
    trainer: Trainer
    gate: Gate
    generate: Generate
    plan: Planning
    fit: Search
    budget: Size | None
    """Memory of one device that `job=fit` keeps within, `6GiB` or bytes; None: what the device has."""
    artifact: str | None
    prompt: str | None
    prompt_file: str | None
    keep_stages: bool
    resume: bool
    """Whether this run goes on in the directory of an earlier one."""
    sweep: bool
    """Whether it is one job of several (`-m`): then it prints one line."""
    lock: Mapping[str, Any] | None
    choices: Mapping[str, Any]
    """group -> choice, or list of stage names for compression; what `result.json` shows."""
    overrides: tuple[str, ...]
    """The command line, as typed."""


@dataclass(frozen=True, kw_only=True)
class _Root:
    """What stands at the root beside the groups."""

    job: Job
    budget: Size | None
    artifact: str | None
    prompt: str | None
    prompt_file: str | None
    keep_stages: bool
    resume: str | None
    lock: Mapping[str, Any] | None


GROUPS = (
    "model", "data", "precision", "parallelism", "device", "optimizer", "adapter", "memory", "calibration", "trainer",
)  # fmt: skip
"""Groups of one choice each, in the order of the config; `compression` is a chain of them."""
PATHS = (("data", "path", None), ("model", "pretrained", None), ("calibration", "source", "train"))
"""(group, key, value that is no path) of settings that name a place on this machine."""
LINK_PATHS = ("teacher", "student")
"""Keys of links that name a place; the word `self` is none."""
BLOCKS: dict[str, type[Any]] = {"gate": Gate, "generate": Generate, "plan": Planning, "fit": Search}


def decode_run(
    composed: Composition, overrides: Sequence[str], note: Callable[[str], None] = print, sweep: bool = False
) -> RunConfig:
    """A composed config as one frozen RunConfig. `note` is told what was dropped; `overrides` are recorded.

    In a sweep the command line may set values of stages that not every job has.

    Raises:
        ConfigError: with every problem, those of the composition included.
    """
    if not composed.complete:
        raise ConfigError(composed.problems)
    problems = list(composed.problems)
    values = dict(composed.values)
    leaves = composed.leaves()
    parts: dict[str, Any] = {}
    for group in GROUPS:
        content = values.pop(group, Absent())
        if isinstance(content, Absent):
            allowed = ", ".join(registry.available(group))
            problems += [] if content.reported else [f"{group} is required: choose one of {allowed}"]
            continue
        parts[group], told = registry.decode_choice(group, content, group, composed.said, leaves)
        problems += told
    chain, told = decode_chain(composed, values.pop("compression", Absent()), note, sweep)
    problems += told
    for block, cls in BLOCKS.items():
        parts[block], told = registry.decode(cls, values.pop(block, {}), block, composed.said, leaves)
        problems += told
    known = [*GROUPS, "compression", "recipe", *BLOCKS, *registry.field_names(_Root)]
    for key in [key for key in values if key not in known]:
        problems.append(_unknown_at_root(key, values.pop(key), known, composed, leaves))
    root, told = registry.decode(_Root, values, "", composed.said)
    problems += told
    if problems or root is None:
        raise ConfigError(problems)
    for group, key, word in PATHS:
        if hasattr(parts[group], key) and getattr(parts[group], key) != word:
            parts[group] = replace(parts[group], **{key: absolute(getattr(parts[group], key))})
    for stage, method in chain.items():
        given = {key: getattr(method, key, None) for key in LINK_PATHS}
        places = {key: absolute(value) for key, value in given.items() if isinstance(value, str) and value != "self"}
        chain[stage] = replace(method, **places)
    # A resumed run composes from its lock, which is no recipe that anyone chose.
    choices = {**composed.choices, **({} if root.resume is None else {"recipe": None})}
    return RunConfig(
        **parts,
        chain=chain,
        job=root.job,
        budget=root.budget,
        artifact=absolute(root.artifact),
        prompt=root.prompt,
        prompt_file=absolute(root.prompt_file),
        keep_stages=root.keep_stages,
        resume=root.resume is not None,
        sweep=sweep,
        lock=root.lock,
        choices={**choices, "compression": list(chain) or "none"},
        overrides=tuple(overrides),
    )


def absolute(path: PathText) -> PathText:
    """A path that exists, `~` expanded and from the root, so that a lock can be run from anywhere; others as typed.

    What does not exist may be no path at all (a hub id), and a message should name it as it was typed.
    """
    expanded = os.path.expanduser(path) if path else path
    return os.path.join(os.getcwd(), os.path.normpath(expanded)) if expanded and os.path.exists(expanded) else path


def _unknown_at_root(key: str, value: Any, known: list[str], composed: Composition, leaves: list[str]) -> str:
    inner = value if isinstance(value, Mapping) else {}
    full = f"{key}.{next(iter(inner))}" if inner else key
    return registry.unknown_key(key, value, known, lambda _: composed.said(full), [] if inner else leaves)


def decode_chain(
    composed: Composition, values: Any, note: Callable[[str], None], sweep: bool
) -> tuple[dict[str, Method], list[str]]:
    """Stage name -> method, in the order the stages were chosen; and what is wrong with any of them.

    The chosen list is authoritative: settings of a known method that is not in it are checked and dropped with a note.
    """
    if values is None or (isinstance(values, Absent) and composed.chain_said is not None):
        return {}, []  # compression=[] composes to nothing at all
    if isinstance(values, Absent):
        return {}, [] if values.reported else ["compression is required: a choice, a list, or none"]
    if not isinstance(values, Mapping):
        return {}, [
            f"{registry.shown('compression', values)} must be a mapping of stages ({composed.said('compression')})"
        ]
    problems: list[str] = []
    chosen = [stage for stage in composed.stages if stage in values]
    if composed.chain_said is None:
        said_in_full = [stage for stage, value in values.items() if isinstance(value, Mapping) and "name" in value]
        chosen += [stage for stage in said_in_full if stage not in chosen and stage not in composed.dropped]
    chain: dict[str, Method] = {}
    for stage in chosen:
        key = f"compression.{stage}"
        if not re.fullmatch(r"[\w-]{1,64}", str(stage)):  # its snapshots lie in a directory that is called so
            problems.append(f"{key}: a stage's name is letters, digits, _ and - ({composed.said('compression')})")
            continue
        chain[stage], told = registry.decode_choice("compression", values[stage], key, composed.said, composed.leaves())
        problems += told
    for stage, content in values.items():
        if stage not in chosen:
            told, dropped = _not_chosen(composed, str(stage), content, chosen, sweep)
            problems += told
            if dropped:
                note(dropped)
    return chain, problems


def _not_chosen(
    composed: Composition, stage: str, content: Any, chosen: list[str], sweep: bool
) -> tuple[list[str], str]:
    """Problems with the settings of a stage that is not in the chain, or the note that says they are dropped."""
    key = f"compression.{stage}"
    where = composed.said(f"{key}.{next(iter(content))}" if isinstance(content, Mapping) and content else key)
    choice = composed.dropped.get(stage, stage)
    methods = [method for method in registry.available("compression") if method != "none"]
    chain = f"compression={composed.chain_said.partition('=')[2] if composed.chain_said else _listed(chosen)}"
    has_name = isinstance(content, Mapping) and "name" in content
    if choice not in methods and not has_name:
        known = [*chosen, *methods]
        told = f"{key}: no such stage in {chain}; stages and methods: {', '.join(dict.fromkeys(known))}"
        return [f"{told}{did_you_mean(stage, known)} ({where})"], ""
    if composed.typed(key) and not sweep:
        last = [name for name in (*chosen, stage) if _quantizes(composed, name)]
        others = [name for name in (*chosen, stage) if name not in last]
        meant = _listed([*others, *last[-1:]])  # quantization stands last, and once
        return [
            f"{key}: '{stage}' is not in {chain}; leave its settings out, or choose compression={meant} ({where})"
        ], ""
    told_all = _settings_problems(composed, key, choice, content)
    return told_all, "" if told_all else f"note: {key} ({where}) dropped, since {chain} was chosen"


def _quantizes(composed: Composition, stage: str) -> bool:
    """Whether a stage is quantization, by the name of its choice; a stage of another name is not looked up."""
    choice = composed.dropped.get(stage, stage)
    known = choice in registry.available("compression") and choice != "none"
    return known and registry.lookup("compression", choice).kind == "quantization"


def _settings_problems(composed: Composition, key: str, choice: str, content: Any) -> list[str]:
    """Unknown keys and wrong types in settings that will be dropped: a mistake is a mistake there too."""
    name = content.get("name", choice) if isinstance(content, Mapping) else choice
    try:
        cls = registry.lookup("compression", str(name))
    except ConfigError as error:
        return [f"{key}.name={name} {error} ({composed.said(key)})"]
    if not isinstance(content, Mapping):
        return registry.decode(cls, content, key, composed.said)[1]
    filled = {field: Absent(reported=True) for field in registry.field_names(cls)} | {"name": name} | dict(content)
    return registry.decode(cls, filled, key, composed.said)[1]


def _listed(stages: Sequence[str]) -> str:
    return stages[0] if len(stages) == 1 else f"[{','.join(stages)}]" if stages else "none"


def values_of(config: RunConfig) -> dict[str, Any]:
    """A config as plain containers, as a recipe would say them: the inverse of `decode_run`."""
    blocks = {block: asdict(getattr(config, block)) for block in BLOCKS}
    rest = {key: getattr(config, key) for key in ("job", "budget", "artifact", "prompt", "prompt_file", "keep_stages")}
    groups = {group: asdict(getattr(config, group)) for group in GROUPS}
    return {
        **rest,
        **groups,
        "compression": {stage: asdict(method) for stage, method in config.chain.items()},
        **blocks,
    }
