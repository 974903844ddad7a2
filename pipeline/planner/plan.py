"""What a run will need in memory, phase by phase, before anything is allocated: `job=plan`, and each run beforehand.

`train` and `evaluate` are traced on fake tensors (see `training`). What cannot be traced yet is named in `open`, and is
not guessed: ranks that share a model, links that compress, and devices other than the CPU.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from pipeline import stage_input
from pipeline.chain import Stage
from pipeline.data.base import DataBundle
from pipeline.data.loader import evaluation_loader
from pipeline.fitting import micro_batch_size
from pipeline.models.architecture import describe
from pipeline.planner.evaluation import trace_evaluation
from pipeline.planner.live import Peak
from pipeline.planner.training import trace_training
from pipeline.schema import RunConfig
from pipeline.tasks import lookup
from pipeline.walk import stages_of


@dataclass(frozen=True)
class Phase(Peak):
    """A peak on one device, and how it is known."""

    source: str = "traced"


@dataclass(frozen=True)
class Plan:
    """Predicted peaks. `open`: {phase: why it is not predicted}."""

    phases: dict[str, Phase] = field(default_factory=dict)
    open: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps({"schema": 1, **asdict(self)}, indent=2) + "\n", encoding="utf-8")


def plan(config: RunConfig, data: DataBundle) -> Plan:
    """The plan of `job=run` with this config. Takes seconds; allocates no tensor of the model's size."""
    found = Plan()
    task = lookup.get(config.data.task)
    first = stages_of(config)[0]
    if first.fit is not None:
        if why := untraceable(config):
            found.open["train"] = why
        else:
            model = adapted(config, first, on_meta(config, data))
            micro, _ = micro_batch_size(config)
            batch = next(iter(evaluation_loader(data.train, micro)))
            traced = trace_training(config, first, model, task, describe(model), batch)
            found.phases["train"] = Phase(**vars(traced))
    if config.chain:
        found.open["compress"] = "links that compress are not planned yet"
        found.open["evaluate"] = "the artifact is evaluated as the chain leaves it, which is not planned yet"
    elif config.device.kind() != "cpu":
        found.open["evaluate"] = "peaks of a GPU are not planned yet"
    else:
        traced = trace_evaluation(config, on_meta(config, data), task, data)
        found.phases["evaluate"] = Phase(**vars(traced))
    return found


def on_meta(config: RunConfig, data: DataBundle) -> nn.Module:
    with torch.device("meta"):
        return config.model.build(data.spec)


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
