"""The plots of a run and of a sweep, as PNG: loss over steps, before and after, quality against bytes.

Colours are Okabe and Ito's, which the colour-blind tell apart; every bar and point carries its value or name in text.
matplotlib (about a second) is imported on the first plot, and drawn without a display or pyplot's global state.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.report.metrics_file import read_metrics
from pipeline.report.table import amount, word
from pipeline.report.units import FRACTIONS, format_bytes, format_count, format_quality, shorten, worsening

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
GREY = "#666666"
PALETTE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY)
DPI = 130
LABEL_LIMIT = 44
SPOTS = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0), (2, 1), (-2, 1), (2, -1), (-2, -1))
"""Directions from a point in which its label is tried."""


def sheet(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    with _any_glyph():
        figure.savefig(temporary, format="png")
    temporary.replace(out)
    return out


@contextmanager
def _any_glyph() -> Iterator[None]:
    """A name in a script that the font lacks is drawn as boxes; that is no reason to warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=9)


def _literal(text: str) -> str:
    """`text` as it is: matplotlib reads a pair of dollar signs as a formula."""
    return text.replace("$", r"\$")


def loss_curve(metrics_csv: str | Path, out: str | Path, baseline: float | None = None) -> Path | None:
    """Loss over optimizer steps, the stages one after another; `baseline` is a loss in nats. None: nothing to draw."""
    rows = [row for row in read_metrics(metrics_csv) if row.loss is not None]
    if not rows:
        return None
    figure = sheet(8, 4)
    axes = figure.subplots()
    plain(axes)
    offset = 0
    stages = list(dict.fromkeys(row.stage for row in rows))
    for position, stage in enumerate(stages):
        own = [row for row in rows if row.stage == stage]
        steps, losses = [offset + row.step for row in own], [row.loss for row in own if row.loss is not None]
        colour = PALETTE[position % len(PALETTE)]
        marker = "o" if len(own) < 40 else ""
        axes.plot(steps, losses, color=colour, marker=marker, markersize=3.5, linewidth=1.6)
        end = offset + own[-1].step
        # The stage's name stands over its own stretch, at the top, where a falling loss leaves room.
        axes.annotate(
            _literal(shorten(stage, 20)),
            ((offset + end) / 2, 1.01),
            xycoords=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            color=colour,
            fontsize=10,
            rotation=0 if len(stages) < 6 else 30,
        )
        if position + 1 < len(stages):
            axes.axvline(end, color=GREY, linewidth=0.8, alpha=0.5)
        offset = end
    last = [row.loss for row in rows if row.loss is not None][-1]
    axes.annotate(
        f"{last:.3g}", (offset, last), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9, color=GREY
    )
    if baseline is not None:
        axes.axhline(baseline, color=GREY, linewidth=1, linestyle="--")
        axes.annotate(
            f"learned nothing: {baseline:.3g}",
            (1, baseline),
            xycoords=axes.get_yaxis_transform(),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=GREY,
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats)")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_xlim(0, 1.03 * offset)  # from the first step, whichever is the first that was logged
    axes.locator_params(axis="x", integer=True)
    return save(figure, Path(out))


class _Panel(NamedTuple):
    title: str
    before: float | None
    after: float | None
    labels: tuple[str, str]


def _panels(result: Mapping[str, Any]) -> list[_Panel]:
    metric, direction = word(result, "quality", "metric"), word(result, "quality", "direction")
    panels = []
    for section, stem, title, show in (
        ("size", "bytes_", "weights on disk\nlower is better", format_bytes),
        ("quality", "", f"{metric}\n{direction} is better", lambda value: format_quality(metric, value)),
        ("speed", "", f"{word(result, 'speed', 'unit')}\nhigher is better", format_count),
    ):
        before, after = amount(result, section, f"{stem}before"), amount(result, section, f"{stem}after")
        if before is not None or after is not None:
            panels.append(_Panel(title, before, after, (show(before), show(after))))
    return panels


