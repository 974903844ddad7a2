"""What `job=fit` shows: the ranked candidates with memory and time of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from pipeline.report.units import format_bytes, format_seconds


def fit_table(rows: Sequence[dict[str, Any]], typed: str = "as typed") -> Table:
    """A row a candidate, best first, as `fit.ranking` of result.json has them."""
    timed = any(row["seconds_measured"] is not None for row in rows)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", justify="right")
    table.add_column("a step, predicted", justify="right")
    if timed:
        table.add_column("timed", justify="right")
    table.add_column("peak", justify="right")
    table.add_column("in")
    table.add_column("known")
    table.add_column("change")
    for number, row in enumerate(rows, 1):
        measured = [format_seconds(row["seconds_measured"])] if timed else []
        style = "bold" if number == 1 else ""
        table.add_row(
            str(number),
            format_seconds(row["seconds_predicted"]),
            *measured,
            format_bytes(row["bytes"]),
            row["phase"],
            row["source"],
            Text(" ".join(row["changes"]) or typed, style=style),
        )
    return table
