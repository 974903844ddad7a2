"""What a run will need in memory, phase by phase, before anything is allocated: `job=plan`, and each run beforehand.

Two levels: `trace` runs the composed fit, the links and the evaluation on fake tensors (`training`, `links`,
`evaluation`), in seconds; `formula` computes (`formula`), in well under one. What cannot be traced is computed, and
`untraced` says why; links that no formula is known for are traced at either level; the rest is in `open`, and is not
guessed.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd

from pipeline import stage_input
from pipeline.chain import Stage
from pipeline.data.base import DataBundle
from pipeline.data.loader import evaluation_loader, training_batch
from pipeline.errors import ConfigError, first_line
from pipeline.fitting import micro_batch_size
from pipeline.models.architecture import describe
from pipeline.planner import calibration, formula, scratch
from pipeline.planner.evaluation import trace_evaluation, trace_validation
from pipeline.planner.fakes import faked, tracing
from pipeline.planner.gathering import CHECKPOINT
from pipeline.planner.generation import generates, trace_generation
from pipeline.planner.links import declare_links, trace_links
from pipeline.planner.live import Peak
from pipeline.planner.trained import adapted
from pipeline.planner.training import trace_training
from pipeline.planner.transfers import held, opens_in_memory, trace_opening, traced_saving
from pipeline.planner.workspaces import WORKSPACES
from pipeline.report.units import format_bytes
from pipeline.schema import RunConfig
from pipeline.tasks import lookup
from pipeline.tasks.base import Task
from pipeline.walk import stages_of

log = logging.getLogger(__name__)
Level = Literal["trace", "formula"]
MARGINS = {"traced": 0.01, "computed": 0.1}
"""How far off predictions were at most, transformers without scratch space of kernels: benchmarks/README.md."""
CONVOLUTIONS = 0.05
"""And where there are convolutions, whose kernels take scratch space: large ones are not tried for it."""
NARROW, NARROW_CONVOLUTIONS = 0.08, 0.35
"""And where a CPU computes in 16 bits, in so large a phase that operators may be too large to be tried (`scratch`)."""
ON_GPU, COMPRESSED_ON_GPU = 0.05, 0.15
"""And on a GPU, whose kernels are supposed to hold what a CPU's hold, but for workspaces of matrix products; and of
links and what they leave there: of ten recorded on an H200 -10% to +3%, with the plans mended on these same ten."""
CHOSEN = 0.05
"""And what evaluates or generates after layers were given bits by what is measured: 3 bits take a kernel as much as 4,
so the same file is not the same memory. Of ten runs of `mixed_bits` -3.0% to +0.2%."""
COMPILED = 0.5
"""And how much less a fit takes whose compiled blocks are taken for plain ones: 19, 33 and 43% of three runs."""
TRACED = ("cpu", "cuda")
"""Devices whose operators are known well enough to be traced."""
RESERVED = 0.15
"""And what CUDA's pool reserves for training: of 48 recorded configs on an H200, -13.2% to 0, 29 to the byte."""
CONTEXT = "the context that CUDA keeps on the device is not in it"
UNSEEN = "kernels' scratch space"


@dataclass(frozen=True)
class Phase(Peak):
    """A peak on one device, how it is known ("traced", "computed", "calibrated"), and how far off it may be.

    `margin`: relative, either way; `below`: downwards, where that is more. `factor`: what it was corrected by, from
    earlier runs on this machine.
    """

    source: str = "traced"
    margin: float = MARGINS["traced"]
    factor: float = 1.0
    below: float | None = None

    @property
    def reserved_margin(self) -> float | None:
        """How far off `reserved` may be; it is not corrected by earlier runs."""
        return None if self.reserved is None else RESERVED

    @property
    def most(self) -> int:
        """The upper end of its margin."""
        return int(self.bytes * (1 + self.margin))


