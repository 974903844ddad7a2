"""What `job=plan` shows: bytes at each phase's peak by kind, what is not planned, and a report with the timelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from pipeline.report.markdown import cell
from pipeline.report.markdown import table as markdown_table
from pipeline.report.table import command
from pipeline.report.timeline import draw_timelines
from pipeline.report.units import format_bytes

TOGETHER = "together"
OPERATOR = "in the operator"


def plan_table(plan: Any) -> Table:
    """A column a phase, a row a kind, largest first; the phase that needs most is marked. Operators' names are too long
    for a terminal, and are left to the report."""
    phases = plan.phases
    rows = [row for row in plan_rows(phases) if row[0] != OPERATOR]
    highest = max((phase.bytes for phase in phases.values()), default=0)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("at the peak", no_wrap=True)
    for name in phases:
        table.add_column(name, justify="right")
    for label, *cells in rows:
        if label == TOGETHER:
            table.add_section()
        bold = [label == TOGETHER and phase.bytes == highest for phase in phases.values()]
        table.add_row(label, *(Text(c, style="bold" if b else "") for c, b in zip(cells, bold, strict=True)))
    if notes := plan_notes(plan):
        table.caption = Text("\n".join(notes))
        table.caption_justify = "left"
    return table


def plan_rows(phases: Mapping[str, Any]) -> list[list[str]]:
    """A row a kind, largest first, then what they are together, in which operator, how that is known and how well."""
    named = {kind for phase in phases.values() for kind in phase.kinds}
    kinds = sorted(named, key=lambda kind: (-max(phase.kinds.get(kind, 0) for phase in phases.values()), kind))
    shown = list(phases.values())
    return [
        *([kind, *(format_bytes(phase.kinds.get(kind)) for phase in shown)] for kind in kinds),
        [TOGETHER, *(format_bytes(phase.bytes) for phase in shown)],
        *reserved_rows(shown),
        [OPERATOR, *(phase.operator.removeprefix("aten::") for phase in shown)],
        ["known how", *(phase.source for phase in shown)],
        ["known within", *(within(phase.margin, phase.below) for phase in shown)],
    ]


def within(margin: float, below: float | None = None) -> str:
    """A relative margin, either way; or so much `below`."""
    return f"± {100 * margin:.2g}%" if below is None else f"-{100 * below:.2g} to +{100 * margin:.2g}%"


def reserved_rows(phases: Sequence[Any]) -> list[list[str]]:
    """What CUDA's pool takes from the device, with its margin; no rows where it is not known of any phase."""
    if all(phase.reserved is None for phase in phases):
        return []
    margins = ("-" if phase.reserved is None else within(phase.reserved_margin) for phase in phases)
    return [
        ["reserved by CUDA's pool", *(format_bytes(phase.reserved) for phase in phases)],
        ["reserved within", *margins],
    ]


def plan_notes(plan: Any) -> list[str]:
    """What is not planned, or not traced, and why; bytes on disk."""
    return [
        *(f"{name} is not planned: {why}" for name, why in plan.open.items()),
        *(f"{name} is computed: {why}" for name, why in plan.untraced.items()),
        *([plan.beside] if plan.beside else []),
        *(f"on disk, {name}: {format_bytes(size)}" for name, size in plan.disk.items()),
    ]


def plan_report(plan: Any, run_dir: Path, overrides: Sequence[str]) -> str:
    """The text of report.md of `job=plan`; its plots are drawn into `run_dir`, which has plan.json."""
    lines = ["# Plan", "", "```bash", command(overrides), "```", ""]
    lines += [f"**{cell(plan.verdict())}**", ""] if plan.verdict() else []
    lines += markdown_table(["at the peak", *plan.phases], plan_rows(plan.phases), right=range(1, 1 + len(plan.phases)))
    lines += ["", *(f"- {cell(note)}" for note in plan_notes(plan))]
    for plot in draw_timelines(run_dir / "plan.json", run_dir / "plots").values():
        lines += ["", f"![live memory](plots/{plot.name})"]
    return "\n".join(lines) + "\n"
