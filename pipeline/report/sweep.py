"""What a sweep leaves: one table, results.json, results.csv and pareto.png, collected from the jobs' directories.

Everything is read from disk, so it does not matter which launcher ran the jobs, or where. No torch.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from hydra.experimental.callback import Callback
from rich import box
from rich.table import Table
from rich.text import Text

from pipeline.errors import LeanfitError
from pipeline.report.console import console
from pipeline.report.result import read_result, write_text
from pipeline.report.table import amount, pick, quotient, relative, word
from pipeline.report.units import (
    format_bytes,
    format_quality,
    format_seconds,
    quality_change,
    shorten,
    significant,
)

FACTS = (
    "status",
    "metric",
    "direction",
    "quality_before",
    "quality_after",
    "bytes_before",
    "bytes_after",
    "ratio",
    "speed_unit",
    "speed_before",
    "speed_after",
    "speed_ratio",
    "peak_predicted",
    "peak_measured",
    "peak_phase",
    "chosen",
    "seconds",
    "error",
    "directory",
)
"""The columns of every row beside `job`, `label` and the overrides. `peak_phase`: where most is measured, or if nothing
is, predicted; `chosen`: what `job=fit` changed."""
STATUSES = frozenset({"ok", "failed", "gate"})


def split_override(text: str) -> tuple[str, str]:
    """Key and value of a Hydra override as typed: 'compression=int8', '+a=1', '~group', 'a@b=c'."""
    key, sign, value = text.partition("=")
    deleted = key.startswith("~")
    return key.lstrip("+~") or text, "deleted" if deleted else value if sign else ""


def _overrides(directory: Path) -> list[str]:
    """The job's overrides as Hydra stored them; empty where they cannot be read."""
    try:
        stored = yaml.safe_load((directory / ".hydra" / "overrides.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return []
    return [str(item) for item in stored] if isinstance(stored, list) else []


def _number(directory: Path) -> int | None:
    """The job's number: Hydra's own record of it, else its directory's name."""
    try:
        stored = yaml.safe_load((directory / ".hydra" / "hydra.yaml").read_text(encoding="utf-8"))
        found = pick(stored, "hydra", "job", "num")
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        found = None
    if isinstance(found, int) and not isinstance(found, bool):
        return found
    return int(directory.name) if directory.name.isdecimal() and directory.name.isascii() else None


def job_directories(sweep_dir: Path) -> list[Path]:
    """Directories of jobs below `sweep_dir`, by job number, at whatever depth `hydra.sweep.subdir` put them."""
    found = []
    for here, folders, files in os.walk(sweep_dir):
        path = Path(here)
        if path != sweep_dir and (".hydra" in folders or "result.json" in files):
            found.append(path)
            folders.clear()
    numbers = {path: _number(path) for path in found}
    return sorted(found, key=lambda path: (numbers[path] is None, numbers[path] or 0, str(path)))


def _facts(directory: Path) -> dict[str, Any]:
    """What the job's result.json says; a missing or broken one is a failed job with a message."""
    facts: dict[str, Any] = dict.fromkeys(FACTS)
    facts["directory"] = str(directory)
    try:
        result = read_result(directory / "result.json")
    except LeanfitError as error:
        missing = not (directory / "result.json").exists()
        facts["status"] = "failed"
        facts["error"] = "it left no result.json: it was killed, or never started" if missing else str(error)
        return facts
    status = word(result, "status")
    speed_before, speed_after = amount(result, "speed", "before"), amount(result, "speed", "after")
    predicted, measured = _peak(result, "predicted"), _peak(result, "measured")
    facts |= {
        "status": status if status in STATUSES else "failed",
        "metric": word(result, "quality", "metric") or None,
        "direction": word(result, "quality", "direction") or None,
        "quality_before": amount(result, "quality", "before"),
        "quality_after": amount(result, "quality", "after"),
        "bytes_before": amount(result, "size", "bytes_before"),
        "bytes_after": amount(result, "size", "bytes_after"),
        "ratio": amount(result, "size", "ratio"),
        "speed_unit": word(result, "speed", "unit") or None,
        "speed_before": speed_before,
        "speed_after": speed_after,
        "speed_ratio": amount(result, "speed", "ratio") or quotient(speed_after, speed_before),
        "peak_predicted": predicted and predicted[0],
        "peak_measured": measured and measured[0],
        "peak_phase": (measured or predicted or (0, None))[1],
        "chosen": _chosen(result),
        "seconds": amount(result, "seconds"),
        "error": word(result, "error", "message") or None,
    }
    if status not in STATUSES:
        facts["error"] = f"result.json says status {pick(result, 'status')!r}, not one of {', '.join(sorted(STATUSES))}"
    return facts


def _peak(result: Any, source: str) -> tuple[float, str] | None:
    """Bytes of the phase that takes most, as predicted or measured, and its name; None where none is known."""
    phases = pick(result, "memory", source)
    names = phases if isinstance(phases, dict) else {}
    return max(((held, name) for name in names if (held := amount(phases, name)) is not None), default=None)


def _chosen(result: Any) -> str | None:
    """What `job=fit` changed for the best that it found."""
    ranking = pick(result, "fit", "ranking")
    changes = pick(ranking[0], "changes") if isinstance(ranking, list) and ranking else None
    return " ".join(map(str, changes)) or "as it is" if isinstance(changes, list) else None


def _label(differing: Mapping[str, str]) -> str:
    """A job's name in a plot: 'int8 bf16-mixed', 'int8 lr=0.001'."""
    parts = []
    for key, value in differing.items():
        short = value.strip("[]'\"").replace(",", "+")
        parts.append(f"{key.rsplit('.', 1)[-1]}={short}" if "." in key else short)
    return " ".join(part for part in parts if part)


def collect(sweep_dir: str | Path) -> list[dict[str, Any]]:
    """One row a job: its number, the overrides that differ within the sweep as columns, `label`, and `FACTS`.

    An override whose key is also the name of a fact gets the column `override:KEY`. Sizes in bytes, times in seconds.
    """
    directories = job_directories(Path(sweep_dir))
    typed = [dict(map(split_override, _overrides(directory))) for directory in directories]
    every = dict.fromkeys(key for given in typed for key in given)
    keys = [key for key in every if len({given.get(key) for given in typed}) > 1]
    rows = []
    for position, (directory, given) in enumerate(zip(directories, typed, strict=True)):
        number = _number(directory)
        differing = {key: given[key] for key in keys if key in given}
        columns = {f"override:{key}" if key in (*FACTS, "job", "label") else key: given.get(key) for key in keys}
        row = {"job": position if number is None else number, **columns}
        rows.append(row | {"label": _label(differing) or f"#{row['job']}"} | _facts(directory))
    return rows


def override_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of `rows` that are overrides."""
    known = {*FACTS, "job", "label"}
    return [key for key in dict.fromkeys(key for row in rows for key in row) if key not in known]


def write_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """`rows` as CSV text; what is not known is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["job", *override_columns(rows), "label", *FACTS], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """All jobs in one table of at most 100 columns: what came out, or of plans what they will take."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("#", justify="right", no_wrap=True)
    keys = override_columns(rows)
    widths = [max([len(key.rsplit(".", 1)[-1]), *(len(row.get(key) or "") for row in rows)]) for key in keys]
    together = len(keys) > 3 or sum(widths) + 2 * len(widths) > 34
    for name in ["overrides"] if together else keys:
        table.add_column(Text(name if together else name.rsplit(".", 1)[-1]), overflow="fold")
    table.add_column("", no_wrap=True)
    results = ("quality_after", "bytes_after", "speed_ratio")
    planned = any(row.get("peak_predicted") for row in rows) and not any(
        row.get(key) for row in rows for key in results
    )
    cells = _planned if planned else _came_out
    metrics = {str(row["metric"]) for row in rows if row.get("metric")}
    quality = metrics.pop() if len(metrics) == 1 else "quality"
    found = ["chosen"] if any(row.get("chosen") for row in rows) else []
    columns = ["peak", "in", *found] if planned else [quality, "change", "size", "ratio", "speed"]
    for name in [*columns, "time"]:
        justify: Literal["left", "right"] = "left" if name in ("change", "in", "chosen") else "right"
        table.add_column(name, justify=justify, overflow="fold")
    for row in rows:
        typed = [f"{key.rsplit('.', 1)[-1]}={row[key]}" for key in keys if row.get(key) is not None]
        status, seconds = str(row.get("status")), row.get("seconds")
        table.add_row(
            str(row.get("job")),
            *([Text(" ".join(typed))] if together else [Text(row.get(key) or "") for key in keys]),
            Text(status, style="green" if status == "ok" else "bold red"),
            *cells(row)[: len(columns)],
            "-" if seconds is None else format_seconds(seconds),
        )
    return table


def _came_out(row: Mapping[str, Any]) -> tuple[str | Text, ...]:
    metric, after = row.get("metric") or "", row.get("quality_after")
    change = quality_change(metric, row.get("direction") or "", row.get("quality_before"), after)
    speed, ratio = row.get("speed_ratio"), row.get("ratio")
    return (
        format_quality(metric, after),
        Text(change),
        format_bytes(row.get("bytes_after")),
        "-" if ratio is None else f"{significant(ratio)}x",
        "-" if speed is None else f"{significant(speed)}x",
    )


def _planned(row: Mapping[str, Any]) -> tuple[str | Text, ...]:
    return format_bytes(row.get("peak_predicted")), row.get("peak_phase") or "", Text(row.get("chosen") or "")


def sweep_lines(rows: Sequence[Mapping[str, Any]], sweep_dir: Path, width: int = 100) -> Iterator[str]:
    """What follows the table: why jobs failed, and where the results are."""
    for row in rows:
        if row.get("status") != "ok":
            said = f"#{row.get('job')} {row.get('status')}: {row.get('error') or 'no message was left'}"
            yield shorten(said, width)
    failed = sum(row.get("status") != "ok" for row in rows)
    if rows:
        yield f"{len(rows) - failed} of {len(rows)} jobs ok"
    for name in ("results.json", "results.csv", "pareto.png"):
        if (sweep_dir / name).exists():
            yield relative(sweep_dir / name)


def finish(sweep_dir: str | Path) -> list[dict[str, Any]]:
    """Collect a sweep; write results.json, results.csv and, where there is a point, pareto.png; print the table."""
    sweep_dir = Path(sweep_dir)
    rows = collect(sweep_dir)
    write_text(sweep_dir / "results.json", json.dumps(rows, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(sweep_dir / "results.csv", write_csv(rows))
    try:
        from pipeline.report.plots import pareto

        pareto(rows, sweep_dir / "pareto.png")
    except Exception as error:
        # A plot is never worth the numbers: they are on disk already, and the table is still to come.
        console().print(Text(f"pareto.png could not be drawn: {type(error).__name__}: {error}"), soft_wrap=True)
    if rows:
        console().print(sweep_table(rows))
    for line in sweep_lines(rows, sweep_dir, console().width):
        console().print(Text(line), soft_wrap=True)
    return rows


class SweepCallback(Callback):
    """Hydra callback that ends a sweep with its table and files. It never raises: the exit code is the program's."""

    def on_multirun_end(self, config: Any, **kwargs: Any) -> None:
        try:
            finish(str(config.hydra.sweep.dir))
        except Exception as error:
            logging.getLogger(__name__).error("the sweep's results could not be collected: %s", error)
