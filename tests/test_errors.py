"""What errors say beside what is wrong."""

from __future__ import annotations

import pytest

from pipeline.errors import did_you_mean


@pytest.mark.parametrize(("word", "meant"), [("INT8", "int8"), ("int9", "int8"), ("relu", "ReLU"), ("zebra", "")])
def test_the_nearest_word_is_found_whatever_its_capitals(word: str, meant: str) -> None:
    assert did_you_mean(word, ["int8", "ReLU", "none"]) == (f"; did you mean '{meant}'?" if meant else "")