@dataclass
class Plan:
    """Predicted peaks on one device.

    untraced: {phase: why it is computed and not traced}. open: {phase: why it is not predicted at all}.
    capacity: bytes of memory of the device; None: not known.
    disk: bytes of a checkpoint of the fit and of the artifact's weights.
    """

    phases: dict[str, Phase] = field(default_factory=dict)
    untraced: dict[str, str] = field(default_factory=dict)
    open: dict[str, str] = field(default_factory=dict)
    capacity: int | None = None
    disk: dict[str, int] = field(default_factory=dict)
    beside: str = ""
    """What the device holds beside all phases, and no phase has in it."""
    left: dict[str, int] = field(default_factory=dict)
    """{phase: bytes that it has beside `capacity`}: what other processes on the same CPU leave of theirs meanwhile."""

    @property
    def fits(self) -> bool | None:
        """Whether every phase fits in what it has, with its margin; None where that is not known."""
        if self.capacity is None or not self.phases:
            return None
        return all(self.most(name) <= self.capacity for name in self.phases)

    def most(self, name: str) -> int:
        """What a phase needs, with its margin, of `capacity`."""
        return self.phases[name].most - self.left.get(name, 0)

    def binding(self) -> tuple[str, Phase]:
        """The phase that needs most."""
        return max(self.phases.items(), key=lambda phase: self.most(phase[0]))

    def verdict(self) -> str:
        """In one line whether it fits, and what it is made of where it needs most."""
        if self.capacity is None or self.fits is None:
            return ""
        name, peak = self.binding()
        most = sorted(peak.kinds.items(), key=lambda kind: -kind[1])[:3]
        parts = ", ".join(f"{kind} {format_bytes(held)}" for kind, held in most)
        has = self.capacity + self.left.get(name, 0)
        said = f"{name} needs {format_bytes(peak.bytes)} of {format_bytes(has)} ({parts})"
        short = peak.most - has
        said += f"; not planned: {', '.join(self.open)}" if self.open else ""
        said += f"; {self.beside}" if self.beside else ""
        return f"fits: {said}" if self.fits else f"does not fit by {format_bytes(short)}, its margin included: {said}"

    def write(self, path: Path) -> None:
        told = {"schema": 1, **asdict(self), "fits": self.fits}
        for name, phase in self.phases.items():
            told["phases"][name]["reserved_margin"] = phase.reserved_margin
        text = json.dumps(told, indent=2)
        flat = re.sub(r"\[[\d,\s]+\]", lambda numbers: "".join(numbers[0].split()), text)  # a list a line
        path.write_text(flat + "\n", encoding="utf-8")


def plan(
    config: RunConfig,
    data: DataBundle | None = None,
    tokenizer: Any = None,
    level: Level | None = None,
    done: int = 0,
) -> Plan:
    """The plan of `job=run` or `compress` with this config; allocates no tensor of the model's size.

    Args:
        data: what `config.data` opens; None: it is opened.
        tokenizer: the run's, for links with a calibration text of their own; None: the model's.
        level: None: `config.plan.level`.
        done: stages that an earlier run is through with, of which the last one's model is opened.
    """
    level = level or config.plan.level
    tokenizer = tokenizer or config.model.tokenizer()
    data = data or config.data.open(tokenizer)
    task = lookup.get(config.data.task)
    line = stages_of(config)
    found = Plan(capacity=capacity(config), beside=CONTEXT if config.device.kind() == "cuda" else "")
    why = "plan.level=formula was asked for" if level == "formula" else untraceable(config)
    first = line[0]
    attempt(found, "load", lambda: plan_opening(config, data, found))
    if first.fit is not None:
        plan_training(config, first, task, data, found, why)
        if validates(config):
            attempt(found, "validate", lambda: plan_validation(config, task, data, found))
    if config.chain:
        attempt(found, "compress", lambda: plan_links(config, data, tokenizer, found, level, done))
    else:
        attempt(found, "save", lambda: plan_saving(config, task, data, found, level))
        attempt(found, "evaluate", lambda: plan_evaluation(config, task, data, found, level))
        if generates(config, task):
            attempt(found, "generate", lambda: plan_generation(config, task, data, found, level))
    if "save" not in found.open:
        plan_checkpoints(config, found, stage_input.shapes(config, data))
    if config.artifact is None:
        attempt(found, "what goes to disk", lambda: plan_disk(config, first, data, found))
    return found


