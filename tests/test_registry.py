"""Strict decoding: what passes, what does not, and how each problem is told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Le

from pipeline import registry
from pipeline.errors import ConfigError
from pipeline.registry import Absent, decode, decode_choice, lookup, names, shown


@dataclass(frozen=True, kw_only=True)
class Sample:
    width: Annotated[int, Ge(1)]
    rate: Annotated[float, Gt(0), Le(10)]
    limit: Annotated[int, Ge(1)] | None
    kind: Literal["cosine", "linear"]
    flag: bool
    path: str | None
    pair: tuple[float, float]
    ignore: tuple[str, ...]
    teacher: str | list[str]


GOOD: dict[str, Any] = {
    "width": 4,
    "rate": 0.5,
    "limit": None,
    "kind": "cosine",
    "flag": True,
    "path": None,
    "pair": [1, 0.5],
    "ignore": ["head"],
    "teacher": "self",
}


def said(key: str) -> str:
    return "conf/sample.yaml"


def problems(**changes: Any) -> list[str]:
    values = {key: value for key, value in {**GOOD, **changes}.items() if value is not ...}
    decoded, told = decode(Sample, values, "sample", said)
    assert (decoded is None) == bool(told)
    return told


def test_integers_pass_for_floats_and_lists_for_tuples() -> None:
    decoded, told = decode(Sample, {**GOOD, "rate": 1}, "sample", said)
    assert told == []
    assert decoded == Sample(**{**GOOD, "rate": 1.0, "pair": (1.0, 0.5), "ignore": ("head",)})
    assert isinstance(decoded.rate, float)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("width", "4", "sample.width=4 must be a whole number (conf/sample.yaml)"),
        ("width", 4.5, "sample.width=4.5 must be a whole number (conf/sample.yaml)"),
        ("width", True, "sample.width=true must be a whole number (conf/sample.yaml)"),
        ("width", None, "sample.width=null must be a whole number (conf/sample.yaml)"),
        ("width", 0, "sample.width=0 must be at least 1 (conf/sample.yaml)"),
        ("rate", "1e-3", "sample.rate=1e-3 must be a number (conf/sample.yaml)"),
        ("rate", 0.0, "sample.rate=0.0 must be greater than 0.0 (conf/sample.yaml)"),
        ("rate", 11, "sample.rate=11 must be at most 10.0 (conf/sample.yaml)"),
        ("rate", math.nan, "sample.rate=NaN must be a finite number (conf/sample.yaml)"),
        ("rate", math.inf, "sample.rate=Infinity must be a finite number (conf/sample.yaml)"),
        (
            "kind",
            "cosin",
            "sample.kind=cosin must be one of cosine, linear; did you mean 'cosine'? (conf/sample.yaml)",
        ),
        ("limit", 0, "sample.limit=0 must be null or be at least 1 (conf/sample.yaml)"),
        ("flag", 1, "sample.flag=1 must be true or false (conf/sample.yaml)"),
        ("flag", "true", "sample.flag=true must be true or false (conf/sample.yaml)"),
        ("path", 3, 'sample.path=3 must be text; to mean the text, put it in quotes: "3" (conf/sample.yaml)'),
        ("pair", [1.0], "sample.pair=[1.0] must have at least 2 items (conf/sample.yaml)"),
        ("pair", [1, 2, 3], "sample.pair=[1, 2, 3] must have at most 2 items (conf/sample.yaml)"),
        ("pair", [1, "x"], "sample.pair[1]=x must be a number (conf/sample.yaml)"),
        ("ignore", "head", "sample.ignore=head must be a list; did you mean [head]? (conf/sample.yaml)"),
        (
            "ignore",
            ["a", 1],
            'sample.ignore[1]=1 must be text; to mean the text, put it in quotes: "1" (conf/sample.yaml)',
        ),
        ("teacher", {}, "sample.teacher={} must be text or be a list (conf/sample.yaml)"),
        ("width", ..., "sample.width is required: give sample.width=VALUE (conf/sample.yaml)"),
        ("width", Absent(), "sample.width is required: give sample.width=VALUE (conf/sample.yaml)"),
        ("pair", [Absent(), 1], "sample.pair[0] is required (conf/sample.yaml)"),
    ],
)
def test_a_wrong_value_is_told_in_one_line(key: str, value: Any, line: str) -> None:
    assert problems(**{key: value}) == [line]


def test_every_problem_is_told_at_once() -> None:
    told = problems(width="x", rate=-1, kind="?", flag=None, widht=3)
    assert len(told) == 5
    assert {line.partition("=")[0] for line in told} == {
        f"sample.{k}" for k in ("width", "rate", "kind", "flag", "widht")
    }


def test_an_unknown_key_names_the_one_that_was_meant() -> None:
    (line,) = problems(widht=3)
    assert line.startswith("sample.widht=3: no such key; sample has width, rate, limit, kind")
    assert line.endswith("; did you mean 'width'? (conf/sample.yaml)")


def test_an_unknown_key_that_stands_elsewhere_names_that_place() -> None:
    _, (line,) = decode(Sample, {**GOOD, "lr": 1}, "sample", said, leaves=["optimizer.lr", "sample.width"])
    assert "did you mean 'optimizer.lr'?" in line


def test_a_problem_told_before_is_not_told_again_as_a_missing_key() -> None:
    assert decode(Sample, {**GOOD, "width": Absent(reported=True)}, "sample", said) == (None, [])


@pytest.mark.parametrize("values", [None, 5, "text", [1, 2], True])
def test_what_is_no_mapping_is_told(values: Any) -> None:
    _, (line,) = decode(Sample, values, "sample", said)
    assert line.startswith("sample=")
    assert "must be a mapping with width, rate" in line


def test_bytes_cannot_pass_for_text() -> None:
    decoded, told = decode(Sample, {**GOOD, "path": b"x"}, "sample", said)
    assert decoded is None
    assert "bytes" in told[0]


@pytest.mark.parametrize("name", ["nosuch", "base", "os", "../trainer/settings", "", "a.b", "__init__", "adam w"])
def test_a_name_without_a_module_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is not one of adafactor, adamw, adamw8bit, muon, sgd"):
        lookup("optimizer", name)
    decoded, (line,) = decode_choice("optimizer", {"name": name}, "optimizer", said)
    assert decoded is None
    assert line.startswith("optimizer.name=")


@pytest.mark.parametrize("name", [None, 5, ["adamw"], {"a": 1}, True])
def test_a_name_that_is_no_text_is_refused(name: Any) -> None:
    decoded, (line,) = decode_choice("optimizer", {"name": name}, "optimizer", said)
    assert decoded is None
    assert line.startswith("optimizer.name=")
    assert line.endswith("must be one of adafactor, adamw, adamw8bit, muon, sgd (conf/sample.yaml)")


def test_names_are_those_that_modules_register() -> None:
    assert names("optimizer") == ["adafactor", "adamw", "adamw8bit", "muon", "sgd"]
    assert names("precision") == ["fp8", "full", "mixed"]


def test_lookup_gives_the_registered_class() -> None:
    from pipeline.trainer.settings import Trainer

    assert lookup("trainer", "settings") is Trainer


def test_conf_root_holds_every_group() -> None:
    for group in registry.PACKAGES:
        assert registry.available(group), group


@pytest.mark.parametrize(
    ("value", "text"),
    [("a", "k=a"), ("a b", 'k="a b"'), ("", 'k=""'), (None, "k=null"), ([1, "a"], 'k=[1, "a"]'), ("ü", "k=ü")],
)
def test_values_are_shown_as_one_would_type_them(value: Any, text: str) -> None:
    assert shown("k", value) == text


def test_long_and_many_lined_values_stay_on_one_short_line() -> None:
    line = shown("k", "x\n" * 500)
    assert "\n" not in line
    assert len(line) < 90
