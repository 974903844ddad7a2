"""`job=fit`: searches, shows what was found, and leaves the best as a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.planner.chosen import label
from pipeline.planner.fit_search import Search
from pipeline.report.console import console, mode
from pipeline.report.fit_table import fit_table
from pipeline.report.plots import Point, memory_against_speed
from pipeline.report.progress import Progress
from pipeline.report.result import write_text
from pipeline.report.table import composer, setting
from pipeline.schema import RunConfig

RECIPE = "fit.recipe.yaml"
LABELLED = 6
"""Points of the plot that are named."""


def fit(config: RunConfig, run_dir: Path, result: dict[str, Any]) -> RunConfig:
    """Search, show what was found, leave the best as a recipe; returns its config, which runs as `job=run`.

    Raises:
        ConfigError: what keeps the typed config from running; or nothing fits.
    """
    with Progress({}, mode(console(), config.sweep)) as progress:
        chosen = Search(config, run_dir, progress).run()
    best = chosen.best
    result["fit"] = chosen.record()
    if best.name in result["memory"]["predicted"]:
        result["memory"]["predicted"][best.name] = best.phase.bytes
    write_text(run_dir / RECIPE, chosen.recipe())
    batch = config.trainer.batch_size
    points = [
        Point(label(one.candidate) if one in chosen.ranked[:LABELLED] else "",
              one.phase.bytes, batch / chosen.seconds(one))
        for one in chosen.points() if one.seconds
    ]  # fmt: skip
    if points:  # where nothing trains, no step takes time
        memory_against_speed(points, "samples/s", chosen.budget, run_dir / "pareto.png")
    if not config.sweep:
        console().print(fit_table(result["fit"]["ranking"]))
        for phase, why in chosen.open.items():
            console().print(f"not predicted: {phase}: {why}", soft_wrap=True, markup=False)
        recipe = f"{composer()} {setting('recipe', str(run_dir / RECIPE))}"
        for line in (chosen.said(), f"  {chosen.command()}", f"  {recipe}"):
            console().print(line, soft_wrap=True, markup=False)
    return best.candidate.config
