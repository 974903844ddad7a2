"""The plot of a plan: live memory by kind over one step, or over an evaluation, as stacked areas.

The horizontal axis counts allocations and releases, not seconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.report.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, plain, save, sheet
from pipeline.report.units import format_bytes

MOMENTS = ("forward", "backward", "optimizer step")
ROWS = 2
"""Of names of moments above the plot."""
LIMIT = 8
"""Kinds that get a colour of their own; the rest is drawn as one."""
COLOURS = {
    "optimizer state": BLUE, "weights": RED, "activations": PURPLE, "gradients": SKY, "backward": ORANGE,
    "optimizer step": "#F0E442", "batch": GREEN, "logits and loss": "#F0A0C8", "autocast's weights": "#A03C00",
}  # fmt: skip
OTHERS = ("#999999", "#44AA99", "#882255", "#332288", "#DDCC77", "#117733", "#CC6677", "#661100", "#000000")


def draw_timelines(plan_json: Path, directory: Path) -> dict[str, Path]:
    """{phase: the plot} of each phase of the plan whose course is known; nothing where there is no plan."""
    if not plan_json.is_file():
        return {}
    plan = json.loads(plan_json.read_text(encoding="utf-8"))
    return {
        name: timeline(phase, plan.get("capacity"), name, directory / f"memory_{name.replace(': ', '_')}.png")
        for name, phase in plan["phases"].items()
        if (phase.get("course") or {}).get("kinds")
    }


def timeline(phase: dict[str, Any], capacity: int | None, title: str, out: Path) -> Path:
    """Stacked areas of `phase["course"]`, its peak marked, the device's memory as a line where it is near."""
    kinds: dict[str, list[int]] = dict(
        sorted(phase["course"]["kinds"].items(), key=lambda kind: (-min(kind[1]), -max(kind[1])))
    )
    largest = sorted(kinds, key=lambda kind: -max(kinds[kind]))[:LIMIT]
    shown = {kind: course for kind, course in kinds.items() if kind in largest}
    rest = [course for kind, course in kinds.items() if kind not in largest]
    if rest:
        shown["the rest"] = [sum(held) for held in zip(*rest, strict=True)]
    length = len(next(iter(shown.values())))
    figure = sheet(8, 4)
    axes = figure.subplots()
    plain(axes)
    others = iter(OTHERS)
    colours = [COLOURS.get(kind) or next(others) for kind in shown]
    scale, unit = scaled(phase["bytes"])
    axes.stackplot(
        range(length), *([held / scale for held in course] for course in shown.values()),
        labels=[f"{kind} {format_bytes(max(course))}" for kind, course in shown.items()], colors=colours, step="mid",
    )  # fmt: skip
    totals = [sum(held) for held in zip(*shown.values(), strict=True)]
    top = max(range(length), key=totals.__getitem__)
    axes.plot([top], [totals[top] / scale], marker="v", color="black", markersize=6)
    operator = phase["operator"].removeprefix("aten::")  # none where the peak is what is only held
    axes.annotate(
        format_bytes(phase["bytes"]) + (f" at {operator}" if operator else ""),
        (top, totals[top] / scale), xytext=(0, 7), textcoords="offset points", fontsize=9,
        ha="left" if top < length / 2 else "right",
    )  # fmt: skip
    limit = phase["bytes"] / scale
    if capacity is not None and capacity < 2 * phase["bytes"]:
        limit = max(limit, capacity / scale)
        axes.axhline(capacity / scale, color="black", linewidth=1, linestyle="--")
        axes.annotate(
            f"the device: {format_bytes(capacity)}",
            (0, capacity / scale),
            xytext=(3, 3),
            textcoords="offset points",
            fontsize=9,
        )
    axes.set_ylim(0, 1.18 * limit)
    axes.set_xlim(0, length - 1)
    axes.set_xticks([])
    axes.set_xlabel(f"{title}: allocations and releases in their order")
    axes.set_ylabel(f"live memory ({unit})")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, reverse=True)
    mark(axes, [(at, name) for at, name in phase["course"]["moments"] if name in MOMENTS])
    return save(figure, out)


def mark(axes: Any, moments: Iterable[tuple[float, str]]) -> None:
    """A line and a name at each moment, in a second row where it would touch the name before it."""
    axes.figure.draw_without_rendering()  # only then it is known how wide the axes are
    ends = [-math.inf] * ROWS
    for at, name in moments:
        axes.axvline(at, color=GREY, linewidth=0.8, alpha=0.6)
        note = axes.annotate(
            name, (at, 1.0), xycoords=axes.get_xaxis_transform(), xytext=(2, 3), textcoords="offset points",
            fontsize=9, color=GREY,
        )  # fmt: skip
        box = note.get_window_extent(axes.figure.canvas.get_renderer())
        row = next((row for row, end in enumerate(ends) if end < box.x0), ends.index(min(ends)))
        note.xyann = (2, 3 + 12 * row)
        ends[row] = box.x1


def scaled(largest: int) -> tuple[float, str]:
    """(divisor, unit) for an axis that reaches `largest` bytes."""
    return next(((size, unit) for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if largest >= size), (1.0, "B"))
