"""The table of `job=plan`: bytes at each phase's peak by kind, and what is not planned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from pipeline.report.units import format_bytes


def plan_table(phases: Mapping[str, Any], unplanned: Mapping[str, str]) -> Table:
    """A column a phase, a row a kind, largest first; the phase that needs most is marked."""
    highest = max((phase.bytes for phase in phases.values()), default=0)
    named = {kind for phase in phases.values() for kind in phase.kinds}
    kinds = sorted(named, key=lambda kind: (-max(phase.kinds.get(kind, 0) for phase in phases.values()), kind))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("at the peak")
    for name in phases:
        table.add_column(name, justify="right")
    for kind in kinds:
        table.add_row(kind, *(format_bytes(phase.kinds.get(kind)) for phase in phases.values()))
    table.add_section()
    totals = [
        Text(format_bytes(phase.bytes), style="bold" if phase.bytes == highest else "") for phase in phases.values()
    ]
    table.add_row("together", *totals)
    table.add_row("in the operator", *(phase.operator.removeprefix("aten::") for phase in phases.values()))
    table.add_row("how known", *(phase.source for phase in phases.values()))
    if unplanned:
        table.caption = Text("\n".join(f"{name}: {why}" for name, why in unplanned.items()))
        table.caption_justify = "left"
    return table