def attempt(found: Plan, what: str, part: Callable[[], object]) -> None:
    """Plan a part; one that fails is not planned and says so, since a run does without."""
    try:
        part()
    except ConfigError:
        raise
    except Exception as error:  # whatever torch, or somebody's model, makes of tensors without values
        log.info("%s cannot be planned", what, exc_info=error)
        found.open[what] = f"cannot be planned: {first_line(error)}"


def plan_disk(config: RunConfig, stage: Stage, data: DataBundle, found: Plan) -> None:
    """A checkpoint of stage 0's fit if it has one, and the artifact where no link changes it."""
    disk = formula.on_disk(config, adapted(config, stage, stage_input.shapes(config, data)))
    if stage.fit is None:
        del disk["checkpoint"]
    if config.chain:
        del disk["artifact"]
    found.disk |= disk


def plan_opening(config: RunConfig, data: DataBundle, found: Plan) -> None:
    """Stage 0's input as it is built or read, and where no link changes it, its artifact as it is read back."""
    shapes = stage_input.shapes(config, data)
    peaks = [trace_opening(config, data)]
    if not config.chain and opens_in_memory(config):
        peaks.append(held(config.precision.convert(shapes)))
    enter(config, found, "load", "computed", peaks, convolutional(shapes))


def enter(
    config: RunConfig, found: Plan, name: str, source: str, peaks: Sequence[Peak | None], convolutions: bool
) -> None:
    """The largest of `peaks` as a phase, beside what the plan has under that name."""
    there = [peak for peak in (*peaks, found.phases.get(name)) if peak is not None]
    if there:
        most = max(there, key=lambda peak: peak.bytes)
        found.phases[name] = most if isinstance(most, Phase) else known(config, name, most, source, convolutions)


def plan_saving(config: RunConfig, task: Task, data: DataBundle, found: Plan, level: Level) -> None:
    """Stage 0's output as an artifact."""
    if config.device.kind() not in TRACED:
        found.open["save"] = f"what is written is not planned for device={config.device.kind()}"
        return
    model = stage_input.shapes(config, data)
    convolutions = convolutional(model)
    with tracing(config):
        peak = traced_saving(config, faked(model, config.precision.weight_dtype), task, data)
    enter(config, found, "save", "traced" if level == "trace" else "computed", [peak], convolutions)


def plan_checkpoints(config: RunConfig, found: Plan, model: nn.Module) -> None:
    """`last.ckpt` of every fit, beside artifacts: what it keeps is written as it lies there, or as ranks put it
    together."""
    fits = {name: phase for name, phase in found.phases.items() if name.partition(":")[0] == "train"}
    written = [kinds for phase in fits.values() if (kinds := phase.saving or phase.kept)]
    if len(written) < sum(stage.fit is not None for stage in stages_of(config)):
        found.phases.pop("save", None)
        found.open["save"] = "what a fit keeps for its checkpoint is not known"
        return
    writing = [Peak(sum(kinds.values()), kinds, "") for kinds in written]
    computed = any(phase.source == "computed" or name in found.untraced for name, phase in fits.items())
    enter(config, found, "save", "computed" if computed else "traced", writing, convolutional(model))
    if found.capacity is not None and puts_together(config) and config.device.memory is None:
        others = max((sum(kinds.values()) - kinds.get(CHECKPOINT, 0) for kinds in written), default=0)
        spare = found.capacity - int(others * (1 + MARGINS["computed"]))
        found.left["save"] = (config.parallelism.devices - 1) * max(0, spare)


def puts_together(config: RunConfig) -> bool:
    """Whether the first of several processes on a CPU gathers a checkpoint, of which the others hold their parts."""
    return config.device.kind() == "cpu" and config.parallelism.saves in ("gathered", "engine")


