"""Out of memory while running: what is said of it, and the next config that needs less and computes the same."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.errors import ConfigError
from pipeline.planner.fit_search import Search
from pipeline.planner.plan import Plan
from pipeline.planner.search import Candidate
from pipeline.report.progress import Progress
from pipeline.report.units import format_bytes
from pipeline.schema import RunConfig

LESS = 0.75
"""Of what was predicted, what the next config may need: how much there was is not known."""


def explained(error: str, phase: str, found: Plan, next_one: Candidate | None) -> str:
    """In one line: where memory ran out, what was planned, and what would need less."""
    said = error.strip().splitlines()[0][:200]
    planned = found.phases.get(phase.partition(":")[0])
    of = "" if found.capacity is None else f" of {format_bytes(found.capacity)}"
    plan = "it was not planned" if planned is None else f"planned were {format_bytes(planned.bytes)}{of}"
    way = "nothing was found that computes the same and needs clearly less"
    if next_one is not None:
        way = f"{' '.join(next_one.changes)} needs less and computes the same"
    return f"out of memory in {phase} ({said}): {plan}; {way}"


def lighter(config: RunConfig, found: Plan, phase: str, run_dir: Path) -> Candidate | None:
    """The fastest config, by prediction, that computes the same and needs clearly less than `phase` did; None: none.

    Only what leaves results as they are is changed; values that the command line sets stay. Of `job=run` alone: the
    search is for a run that trains.
    """
    planned = found.phases.get(phase.partition(":")[0])
    if planned is None or config.job != "run":
        return None
    asked = replace(config.fit, free=(), maximize=None, artifact=None, inference=None, run=False, measure=0)
    wanted = replace(config, job="fit", budget=int(LESS * planned.bytes), fit=asked, resume=False)
    try:
        chosen = Search(wanted, run_dir, Progress({}, "silent")).run()
    except ConfigError:
        return None
    return chosen.best.candidate


def release() -> None:
    """Let go of what a run that failed has left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
