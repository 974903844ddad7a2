"""What a run will need in memory, phase by phase, before anything is allocated: `job=plan`, and each run beforehand.

`train` and `evaluate` are traced on fake tensors (see `training`). What cannot be traced yet is named in `open`, and is
not guessed: ranks that share a model, links that compress, and devices other than the CPU.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from pipeline import stage_input
from pipeline.chain import Stage
from pipeline.data.base import DataBundle
from pipeline.data.loader import evaluation_loader
from pipeline.fitting import micro_batch_size
from pipeline.models.architecture import describe
from pipeline.planner import calibration
from pipeline.planner.evaluation import trace_evaluation
from pipeline.planner.live import Peak
from pipeline.planner.training import trace_training
from pipeline.report.units import format_bytes
from pipeline.schema import RunConfig
from pipeline.tasks import lookup
from pipeline.walk import stages_of


MARGINS = {"traced": 0.01, "computed": 0.1}
"""How far off predictions were at most, transformers without scratch space of kernels: benchmarks/README.md."""
CONVOLUTIONS = 0.05
"""And where there are convolutions, whose kernels take scratch space that is not traced."""
UNSEEN = "kernels' scratch space"


@dataclass(frozen=True)
class Phase(Peak):
    """A peak on one device, how it is known ("traced", "computed", "calibrated"), and how far off it may be.

    `margin`: relative, either way. `factor`: what it was corrected by, from earlier runs on this machine.
    """

    source: str = "traced"
    margin: float = MARGINS["traced"]
    factor: float = 1.0


@dataclass
class Plan:
    """Predicted peaks. `open`: {phase: why it is not predicted}. `capacity`: memory of one device, None: not known."""

    phases: dict[str, Phase] = field(default_factory=dict)
    open: dict[str, str] = field(default_factory=dict)
    capacity: int | None = None

    @property
    def fits(self) -> bool | None:
        """Whether every phase fits in `capacity`; None where that is not known."""
        if self.capacity is None or not self.phases:
            return None
        return self.binding()[1].bytes <= self.capacity

    def binding(self) -> tuple[str, Phase]:
        """The phase that needs most."""
        return max(self.phases.items(), key=lambda phase: phase[1].bytes)

    def verdict(self) -> str:
        """In one line whether it fits, and what it is made of where it needs most."""
        if self.capacity is None or self.fits is None:
            return ""
        name, peak = self.binding()
        most = sorted(peak.kinds.items(), key=lambda kind: -kind[1])[:3]
        parts = ", ".join(f"{kind} {format_bytes(held)}" for kind, held in most)
        said = f"{name} needs {format_bytes(peak.bytes)} of {format_bytes(self.capacity)} ({parts})"
        short = peak.bytes - self.capacity
        return f"fits: {said}" if self.fits else f"does not fit by {format_bytes(short)}: {said}"

    def write(self, path: Path) -> None:
        text = json.dumps({"schema": 1, **asdict(self), "fits": self.fits}, indent=2)
        flat = re.sub(r"\[[\d,\s]+\]", lambda numbers: "".join(numbers[0].split()), text)  # a list a line
        path.write_text(flat + "\n", encoding="utf-8")


def plan(config: RunConfig, data: DataBundle) -> Plan:
    """The plan of `job=run` or `compress` with this config. Takes seconds; allocates no tensor of the model's size."""
    found = Plan(capacity=capacity(config))
    task = lookup.get(config.data.task)
    first = stages_of(config)[0]
    if first.fit is not None:
        if why := untraceable(config):
            found.open["train"] = why
        else:
            model = adapted(config, first, stage_input.shapes(config, data))
            micro, _ = micro_batch_size(config)
            batch = next(iter(evaluation_loader(data.train, micro)))
            traced = trace_training(config, first, model, task, describe(model), batch)
            found.phases["train"] = known(config, "train", traced, "traced", convolutional(model))
    if config.chain:
        found.open["compress"] = "links that compress are not planned yet"
        found.open["evaluate"] = "the artifact is evaluated as the chain leaves it, which is not planned yet"
    elif config.device.kind() != "cpu":
        found.open["evaluate"] = "peaks of a GPU are not planned yet"
    else:
        model = stage_input.shapes(config, data)
        traced = trace_evaluation(config, model, task, data)
        found.phases["evaluate"] = known(config, "evaluate", traced, "traced", convolutional(model))
    return found


def known(config: RunConfig, phase: str, peak: Peak, source: str, convolutions: bool) -> Phase:
    """The peak of a phase with its margin, corrected by what earlier runs of its kind measured on this machine."""
    margin = max(MARGINS[source], CONVOLUTIONS if convolutions else 0.0)
    found = Phase(peak.bytes, peak.kinds, peak.operator, peak.course, source, margin)
    if not config.plan.calibrate:
        return found
    corrected = calibration.correction(calibration.ratios(calibration.place(), calibration.kind(config, phase)))
    if corrected is None:
        return found
    factor, spread = corrected
    more = round((factor - 1) * peak.bytes)
    return Phase(
        peak.bytes + more, {**peak.kinds, UNSEEN: more}, peak.operator, peak.course, "calibrated", spread, factor
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


def adapted(config: RunConfig, stage: Stage, model: nn.Module) -> nn.Module:
    """What stage 0 trains: `model`, with the adapters if there are any."""
    with torch.device("meta"):
        return stage_input.adapted(config, stage, model, stage_input.context_of(config, stage, model))


def untraceable(config: RunConfig) -> str | None:
    """Why training is not traced; None where it is."""
    if config.parallelism.distributed:
        return f"parallelism={config.parallelism.name}: ranks that work together are not planned yet"
    if config.device.kind() != "cpu":
        return "peaks of a GPU are not planned yet"
    if stage_input.link_under_adapters(config) is not None:
        return f"adapter={config.adapter.name} beside a compressed base is not planned yet"
    if config.trainer.compile:
        return "compiled blocks are not planned yet"
    if config.memory.activation_offload != "none" or config.memory.optimizer_offload != "none":
        return "offload is not planned yet"
    if config.precision.name not in ("full", "mixed"):
        return f"precision={config.precision.label} is not planned yet"
    return None
