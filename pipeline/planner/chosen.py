"""What `job=fit` chose, and from what: as a line to type, an entry of result.json, a recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pipeline.planner import speed
from pipeline.planner.search import Candidate, Looked, Rated
from pipeline.recipes import lock_text
from pipeline.report.table import command
from pipeline.report.units import format_bytes, format_seconds
from pipeline.schema import values_of


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
        """The line to type."""
        return command(self.overrides)

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


def label(candidate: Candidate) -> str:
    """Its changes, short: keys without their group."""
    return ", ".join(re.sub(r"^[\w.]*\.", "", change) for change in candidate.changes) or "as typed"
