"""Reading metrics.csv whole or torn, and cutting it back."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import LeanfitError
from pipeline.report.metrics_file import Row, format_rows, keep_until, read_metrics

finite = st.none() | st.floats(allow_nan=False)
rows = st.lists(
    st.builds(
        Row,
        step=st.integers(1, 10**9),
        stage=st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=8),
        loss=finite,
        lr=finite,
        tokens_per_second=finite,
        memory=st.none() | st.integers(0, 2**50),
    ),
    max_size=6,
)


@given(rows)
def test_rows_read_back_equal(tmp_path_factory: pytest.TempPathFactory, written: list[Row]) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.csv"
    path.write_text(format_rows(written, header=True), encoding="utf-8", newline="")
    assert read_metrics(path) == written


@given(st.integers(0, 200))
def test_a_file_cut_anywhere_gives_its_whole_rows(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    written = [Row(step, "train", step / 3, 1e-3, 12345.678, 10**8) for step in (10, 20, 30)]
    text = format_rows(written, header=True)
    path = tmp_path_factory.mktemp("metrics") / "metrics.csv"
    path.write_text(text[:cut], encoding="utf-8", newline="")
    whole = max(0, text[:cut].count("\n") - 1)
    assert read_metrics(path) == written[:whole]


def test_a_missing_or_empty_file_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.csv") == []
    (tmp_path / "metrics.csv").touch()
    assert read_metrics(tmp_path / "metrics.csv") == []


def test_other_columns_are_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,loss\n1,2\n", encoding="utf-8")
    with pytest.raises(LeanfitError, match="its columns are epoch, loss"):
        read_metrics(tmp_path / "metrics.csv")


def test_rubbish_in_the_middle_costs_only_its_line(tmp_path: Path) -> None:
    good = [Row(1, "train", 1.0, None, None, None), Row(2, "train", 0.5, None, None, None)]
    text = format_rows(good[:1], header=True) + "\0\0\0\nx,train,1,1,1,1\n1,2\n" + format_rows(good[1:], header=False)
    (tmp_path / "metrics.csv").write_text(text, encoding="utf-8")
    assert read_metrics(tmp_path / "metrics.csv") == good


def mark(text: str) -> list[Row]:
    """'a1 a2 b1' -> rows of stages a and b."""
    return [Row(int(item[1:]), item[0], None, None, None, None) for item in text.split()]


@pytest.mark.parametrize(
    ("before", "stage", "step", "after"),
    [
        ("", "a", 0, ""),
        ("a1 a2 a3", "a", 2, "a1 a2"),
        ("a1 a2 a3", "a", 0, ""),
        ("a1 a2 a3", "a", 3, "a1 a2 a3"),
        ("a1 a2 a3", "a", 9, "a1 a2 a3"),
        ("a1 a2", "b", 0, "a1 a2"),
        ("a1 a2 b1 b2", "b", 1, "a1 a2 b1"),
        ("a1 a2 b1 b2", "a", 2, "a1 a2"),
        ("a1 a2 b1 b2 c1", "b", 0, "a1 a2"),
    ],
)
def test_what_a_resume_keeps(before: str, stage: str, step: int, after: str) -> None:
    assert keep_until(mark(before), stage, step) == mark(after)
