"""Numbers as a reader wants them: decimal bytes, seconds and milliseconds, counts, percentages. Pure text, no I/O."""

from __future__ import annotations

import math
from typing import Any

from rich.text import Text

FRACTIONS = frozenset({"accuracy", "top1", "top5", "f1", "auc"})
"""Metrics between 0 and 1 that are shown in percent and compared in points."""


def number(value: Any) -> float | None:
    """`value` as a finite float, else None: what a result that may be incomplete or damaged is read through."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        converted = float(value)
    except OverflowError:
        return None
    return converted if math.isfinite(converted) else None


def significant(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits, without an exponent where it stays short."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}"
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:.{decimals}f}"


def format_bytes(value: float | None) -> str:
    """Decimal units: 1_020_000 -> '1.02 MB'."""
    if value is None:
        return "-"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= 0.9995 * size:
            return f"{significant(value / size)} {unit}"
    return f"{value:.0f} B"


def format_seconds(value: float | None) -> str:
    """'31 µs', '4.2 ms', '3.1 s', '41 s', '2 min 5 s', '3 h 12 min'."""
    if value is None:
        return "-"
    size = abs(value)
    if size < 1e-3:
        return f"{significant(value * 1e6)} µs" if value else "0 s"
    if size < 1:
        return f"{significant(value * 1e3)} ms"
    if size < 9.95:
        return f"{value:.1f} s"
    if size < 119.5:
        return f"{value:.0f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 120:
        return f"{minutes} min {seconds} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def format_clock(value: float) -> str:
    """Time left: '0:41', '12:05', '3:02:10'."""
    minutes, seconds = divmod(max(0, round(value)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def format_count(value: float | None) -> str:
    """'950', '12.3k', '4.91M', '1.02G'."""
    if value is None:
        return "-"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            return f"{significant(value / size)}{unit}"
    return f"{value:.0f}" if value == round(value) else significant(value)


def format_quality(metric: str, value: float | None) -> str:
    """Accuracy and its kin in percent ('97.3%'); anything else with four significant digits ('8.931')."""
    if value is None:
        return "-"
    if metric in FRACTIONS:
        return f"{100 * value:.2f}%"
    return significant(value, 4)


def worsening(direction: str, before: float, after: float) -> float:
    """How much worse `after` is, in the metric's own units: positive is worse, whatever the direction."""
    return before - after if direction == "higher" else after - before


def quality_change(metric: str, direction: str, before: float | None, after: float | None) -> str:
    """'1.2% worse', '0.31 points better', 'equal': the change of a metric, and whether it hurts."""
    if before is None or after is None:
        return ""
    loss = worsening(direction, before, after)
    if loss == 0:
        return "equal"
    word = "worse" if loss > 0 else "better"
    if metric in FRACTIONS:
        points = 100 * abs(loss)
        return f"{points:.2f} points {word}" if points >= 0.005 else f"<0.01 points {word}"
    if before == 0:
        return word
    percent = 100 * abs(loss / before)
    if percent >= 1000:
        return f"{significant(percent / 100 + 1)}x: {word}"
    return f"{significant(percent, 2)}% {word}" if percent >= 0.01 else f"<0.01% {word}"


def times(ratio: float | None, better: str, worse: str, same: str) -> str:
    """'3.64x smaller' above 1, '1.25x larger' below. Never dressed up: half the speed reads '0.5x: slower'."""
    if ratio is None:
        return ""
    if 0.995 <= ratio < 1.005:
        return same
    if ratio > 1:
        return f"{significant(ratio)}x {better}"
    if worse == "slower" or ratio <= 0:
        return f"{significant(ratio)}x: {worse}"
    return f"{significant(1 / ratio)}x {worse}"


def format_error(ratio: float | None) -> str:
    """'+1.3%', '-0.4%', '0.0%': how far a figure is off one it is `ratio` times as large as."""
    if ratio is None:
        return ""
    percent = round(100 * (ratio - 1), 1)
    return f"{percent:+.1f}%" if percent else "0.0%"


def shorten(text: str, width: int) -> str:
    """`text` on one line of at most `width` columns, its end cut with an ellipsis; wide characters count double."""
    line = Text(" ".join("".join(c if c.isprintable() else " " for c in text).split()), end="")
    line.truncate(max(0, width), overflow="ellipsis")
    return line.plain if width > 0 else ""
