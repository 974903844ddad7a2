"""What errors say beside what is wrong."""

from __future__ import annotations

import pytest

from pipeline.errors import did_you_mean


@pytest.mark.parametrize(("word", "meant"), [("INT8", "int8"), ("int9", "int8"), ("relu", "ReLU"), ("zebra", "")])
def test_the_nearest_word_is_found_whatever_its_capitals(word: str, meant: str) -> None:
    assert did_you_mean(word, ["int8", "ReLU", "none"]) == (f"; did you mean '{meant}'?" if meant else "")


@pytest.mark.parametrize(
    ("word", "allowed", "meant"),
    [
        ("gpu", ["auto", "cpu", "cuda", "mps", "tpu"], "cuda"),
        ("fp16-mixed", ["16-mixed", "16-true", "bf16-mixed"], "16-mixed"),
        ("Half", ["16-mixed", "16-true", "bf16-mixed"], "16-mixed"),
        ("fp16", ["none", "float16", "bfloat16", "powersgd"], "float16"),
        ("bfloat16", ["16-mixed", "bf16-mixed", "bf16-true"], "bf16-mixed"),
        ("True", ["none", "full", "selective"], "full"),
    ],
)
def test_what_others_call_a_choice_is_known(word: str, allowed: list[str], meant: str) -> None:
    assert did_you_mean(word, allowed) == f"; did you mean '{meant}'?"