def plan_training(config: RunConfig, stage: Stage, task: Task, data: DataBundle, found: Plan, why: str | None) -> None:
    """Stage 0's fit, traced unless `why` says why not."""
    batch = training_batch(data.train, micro_batch_size(config)[0])

    def by(way: Callable[..., Peak], source: str) -> Phase:
        model = adapted(config, stage, stage_input.shapes(config, data))
        peak = way(config, stage, model, task, describe(model), batch)
        return known(config, "train", peak, source, convolutional(model))

    if why is None:
        try:
            found.phases["train"] = by(trace_training, "traced")
            return
        except Exception as error:  # whatever torch, or somebody's model, makes of tensors without values
            log.info("training cannot be traced", exc_info=error)
            why = f"cannot be traced: {first_line(error)}"
    try:
        found.phases["train"] = by(formula.training, "computed")
        found.untraced["train"] = why
    except Exception as error:
        log.info("training cannot be computed", exc_info=error)
        found.open["train"] = f"{why}; cannot be computed: {first_line(error)}"


def plan_evaluation(config: RunConfig, task: Task, data: DataBundle, found: Plan, level: Level) -> None:
    """The evaluation of a model that no link changes: on one device, whoever trained it."""
    model = config.precision.convert(stage_input.shapes(config, data))
    convolutions, in_files = convolutional(model), not opens_in_memory(config)
    peak = trace_evaluation(config, model, task, data, in_files=in_files)
    enter(config, found, "evaluate", source_of(config, level), [peak], convolutions)


def plan_generation(config: RunConfig, task: Task, data: DataBundle, found: Plan, level: Level) -> None:
    """`job=generate` with the artifact of a model that no link changes."""
    model = config.precision.convert(stage_input.shapes(config, data))
    peak = trace_generation(config, model, task)
    enter(config, found, "generate", source_of(config, level), [peak], convolutional(model))


def source_of(config: RunConfig, level: Level) -> str:
    """How an evaluation and a generation are known. They are run on fake tensors at either level, since blocks that are
    alike are computed once; the level's margin is what differs."""
    return "traced" if level == "trace" and config.device.kind() in TRACED else "computed"


def plan_links(
    config: RunConfig, data: DataBundle, tokenizer: Any, found: Plan, level: Level, done: int = 0
) -> nn.Module | None:
    """Enter links that compress, their own fits, and the evaluation of what they leave, which is returned on the meta
    device; None where it is not known."""
    if config.device.kind() not in TRACED:
        why = f"links are not planned for device={config.device.kind()}"
        found.open |= dict.fromkeys(("compress", "evaluate"), why)
        return None
    links = declare_links(config, data, tokenizer) if level == "formula" else None
    if links is None or links.open:  # what no formula is known for
        level, links = "trace", trace_links(config, data, tokenizer, untraceable(config))
    convolutions = convolutional(stage_input.shapes(config, data))
    enter(config, found, "load", "computed", [links.load, links.reads.get(done - 1)], convolutions)
    for phase, peak in links.phases().items():
        computed = phase in links.untraced or (phase == "compress" and links.computed)
        source = "computed" if level == "formula" or computed else "traced"
        found.phases[phase] = known(config, phase, peak, source, convolutions)
    found.open |= links.open
    found.untraced |= links.untraced
    if links.stored is not None:
        found.disk["artifact"] = links.stored
    return links.left


def validates(config: RunConfig) -> bool:
    """Whether stage 0 is evaluated in the middle: one that ends before is not."""
    fit = stages_of(config)[0].fit
    return fit is not None and 0 < config.trainer.evaluate_every <= fit.steps


def plan_validation(config: RunConfig, task: Task, data: DataBundle, found: Plan) -> None:
    """Evaluation in the middle of the fit: beside what the fit keeps between two steps."""
    train = found.phases.get("train")
    if train is not None:
        source = "computed" if "train" in found.untraced else "traced"
        found.phases["validate"] = beside_fit(config, validation(config, task, data, source), train)


