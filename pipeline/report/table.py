"""What a run prints when it ends: the closing table, the last lines, and the one line a job of a sweep. No torch.

A result may be incomplete (a failed run, another job) or damaged: what is not there is left out, never invented.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from pipeline.report.units import (
    format_bytes,
    format_count,
    format_error,
    format_quality,
    format_seconds,
    number,
    quality_change,
    shorten,
    significant,
    times,
)

MANY = 0.1
"""Of the steps of a fit."""
LINE_WIDTH = 100


def pick(result: Any, *keys: str) -> Any:
    """The value under nested keys, or None where any of them is missing."""
    for key in keys:
        if not isinstance(result, Mapping):
            return None
        result = result.get(key)
    return result


def amount(result: Any, *keys: str) -> float | None:
    """As `pick`, for a finite number."""
    return number(pick(result, *keys))


def word(result: Any, *keys: str) -> str:
    """As `pick`, for a text; empty where it is missing."""
    value = pick(result, *keys)
    return value if isinstance(value, str) else ""


def quotient(top: float | None, bottom: float | None) -> float | None:
    return top / bottom if top is not None and bottom else None


class Row(NamedTuple):
    """One line of before and after; `group` separates blocks."""

    label: str
    before: str
    after: str
    change: str
    group: int


def links_of(result: Mapping[str, Any]) -> list[Any]:
    """The links of a result, which may be incomplete or damaged."""
    stages = pick(result, "stages")
    return stages if isinstance(stages, list) else []


def link_fits(result: Mapping[str, Any]) -> list[tuple[str, tuple[float | None, float | None]]]:
    """(name, (predicted peak, measured peak)) of each link that had a fit of its own."""
    return [
        (word(link, "name"), (amount(link, "memory", "train_predicted"), amount(link, "memory", "train")))
        for link in links_of(result)
        if pick(link, "train") is not None
    ]


def much_skipped(result: Mapping[str, Any]) -> list[str]:
    """A line for each fit of which the loss scaler skipped more steps than it needs to find its scale."""
    lines = []
    for name, fitted in [("training", result), *((word(link, "name"), link) for link in links_of(result))]:
        skipped, steps = amount(fitted, "train", "skipped_steps"), amount(fitted, "train", "steps")
        if skipped and steps and skipped > MANY * steps:
            count = f"{skipped:.0f} of {steps:.0f} steps"
            lines.append(f"{name}: {count} changed nothing, since gradients overflowed at the loss scale of the time")
    return lines


def comparison(result: Mapping[str, Any]) -> list[Row]:
    """Before, after and change of everything the result knows; rows without any value are left out."""
    rows: list[Row] = []

    def add(group: int, label: str, before: str, after: str, change: str) -> None:
        if (before, after) != ("-", "-"):
            rows.append(Row(label, before, after, change, group))

    metric, direction = word(result, "quality", "metric"), word(result, "quality", "direction")
    before, after = amount(result, "quality", "before"), amount(result, "quality", "after")
    add(
        0,
        metric or "quality",
        format_quality(metric, before),
        format_quality(metric, after),
        quality_change(metric, direction, before, after),
    )
    before, after = amount(result, "size", "bytes_before"), amount(result, "size", "bytes_after")
    ratio = amount(result, "size", "ratio") or quotient(before, after)
    change = times(ratio, "smaller", "larger", "the same size")
    float32 = amount(result, "size", "ratio_float32")
    if float32 is not None and ratio and abs(float32 / ratio - 1) > 0.02:
        change += f" ({significant(float32)}x against float32)"
    add(1, "bytes on disk", format_bytes(before), format_bytes(after), change)
    before, after = amount(result, "size", "parameters_before"), amount(result, "size", "parameters_after")
    add(
        1,
        "parameters",
        format_count(before),
        format_count(after),
        times(quotient(before, after), "fewer", "more", "the same"),
    )
    nonzero = amount(result, "size", "nonzero_after")
    share = quotient(nonzero, after)
    add(
        1,
        "of them nonzero",
        "-",
        format_count(nonzero),
        "" if share is None else f"{100 * (1 - share):.1f}% zero" if share < 0.9995 else "dense",
    )

    unit = word(result, "speed", "unit")
    before, after = amount(result, "speed", "before"), amount(result, "speed", "after")
    ratio = amount(result, "speed", "ratio") or quotient(after, before)
    change = times(ratio, "faster", "slower", "the same speed")
    add(2, unit or "speed", format_count(before), format_count(after), change)
    before, after = amount(result, "speed", "latency_before"), amount(result, "speed", "latency_after")
    batch = amount(result, "speed", "batch_size")
    add(
        2,
        "latency" if batch is None else f"latency, batch {batch:.0f}",
        format_seconds(before),
        format_seconds(after),
        times(quotient(before, after), "shorter", "longer", "the same"),
    )
    training, compression, evaluation = (
        (amount(result, "memory", "predicted", phase), amount(result, "memory", "measured", phase))
        for phase in ("train", "compress", "evaluate")
    )
    peaks = [
        ("training", training), *((f"training: {name}", peak) for name, peak in link_fits(result)),
        ("compression", compression), ("evaluation", evaluation),
    ]  # fmt: skip
    for label, (predicted, measured) in peaks:
        error = quotient(predicted, measured)
        change = "measured" if predicted is None else "planned"
        if error is not None:
            change = f"plan off by {format_error(error)}"
        before_text = "-" if predicted is None else f"{format_bytes(predicted)} plan"
        add(3, f"peak memory, {label}", before_text, format_bytes(measured), change)
    return rows


def held_out(result: Mapping[str, Any]) -> str:
    """What quality is counted over: tokens or samples."""
    unit = word(result, "speed", "unit") or ("tokens/s" if word(result, "quality", "metric") == "perplexity" else "")
    return "tokens" if unit == "tokens/s" else "samples"


def _caption(result: Mapping[str, Any]) -> str:
    metric, n = word(result, "quality", "metric"), amount(result, "quality", "n")
    parts = []
    if n is not None:
        parts.append(f"{metric} on {n:,.0f} held-out {held_out(result)}")
    baseline = amount(result, "quality", "baseline")
    if baseline is not None:
        parts.append(f"a model that learned nothing: {format_quality(metric, baseline)}")
    return "; ".join(parts)


def closing_table(result: Mapping[str, Any]) -> Table:
    """Before, after, change; at most 100 columns, and folding below that."""
    caption = Text(_caption(result))
    table = Table(
        box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", pad_edge=False, min_width=len(caption) + 1
    )
    table.add_column("", overflow="fold")
    for name in ("before", "after"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("change", overflow="fold")
    rows = comparison(result)
    for position, row in enumerate(rows):
        last = position + 1 == len(rows) or rows[position + 1].group != row.group
        bad = any(sign in row.change for sign in ("worse", "slower", "larger", "longer", "more"))
        style = "yellow" if bad else "green" if any(w in row.change for w in ("smaller", "faster", "shorter")) else ""
        cells = (Text(row.label), Text(row.before), Text(row.after), Text(row.change, style=style))
        table.add_row(*cells, end_section=last and position + 1 < len(rows))
    return table


def relative(path: str | Path) -> str:
    """`path` seen from the working directory where it lies below it, else in full."""
    full = Path(os.path.abspath(path))
    try:
        return str(full.relative_to(Path.cwd())) or "."
    except (ValueError, OSError):
        return str(full)


def program() -> str:
    """How this program was called: `leanfit`, or `python run.py` in a checkout."""
    return "leanfit" if Path(sys.argv[0]).name == "leanfit" else "python run.py"


def composer() -> str:
    """`program` with the folders of choices that it was given: for a line whose config is composed anew."""
    given = [shlex.quote(flag) for flag in sys.argv[1:] if flag.startswith("--config-")]
    return " ".join([program(), *given])


def setting(key: str, value: str) -> str:
    """`key=value` for a shell, quoted where it must be."""
    return f"{key}={shlex.quote(value)}"


def command(overrides: Sequence[str]) -> str:
    """The command line that these overrides were typed as."""
    return " ".join([composer(), *(shlex.quote(str(item)) for item in overrides)])


def artifact_path(result: Mapping[str, Any], run_dir: str | Path) -> Path | None:
    """Where the artifact is: as recorded, a relative path seen from the run directory first."""
    recorded = word(result, "artifact", "path")
    if not recorded:
        return None
    inside = Path(run_dir) / recorded
    return inside if inside.exists() or not Path(recorded).exists() else Path(recorded)


def next_command(result: Mapping[str, Any], run_dir: str | Path) -> str:
    """What a user would type next, ready for the shell; empty where there is nothing to do."""
    artifact = artifact_path(result, run_dir)
    if artifact is None:
        return ""
    where = setting("artifact", relative(artifact))
    if word(result, "speed", "unit") == "tokens/s" or word(result, "quality", "metric") == "perplexity":
        prompt = "def " if pick(result, "choices", "data") == "pystdlib" else "The "
        if word(result, "job") != "generate":
            return f"{program()} job=generate {where} {setting('prompt', prompt)}"
    job = "verify" if word(result, "job") == "evaluate" else "evaluate"
    return f"{program()} job={job} {where}"


def receipt(result: Mapping[str, Any]) -> str:
    """One sentence: was the artifact loaded in a fresh process, and did it give the same outputs."""
    ok, difference = pick(result, "artifact", "reload", "ok"), amount(result, "artifact", "reload", "max_abs_diff")
    if not isinstance(ok, bool):
        return ""
    size = "" if difference is None else f", largest difference {significant(difference, 2)}"
    if ok:
        return f"reloaded in a fresh process: same outputs{size}"
    if difference is None:
        return "NOT given: outputs could not be compared"
    return f"reloaded in a fresh process: NOT the same model{size}"


def closing_lines(result: Mapping[str, Any], run_dir: str | Path) -> list[str]:
    """The last lines of a run: what went wrong if anything did, where things are, the receipt, what to type next."""
    lines = []
    status, message = word(result, "status"), word(result, "error", "message")
    if status != "ok":
        label = {"gate": "not accepted", "failed": "failed"}.get(status, "status unknown")
        lines.append(f"{label}: {message or 'no message was left'}")
    lines += much_skipped(result)
    artifact = artifact_path(result, run_dir)
    if artifact is not None:
        lines.append(f"artifact  {relative(artifact)}")
    if proof := receipt(result):
        lines.append(f"receipt   {proof}")
    report, log = Path(run_dir) / "report.md", Path(run_dir) / "run.log"
    if report.exists():
        lines.append(f"report    {relative(report)}")
    if status != "ok" and log.exists():
        lines.append(f"log       {relative(log)}")
    if following := next_command(result, run_dir):
        lines.append(f"next      {following}")
    return lines


def job_line(result: Mapping[str, Any], number: int) -> str:
    """A finished job of a sweep in fewer than 100 columns, a failed one with its reason instead of numbers:

    `#3 compression=int8 precision=32 ok perplexity 8.912 -> 8.934 5.40 MB 3.64x 41 s`
    """
    status, error = word(result, "status") or "failed", word(result, "error", "message")
    overrides = pick(result, "overrides")
    typed = " ".join(map(str, overrides)) if isinstance(overrides, list) else ""
    room = LINE_WIDTH - 1 - len(f"#{number} ")
    if status != "ok":
        # The overrides can be looked up by the job's number; the message is what the reader needs.
        said = f"{shorten(typed, 40)} {status}{': ' if error else ''}{error}"
        return f"#{number} {shorten(said, room)}"
    facts = [status]
    metric = word(result, "quality", "metric")
    before, after = amount(result, "quality", "before"), amount(result, "quality", "after")
    if after is not None:
        start = "" if before is None else f"{format_quality(metric, before)} -> "
        facts.append(shorten(f"{metric} {start}{format_quality(metric, after)}", 36))
    size, ratio, seconds = (
        amount(result, "size", "bytes_after"),
        amount(result, "size", "ratio"),
        amount(result, "seconds"),
    )
    facts += [] if size is None else [format_bytes(size)]
    facts += [] if ratio is None else [f"{significant(ratio)}x"]
    facts += [] if seconds is None else [format_seconds(seconds)]
    tail = " ".join(facts)
    return f"#{number} {shorten(f'{shorten(typed, room - len(tail) - 1)} {tail}', room)}"
