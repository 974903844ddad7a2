"""Numbers as text."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from rich.cells import cell_len

from pipeline.report import units

sizes = st.floats(min_value=1e-12, max_value=1e15)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_900, "1.00 MB"),
        (1_020_000, "1.02 MB"),
        (6 * 1024**3, "6.44 GB"),
        (2.5e12, "2.50 TB"),
    ],
)
def test_bytes_are_decimal(value: float | None, text: str) -> None:
    assert units.format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0 s"),
        (0.0000314, "31.4 µs"),
        (0.0042, "4.20 ms"),
        (3.14, "3.1 s"),
        (9.97, "10 s"),
        (41, "41 s"),
        (119.6, "2 min 0 s"),
        (125, "2 min 5 s"),
        (3 * 3600 + 12 * 60, "3 h 12 min"),
    ],
)
def test_seconds(value: float | None, text: str) -> None:
    assert units.format_seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0:00"), (41, "0:41"), (725, "12:05"), (10930, "3:02:10"), (-3, "0:00"), (59.7, "1:00")]
)
def test_clock(value: float, text: str) -> None:
    assert units.format_clock(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(950, "950"), (12_345, "12.3k"), (4_910_000, "4.91M"), (1.02e9, "1.02G"), (0.5, "0.500")]
)
def test_counts(value: float, text: str) -> None:
    assert units.format_count(value) == text


@given(sizes, st.integers(2, 5))
def test_significant_digits_are_kept(value: float, digits: int) -> None:
    shown = float(units.significant(value, digits))
    assert shown == pytest.approx(value, rel=0.51 * 10 ** (1 - digits))


@given(sizes)
def test_a_readable_number_is_short(value: float) -> None:
    for show in (units.format_bytes, units.format_count):
        assert len(show(value)) <= 9
    assert len(units.format_seconds(min(value, 1e7))) <= 13


@pytest.mark.parametrize(
    ("metric", "direction", "before", "after", "text"),
    [
        ("perplexity", "lower", 8.0, 8.0, "equal"),
        ("perplexity", "lower", 8.0, 8.4, "5.0% worse"),
        ("perplexity", "lower", 8.0, 7.6, "5.0% better"),
        ("perplexity", "lower", 8.0, 8.0 + 1e-6, "<0.01% worse"),
        ("perplexity", "lower", 8.0, 8000.0, "1000x: worse"),
        ("accuracy", "higher", 0.98, 0.975, "0.50 points worse"),
        ("accuracy", "higher", 0.975, 0.98, "0.50 points better"),
        ("accuracy", "higher", 0.98, 0.98 - 1e-6, "<0.01 points worse"),
        ("bleu", "higher", 0.0, 1.0, "better"),
        ("perplexity", "lower", None, 8.0, ""),
        ("perplexity", "lower", 8.0, None, ""),
    ],
)
def test_a_change_of_quality_says_whether_it_hurts(
    metric: str, direction: str, before: float | None, after: float | None, text: str
) -> None:
    assert units.quality_change(metric, direction, before, after) == text


@given(st.sampled_from(["lower", "higher"]), st.floats(0.001, 1e6), st.floats(0.001, 1e6))
def test_worse_and_better_follow_the_direction(direction: str, before: float, after: float) -> None:
    assume(before != after)
    change = units.quality_change("bits", direction, before, after)
    assert change.endswith("better" if (after < before) == (direction == "lower") else "worse")


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (None, ""),
        (3.637, "3.64x faster"),
        (1.0, "as fast"),
        (1.004, "as fast"),
        (0.4, "0.400x: slower"),
        (0.0, "0x: slower"),
    ],
)
def test_a_slower_model_is_called_slower(ratio: float | None, text: str) -> None:
    assert units.times(ratio, "faster", "slower", "as fast") == text


def test_a_larger_file_is_called_larger() -> None:
    assert units.times(0.8, "smaller", "larger", "the same size") == "1.25x larger"


@pytest.mark.parametrize("value", [None, "8", True, math.nan, math.inf, 10**400, [], {}])
def test_what_is_no_finite_number_is_none(value: Any) -> None:
    assert units.number(value) is None


@given(st.text(), st.integers(0, 60))
def test_a_shortened_text_fits_on_one_line(text: str, width: int) -> None:
    short = units.shorten(text, width)
    assert cell_len(short) <= width
    assert all(character.isprintable() for character in short)


def test_a_short_text_is_left_alone() -> None:
    assert units.shorten("compression=int8", 40) == "compression=int8"
    assert units.shorten("one\ntwo\x1b[31m", 40) == "one two [31m"


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(None, ""), (1.0, "0.0%"), (1.0004, "0.0%"), (0.9996, "0.0%"), (1.013, "+1.3%"), (0.5, "-50.0%")],
)
def test_an_error_has_a_sign_unless_it_is_none(ratio: float | None, text: str) -> None:
    assert units.format_error(ratio) == text