def validation(config: RunConfig, task: Task, data: DataBundle, source: str) -> Phase:
    """An evaluation of what stage 0 trains: on one device without what its fit keeps meanwhile, on one of several
    beside that. `source`: of what is known of that fit."""
    stage = stages_of(config)[0]
    model = adapted(config, stage, stage_input.shapes(config, data))
    if config.parallelism.distributed:
        batch = next(iter(evaluation_loader(data.evaluation, config.trainer.evaluation_batch_size)))
        peak = formula.validating(config, stage, model, task, describe(model), batch)
    else:
        peak = trace_validation(config, model, task, data)
    return known(config, "validate", Peak(peak.bytes, peak.kinds, "evaluation"), source, convolutional(model))


def beside_fit(config: RunConfig, bare: Phase, train: Peak) -> Phase:
    """A validation with what the fit of `train` keeps between two steps, but for the gradients, which Lightning lets go
    of before."""
    if config.parallelism.distributed:
        return bare
    there = train.kinds if train.kept is None else train.kept
    beside = {kind: there[kind] for kind in ("optimizer state", WORKSPACES) if kind in there}
    among = bare.kinds.get(WORKSPACES, 0)  # the evaluation's thread is one of the fit's
    return replace(bare, bytes=bare.bytes - among + sum(beside.values()), kinds={**bare.kinds, **beside})


def known(config: RunConfig, phase: str, peak: Peak, source: str, convolutions: bool) -> Phase:
    """The peak of a phase with its margin, corrected by what earlier runs of its kind measured on this machine."""
    margin = max(MARGINS[source], CONVOLUTIONS if convolutions else 0.0)
    narrow = config.device.kind() == "cpu" and config.precision.dtype in ("float16", "bfloat16")
    if narrow and peak.bytes > scratch.LARGEST:
        margin = max(margin, NARROW_CONVOLUTIONS if convolutions else NARROW)
    if phase in ("evaluate", "generate") and any(method.chooses for method in config.chain.values()):
        margin = max(margin, CHOSEN)
    if config.device.kind() == "cuda":
        margin = max(margin, COMPRESSED_ON_GPU if config.chain and phase != "train" else ON_GPU)
    found = Phase(
        peak.bytes, peak.kinds, peak.operator, peak.course, peak.reserved, peak.kept, peak.saving, peak.plain,
        source, margin, below=COMPILED if peak.plain else None,
    )  # fmt: skip
    if not config.plan.calibrate:
        return found
    corrected = calibration.correction(calibration.ratios(calibration.place(), calibration.kind(config, phase)))
    if corrected is None:
        return found
    factor, spread = corrected
    more = round((factor - 1) * peak.bytes)
    kinds = {**peak.kinds, UNSEEN: more}
    return replace(
        found, bytes=peak.bytes + more, kinds=kinds, source="calibrated", margin=spread, factor=factor, below=None
    )


def remember(config: RunConfig, found: Plan, measured: Mapping[str, int | None]) -> None:
    """Keep what a run measured beside its plan, for later plans."""
    ratios = {
        calibration.kind(config, name): held * phase.factor / phase.bytes
        for name, phase in found.phases.items()
        if (held := measured.get(name))
    }
    calibration.remember(calibration.place(), ratios)


def convolutional(model: nn.Module) -> bool:
    return any(isinstance(module, _ConvNd) for module in model.modules())


def capacity(config: RunConfig) -> int | None:
    """Bytes of memory that one device of this config has. Processes on one machine's CPU share its memory."""
    found = config.device.capacity()
    shared = config.device.kind() == "cpu" and config.device.memory is None
    return found // config.parallelism.devices if found is not None and shared else found


def untraceable(config: RunConfig) -> str | None:
    """Why training is not traced; None where it is."""
    if config.parallelism.distributed:
        return f"parallelism={config.parallelism.name}: ranks that work together are not traced"
    if config.device.kind() not in TRACED:
        return f"what runs on {config.device.kind()} is not traced"
    if config.memory.activation_offload != "none" or config.memory.optimizer_offload != "none":
        return "offload is not traced"
    if config.precision.name not in ("full", "mixed"):
        return f"precision={config.precision.label} is not traced"
    return None
