"""Plots are real PNGs with something on them, their labels apart, their fronts right."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report import plots
from pipeline.report.metrics_file import Row, format_rows
from pipeline.report.plots import Point, before_after, front, loss_curve, pareto

BLUE, RED = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


def picture(path: Path | None) -> np.ndarray:
    """Its pixels, height x width x 3, 0 to 255."""
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    return (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)


def share(pixels: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float((np.abs(pixels - np.array(colour)).max(axis=-1) <= 3).mean())


def curve(path: Path, stages: dict[str, int]) -> Path:
    rows = [
        Row(step, stage, 2 + 3 * math.exp(-step / 40), 1e-3, 2e4, 10**8)
        for stage, steps in stages.items()
        for step in range(10, steps + 1, 10)
    ]
    path.write_text(format_rows(rows, header=True), encoding="utf-8")
    return path


def test_the_loss_curve_shows_each_stage_in_its_colour(tmp_path: Path) -> None:
    one = picture(loss_curve(curve(tmp_path / "1.csv", {"train": 200}), tmp_path / "1.png"))
    two = picture(loss_curve(curve(tmp_path / "2.csv", {"train": 200, "distill": 60}), tmp_path / "2.png"))
    assert share(one, BLUE) > 0.002
    assert share(one, RED) == 0
    assert share(two, RED) > 0.0005
    assert one.shape[0] > 400
    assert one.shape[1] > 800


def test_a_baseline_is_drawn_where_there_is_one(tmp_path: Path) -> None:
    path = curve(tmp_path / "m.csv", {"train": 100})
    plain = picture(loss_curve(path, tmp_path / "plain.png"))
    based = picture(loss_curve(path, tmp_path / "based.png", baseline=3.3))
    assert (plain != based).any()


@pytest.mark.parametrize("content", [None, "", "step,stage,loss,lr,tokens_per_second,memory\n5,train,,,,\n"])
def test_no_loss_no_curve(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "m.csv").write_text(content, encoding="utf-8")
    assert loss_curve(tmp_path / "m.csv", tmp_path / "loss.png") is None
    assert not (tmp_path / "loss.png").exists()


def test_one_row_and_odd_stage_names_can_be_drawn(tmp_path: Path) -> None:
    rows = [Row(5, stage, 2.0, None, None, None) for stage in ("$x$", r"$\frac$", "_a_^b", "ж中", "n" * 80, "$")]
    (tmp_path / "m.csv").write_text(format_rows(rows, header=True), encoding="utf-8")
    picture(loss_curve(tmp_path / "m.csv", tmp_path / "loss.png"))


def test_a_run_that_logged_only_its_last_step_is_drawn_from_its_first(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(format_rows([Row(500, "train", 5.3, None, None, None)], header=True), "utf-8")
    pixels = picture(loss_curve(tmp_path / "m.csv", tmp_path / "loss.png"))
    columns = np.flatnonzero((np.abs(pixels - np.array(BLUE)).max(axis=-1) <= 3).any(axis=0))
    assert columns.max() > 0.9 * pixels.shape[1]
    assert columns.min() < 0.6 * pixels.shape[1], "its name stands in the middle"


def test_before_and_after_stand_side_by_side(tmp_path: Path, language: dict[str, Any]) -> None:
    pixels = picture(before_after(language, tmp_path / "all.png"))
    assert share(pixels, BLUE) > 0.05
    assert share(pixels, (0x66, 0x66, 0x66)) > 0.05
    language["speed"].update(before=None, after=None)
    assert picture(before_after(language, tmp_path / "two.png")).shape[1] < pixels.shape[1]


def test_bars_are_as_high_as_their_values(tmp_path: Path, language: dict[str, Any]) -> None:
    for section in ("quality", "speed"):
        language[section].update(before=None, after=None)
    language["size"].update(bytes_before=4_000_000, bytes_after=1_000_000)
    pixels = picture(before_after(language, tmp_path / "size.png"))

    def height(colour: tuple[int, int, int]) -> int:
        return int((np.abs(pixels - np.array(colour)).max(axis=-1) <= 3).sum(axis=0).max())

    assert height((0x66, 0x66, 0x66)) / height(BLUE) == pytest.approx(4, rel=0.05)


def test_a_result_without_numbers_has_no_picture(tmp_path: Path) -> None:
    assert before_after({}, tmp_path / "x.png") is None
    assert before_after({"size": {"bytes_before": "large", "bytes_after": math.nan}}, tmp_path / "x.png") is None
    assert list(tmp_path.iterdir()) == []


points = st.lists(st.builds(Point, st.text(max_size=3), st.integers(1, 6), st.integers(1, 6)), max_size=12)


@given(points, st.sampled_from(["lower", "higher"]))
def test_the_front_is_what_nothing_beats(given_points: list[Point], direction: str) -> None:
    def beats(a: Point, b: Point) -> bool:
        better = a.quality < b.quality if direction == "lower" else a.quality > b.quality
        return (a.size <= b.size and (better or a.quality == b.quality)) and (a.size < b.size or better)

    undominated = {(p.size, p.quality) for p in given_points if not any(beats(other, p) for other in given_points)}
    assert {(p.size, p.quality) for p in front(given_points, direction)} == undominated


def row(
    label: str, size: float | None, quality: float | None, metric: str = "perplexity", direction: str = "lower"
) -> Any:
    return {"label": label, "metric": metric, "direction": direction, "quality_after": quality, "bytes_after": size}


CROWD = [
    row(f"{method} {precision}", size * (1 + jitter / 1000), quality * (1 + jitter / 500))
    for method, size, quality in (
        ("none", 19.6e6, 8.9),
        ("int8", 5.4e6, 8.93),
        ("int4", 3.2e6, 9.8),
        ("wanda", 11e6, 9.1),
    )
    for jitter, precision in enumerate(("32", "16-mixed", "bf16-mixed", "bf16-true"))
]


def test_labels_of_a_crowded_sweep_cover_neither_each_other_nor_a_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    save = plots.save
    monkeypatch.setattr(plots, "save", lambda figure, out: figures.append(figure) or save(figure, out))
    picture(pareto(CROWD, tmp_path / "pareto.png"))
    (axes,) = figures[0].axes
    renderer = figures[0].canvas.get_renderer()
    notes = [text for text in axes.texts if text.get_text()]
    assert [note.get_text() for note in notes] == [entry["label"] for entry in CROWD]
    boxes = [matplotlib.text.Text.get_window_extent(note, renderer) for note in notes]
    whole = figures[0].bbox
    for position, box in enumerate(boxes):
        assert whole.x0 <= box.x0
        assert box.x1 <= whole.x1
        assert whole.y0 <= box.y0
        assert box.y1 <= whole.y1
        assert not any(box.overlaps(other) for other in boxes[position + 1 :])
        for note in notes:
            x, y = axes.transData.transform(note.xy)
            assert not (box.x0 < x < box.x1 and box.y0 < y < box.y1)


def test_each_metric_and_direction_has_a_panel(tmp_path: Path) -> None:
    one = picture(pareto(CROWD, tmp_path / "one.png"))
    mixed = [*CROWD, row("resnet", 1e6, 0.97, "accuracy", "higher"), row("lost", None, None), row("gone", 1e6, None)]
    two = picture(pareto(mixed, tmp_path / "two.png"))
    assert two.shape[0] == 2 * one.shape[0]


@pytest.mark.parametrize(
    "rows",
    [
        [row("alone", 1e6, 8.0)],
        [row("a", 1e6, 8.0), row("b", 1e6, 8.0)],
        [row("a", 0, 0.0), row("b", 1e6, 8.0)],
        [row("a", 1e3, 8.0), row("b", 1e9, 8e6)],
        [row("$x^", 1e6, 8.0), row("n" * 200, 2e6, 7.0), row("", 3e6, 6.0)],
        [row(f"job {n}", 1e6 + n, 8.0 + n / 1e3) for n in range(60)],
    ],
)
def test_odd_sweeps_can_be_drawn(tmp_path: Path, rows: list[Any]) -> None:
    pixels = picture(pareto(rows, tmp_path / "pareto.png"))
    assert share(pixels, BLUE) > 0.0001


def test_nothing_to_compare_no_picture(tmp_path: Path) -> None:
    assert pareto([], tmp_path / "p.png") is None
    assert pareto([row("x", None, 1.0), row("y", 1.0, None), {}], tmp_path / "p.png") is None
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_is_imported_late_and_needs_no_display(tmp_path: Path) -> None:
    code = (
        "import sys, pipeline.report.plots as plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plots.before_after({'size': {'bytes_before': 2, 'bytes_after': 1}}, sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules\n"
    )
    root = Path(plots.__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND")}
    subprocess.run([sys.executable, "-c", code, tmp_path / "x.png"], cwd=root, env=environment, check=True)
    picture(tmp_path / "x.png")