def before_after(result: Mapping[str, Any], out: str | Path) -> Path | None:
    """Size, quality and speed as small multiples of two bars each, from zero. None: the result knows none of them."""
    panels = _panels(result)
    if not panels:
        return None
    figure = sheet(2.9 * len(panels) + 0.3, 3.6)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        plain(axes)
        axes.spines["left"].set_visible(False)
        axes.set_yticks([])
        for position, (value, label, colour) in enumerate(
            zip((panel.before, panel.after), panel.labels, (GREY, BLUE), strict=True)
        ):
            if value is not None:
                axes.bar(position, value, width=0.62, color=colour)
            axes.annotate(
                label, (position, value or 0), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=10
            )
        axes.set_xticks([0, 1], ["before", "after"])
        axes.set_xlim(-0.6, 1.6)
        axes.set_title(_literal(panel.title), fontsize=10)
        axes.margins(y=0.12)
    return save(figure, Path(out))


class Point(NamedTuple):
    """A finished job: what the Pareto plot shows."""

    label: str
    size: float
    quality: float


def front(points: Sequence[Point], direction: str) -> list[Point]:
    """The points that no other beats: none is as small and as good, and better in one. In order of size."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.size, worsening(direction, 0, p.quality))):
        if not best or worsening(direction, best[-1].quality, point.quality) < 0:
            best.append(point)
    return best


def _place(axes: Axes, annotations: Sequence[Annotation]) -> None:
    """Move each label to the nearest spot where it covers no other label and no point, and stays inside the axes.

    Spots are tried on growing rings around the point; where none is free, the least covered one is taken. A label that
    had to go far gets a thin line back to its point.
    """
    canvas: Any = axes.figure.canvas
    renderer = canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    scale = DPI / 72
    markers = [axes.transData.transform(note.xy) for note in annotations]
    taken: list[tuple[float, float, float, float]] = [(x - 7, y - 7, x + 7, y + 7) for x, y in markers]

    def covered(box: tuple[float, float, float, float]) -> float:
        total = 0.0
        for other in taken:
            wide = min(box[2], other[2]) - max(box[0], other[0])
            high = min(box[3], other[3]) - max(box[1], other[1])
            total += max(0.0, wide) * max(0.0, high)
        outside = max(0.0, frame.x0 - box[0]) + max(0.0, box[2] - frame.x1)
        outside += max(0.0, frame.y0 - box[1]) + max(0.0, box[3] - frame.y1)
        return float(total + 50 * outside)

    # From the top down: labels that must move then spread in the order of their points.
    for note, (x, y) in sorted(zip(annotations, markers, strict=True), key=lambda pair: -pair[1][1]):
        extent = note.get_window_extent(renderer)
        wide, high = extent.width + 4, extent.height + 2
        spots = []
        for ring in range(12):
            reach = 8 + 9 * ring
            for across, up in SPOTS:
                left = x + reach * across - (wide if across < 0 else wide / 2 if across == 0 else 0)
                low = y + reach * up - (high if up < 0 else high / 2 if up == 0 else 0)
                spots.append((ring, left, low))
        costs = [(covered((left, low, left + wide, low + high)), ring) for ring, left, low in spots]
        ring, left, low = spots[costs.index(min(costs))]
        taken.append((left, low, left + wide, low + high))
        note.set_position(((left + 2 - x) / scale, (low + 1 - y) / scale))
        if ring < 2 and note.arrow_patch is not None:
            note.arrow_patch.set_visible(False)


def _round_bytes(value: float) -> str:
    """'4 MB' rather than '4.00 MB': a tick is exact."""
    text, unit = format_bytes(value).split(" ")
    return f"{float(text):g} {unit}"


def _ticks(axis: Any, show: Any) -> None:
    """Labelled ticks that `show` formats: minor ones too on a logarithmic axis of less than two decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if axis.get_scale() == "log":
        low, high = sorted(axis.get_view_interval())
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))


