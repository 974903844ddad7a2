"""What runs on this machine measured beside their plans, for later plans: one file for each user.

Kernels take scratch space that no trace of operators sees (a CPU's are tried, small ones). How much depends on device,
versions and kind of model; so `ratios` keeps measured over predicted by these, and a plan of the same kind is corrected
by their median, and says by how much they differ.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Mapping
from os import environ
from pathlib import Path
from typing import Any

from pipeline.report.result import write_text
from pipeline.schema import RunConfig
from pipeline.versions import versions

log = logging.getLogger(__name__)
KEPT = 20
"""Runs of one kind that are remembered, the latest."""
NEEDED = 3
"""Runs of one kind before they count."""
ON_RANKS = ("train", "validate", "save")
"""Phases in which ranks hold what the choice of parallelism has them hold, which one device says nothing about."""
NEGLIGIBLE = 0.01
"""A correction smaller than this is none."""


def place() -> Path:
    return Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "leanfit" / "calibration.json"


def kind(config: RunConfig, phase: str) -> str:
    """What runs must have in common to say something about each other."""
    links = f" {','.join(method.name for method in config.chain.values())}" if phase != "train" and config.chain else ""
    spread = f" under {config.parallelism.name}" if config.parallelism.distributed and phase in ON_RANKS else ""
    device = config.device.description() if not config.device.problems(1) else config.device.kind()
    here = f"{device}, torch {versions()['torch']}"
    return f"{phase} of {config.model.name} in {config.precision.label}{links}{spread} on {here}"


def ratios(file: Path, kind: str) -> list[float]:
    """Measured over predicted of earlier runs of this kind; none where the file is not there or damaged."""
    return _ratios(_read(file).get(kind))


def _ratios(found: Any) -> list[float]:
    """Those that are some: a damaged file may hold anything, NaN too."""
    given = found if isinstance(found, list) else []
    return [ratio for ratio in given if isinstance(ratio, float) and 0 < ratio < math.inf]


def remember(file: Path, ratio_of: Mapping[str, float]) -> None:
    """Add one run's ratios, by kind. Of two runs that end at once one may be forgotten, and all where nothing can be
    written there: the run is done, and not lost for that."""
    known = _read(file)
    for name, ratio in ratio_of.items():
        known[name] = [*_ratios(known.get(name)), ratio][-KEPT:]
    try:
        write_text(file, json.dumps(known, indent=1) + "\n")
    except OSError as error:
        log.warning("%s cannot be written: %s", file, error)


def correction(found: list[float]) -> tuple[float, float] | None:
    """(factor for a prediction, largest relative distance of a run from it, or what is taken for none); None: too few
    runs, or no need."""
    if len(found) < NEEDED:
        return None
    factor = statistics.median(found)
    if abs(factor - 1) < NEGLIGIBLE:
        return None
    return factor, max(NEGLIGIBLE, *(abs(ratio / factor - 1) for ratio in found))


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # the last: brackets without end
        return {}
    return found if isinstance(found, dict) else {}
