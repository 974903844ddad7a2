"""metrics.csv as a file: its columns, reading it whole or torn, and cutting it back to the step a fit goes on from."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import LeanfitError

COLUMNS = ("step", "stage", "loss", "lr", "tokens_per_second", "memory")


class Row(NamedTuple):
    """A line of metrics.csv; what could not be measured is None, an empty cell."""

    step: int
    stage: str
    loss: float | None
    lr: float | None
    tokens_per_second: float | None
    memory: int | None


def read_metrics(path: str | Path) -> list[Row]:
    """Every whole row of a metrics.csv; a torn last line (a killed process) is left out.

    Raises:
        LeanfitError: the file has other columns.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1].replace("\0", "")  # which csv does not read before Python 3.11
    lines = list(csv.reader(io.StringIO(whole)))
    if not lines:
        return []
    if tuple(lines[0]) != COLUMNS:
        raise LeanfitError(f"{path}: its columns are {', '.join(lines[0])}, not {', '.join(COLUMNS)}; move it away")
    rows = []
    for cells in lines[1:]:
        try:
            step, stage, *values = cells
            loss, lr, rate, memory = (float(value) if value else None for value in values)
            rows.append(Row(int(step), stage, loss, lr, rate, None if memory is None else int(memory)))
        except (ValueError, OverflowError):
            continue
    return rows


def format_rows(rows: Sequence[Row], header: bool) -> str:
    """CSV lines of `rows`. Floats are written in full, so that what is read back is equal."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(COLUMNS)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    return text.getvalue()


def keep_until(rows: Sequence[Row], stage: str, step: int) -> list[Row]:
    """What stays when `stage` goes on after `step`: earlier stages and its own rows so far, nothing later."""
    own = [position for position, row in enumerate(rows) if row.stage == stage]
    if not own:
        return list(rows)
    stale = next((position for position in own if rows[position].step > step), own[-1] + 1)
    return list(rows[:stale])