def _pareto_panel(
    axes: Axes,
    metric: str,
    direction: str,
    points: Sequence[Point],
    across: str = "weights on disk",
    best_of: str = "no other job is both smaller and better",
) -> list[Annotation]:
    """Draw one metric's points and front; the labels, still to be placed. A point without a label is drawn alone."""
    from matplotlib.patheffects import withStroke

    plain(axes)
    best = front(points, direction)
    sizes, qualities = [p.size for p in points], [p.quality for p in points]
    if min(sizes) > 0 and max(sizes) / min(sizes) > 8:
        axes.set_xscale("log")
    if min(qualities) > 0 and max(qualities) / min(qualities) > 20:
        axes.set_yscale("log")
    axes.plot(
        [p.size for p in best], [p.quality for p in best], color=BLUE, linewidth=1.2, drawstyle="steps-post", zorder=1
    )
    rest = [p for p in points if p not in best]
    axes.scatter(
        [p.size for p in rest], [p.quality for p in rest], color=ORANGE, marker="s", s=34, edgecolors="white", zorder=2
    )
    axes.scatter([p.size for p in best], [p.quality for p in best], color=BLUE, s=44, edgecolors="white", zorder=3)
    axes.margins(0.16)
    axes.set_xlabel(f"{across} (smaller is better)")
    axes.set_ylabel(_literal(f"{metric} ({direction} is better)"))
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(f"blue: {best_of}", fontsize=9, color=BLUE, loc="left")
    _ticks(axes.xaxis, _round_bytes)
    _ticks(axes.yaxis, lambda value: f"{100 * value:g}%" if metric in FRACTIONS else f"{value:g}")
    notes = [
        axes.annotate(
            _literal(shorten(point.label, LABEL_LIMIT)),
            (point.size, point.quality),
            xytext=(8, 8),
            textcoords="offset points",
            fontsize=9,
            color=BLUE if point in best else GREY,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": "#aaaaaa", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3},
        )
        for point in points
        if point.label
    ]
    for note in notes:
        # The layout is made without the labels: they are moved within the axes once these stand still.
        note.set_in_layout(False)
    return notes


def memory_against_speed(points: Sequence[Point], unit: str, budget: float, out: str | Path) -> Path:
    """Points of a search: bytes at the peak as `size`, `unit` as `quality`, higher is better; and the budget's line."""
    figure = sheet(8, 5)
    axes = figure.subplots()
    best = "no other that was looked at needs less and is faster"
    notes = _pareto_panel(axes, unit, "higher", points, "memory at the peak", best)
    low, high = axes.get_xlim()
    axes.axvline(budget, color=RED, linewidth=1, linestyle="--")
    if budget > 4 * high:  # a budget far away would press the points together
        axes.set_xlim(low, high)
    axes.annotate(
        f"budget {format_bytes(budget)}",
        (min(budget, axes.get_xlim()[1]), 0),
        xycoords=axes.get_xaxis_transform(),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=RED,
    )
    with _any_glyph():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        _place(axes, notes)
    return save(figure, Path(out))


def pareto(rows: Sequence[Mapping[str, Any]], out: str | Path) -> Path | None:
    """Quality against bytes of the jobs of a sweep, one panel for each metric and direction; the front is a blue line.

    `rows` hold `label`, `metric`, `direction`, `quality_after` and `bytes_after`; those without a quality or size are
    left out. None: no row has both.
    """
    panels: dict[tuple[str, str], list[Point]] = {}
    for row in rows:
        size, quality = amount(row, "bytes_after"), amount(row, "quality_after")
        if size is not None and quality is not None:
            key = (word(row, "metric"), word(row, "direction") or "lower")
            panels.setdefault(key, []).append(Point(word(row, "label"), size, quality))
    if not panels:
        return None
    figure = sheet(8, 5 * len(panels))
    drawn = [
        (axes, _pareto_panel(axes, metric, direction, points))
        for axes, ((metric, direction), points) in zip(
            figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True
        )
    ]
    with _any_glyph():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for axes, notes in drawn:
            _place(axes, notes)
    return save(figure, Path(out))
