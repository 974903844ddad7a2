"""result.json: complete, strict, atomic, and honest about numbers that are none."""

from __future__ import annotations

import json
import math
import os
import threading
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import LeanfitError
from pipeline.report import result as results
from pipeline.report.result import empty_train, new_result, read_result, schema_problems, settle, write_result

KEYS = {
    "": "schema status error job overrides choices precision parallelism device train memory quality size speed stages"
    " artifact exports",
    "precision": "requested used",
    "parallelism": "strategy devices nodes",
    "device": "kind name reason",
    "train": "steps samples tokens seconds samples_per_second tokens_per_second mfu loss_first loss_last",
    "memory": "predicted measured reserved error kind",
    "memory.predicted": "load train compress save evaluate",
    "memory.measured": "load train compress save evaluate",
    "memory.reserved": "load train compress save evaluate",
    "quality": "metric direction before after loss_before loss_after baseline n",
    "size": "parameters_before parameters_after nonzero_after bytes_before bytes_after ratio ratio_float32 claim",
    "speed": "unit before after ratio latency_before latency_after batch_size",
    "artifact": "path format files reload",
    "artifact.reload": "ok max_abs_diff",
}
"""Written out from the interface, not from the code."""


def at(result: dict[str, Any], path: str) -> Any:
    found: Any = result
    for key in filter(None, path.split(".")):
        found = found[key]
    return found


@pytest.mark.parametrize("path", KEYS)
def test_a_new_result_has_every_key_that_scripts_rely_on(path: str) -> None:
    section = at(new_result("run", [], {}), path)
    assert set(KEYS[path].split()) <= set(section)


def test_a_new_result_is_a_failure_until_told_otherwise() -> None:
    result = new_result("run", ["a=b"], {"model": "gpt", "compression": ("wanda", "int8")})
    assert result["status"] is None
    assert settle(result)["status"] == "failed"
    assert schema_problems(settle(result)) == []
    assert result["overrides"] == ["a=b"]
    assert result["choices"] == {"model": "gpt", "compression": ["wanda", "int8"]}
    assert result["quality"]["after"] is None
    assert result["stages"] == result["exports"] == []
    assert settle(result)["error"]["type"] == "Unfinished"


def test_results_share_nothing() -> None:
    first = new_result("run", [], {})
    first["memory"]["measured"]["train"] = 1
    first["stages"].append({})
    second = new_result("run", [], {})
    assert second["memory"]["measured"]["train"] is None
    assert second["stages"] == []


def test_whole_results_are_valid(language: dict[str, Any], image: dict[str, Any]) -> None:
    language["stages"][0]["train"] = empty_train() | {"steps": 3, "loss_last": 2.0}
    language["exports"].append(
        {
            "format": "onnx",
            "path": "exports/onnx",
            "bytes": 1,
            "runtime": "onnxruntime",
            "max_abs_diff": 0.1,
            "tokens_or_samples_per_second": 3,
        }
    )
    assert schema_problems(language) == []
    assert schema_problems(image) == []


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = []
    if isinstance(value, dict) and prefix[-1:] not in [("choices",), ("config",), ("detail",), ("versions",)]:
        for key, item in value.items():
            found += [(*prefix, key), *paths(item, (*prefix, key))]
    elif isinstance(value, list):
        for position, item in enumerate(value):
            found += paths(item, (*prefix, position))
    return found


def test_every_key_that_is_missing_unknown_or_of_a_wrong_type_is_named(language: dict[str, Any]) -> None:
    where = paths(language)
    assert len(where) > 80
    for path in where:
        for harm in ("missing", "renamed", "wrong"):
            damaged = deepcopy(language)
            parent: Any = damaged
            for key in path[:-1]:
                parent = parent[key]
            if harm == "wrong":
                parent[path[-1]] = object()
            else:
                value = parent.pop(path[-1])
                if harm == "renamed":
                    parent[f"{path[-1]}x"] = value
            problems = schema_problems(damaged)
            assert problems, (harm, path)
            assert any(str(path[-1]) in problem for problem in problems), (harm, path, problems)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("quality", "after", "8.9"),
        ("quality", "after", True),
        ("quality", "after", math.nan),
        ("quality", "after", math.inf),
        ("quality", "direction", "up"),
        ("size", "bytes_after", 1.5),
        ("size", "bytes_after", -1),
        ("speed", "unit", "furlongs"),
        ("train", "steps", "200"),
    ],
)
def test_values_are_not_coerced(language: dict[str, Any], section: str, key: str, value: Any) -> None:
    language[section][key] = value
    assert any(problem.startswith(f"{section}.{key}") for problem in schema_problems(language))


def test_status_and_error_go_together(language: dict[str, Any]) -> None:
    language["error"] = {"type": "X", "message": "y"}
    assert "error" in schema_problems(language)[0]
    language["status"] = "gate"
    assert schema_problems(language) == []
    language["status"] = "fine"
    assert "status" in schema_problems(language)[0]


@pytest.mark.parametrize("value", [None, [], "x", 3, {"schema": 1}, {"schema": 2}])
def test_what_is_no_result_at_all_has_problems(value: Any) -> None:
    assert schema_problems(value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_makes_an_honest_failure(tmp_path: Path, language: dict[str, Any], value: float) -> None:
    language["quality"]["after"] = value
    written = write_result(tmp_path / "result.json", language)
    assert written["status"] == "failed"
    assert "quality.after" in written["error"]["message"]
    text = (tmp_path / "result.json").read_text(encoding="utf-8")
    loaded = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert loaded == written == read_result(tmp_path / "result.json")
    assert loaded["quality"]["after"] is None
    assert schema_problems(loaded) == []
    assert language["status"] == "ok", "the caller's own result is not touched"


def test_an_earlier_error_stays_first(language: dict[str, Any]) -> None:
    language.update(status="gate", error={"type": "ReceiptError", "message": "too large"})
    language["speed"]["ratio"] = math.inf
    clean = settle(language)
    assert clean["status"] == "gate"
    assert clean["error"]["message"] == "too large; not a finite number: speed.ratio is inf"


def test_free_parts_keep_such_numbers_as_text(language: dict[str, Any]) -> None:
    language["stages"][0]["config"]["clip"] = math.inf
    language["stages"][0]["detail"]["worst"] = [math.nan, 1.0]
    clean = settle(language)
    assert clean["status"] == "ok"
    assert clean["stages"][0]["config"]["clip"] == "inf"
    assert clean["stages"][0]["detail"]["worst"] == ["nan", 1.0]


def test_scalars_of_numpy_and_torch_paths_and_tuples_become_plain(language: dict[str, Any]) -> None:
    import torch

    language["quality"]["after"] = np.float32(8.5)
    language["quality"]["before"] = torch.tensor(8.25)
    language["size"]["bytes_after"] = np.int64(7)
    language["artifact"]["path"] = Path("a") / "b"
    language["stages"][0]["config"]["ignore"] = ("x", frozenset({"z", "y"}))
    clean = settle(language)
    assert schema_problems(clean) == []
    assert clean["quality"]["after"] == 8.5
    assert clean["quality"]["before"] == 8.25
    assert clean["artifact"]["path"] == str(Path("a/b"))
    assert clean["stages"][0]["config"]["ignore"] == ["x", ["y", "z"]]
    language["quality"]["after"] = np.float64("nan")
    assert settle(language)["status"] == "failed"


def test_what_json_cannot_hold_is_named(language: dict[str, Any]) -> None:
    language["stages"][0]["detail"]["thing"] = object()
    with pytest.raises(TypeError, match=r"stages\[0\].detail.thing is a object"):
        settle(language)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(json_values)
def test_whatever_is_written_is_strict_json(value: Any) -> None:
    clean = settle({"status": "ok", "error": None, "value": value})
    text = json.dumps(clean, allow_nan=False)
    assert json.loads(text) == clean


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, language: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    write_result(path, language)
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_result(path, new_result("run", [], {}))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["result.json"]


def test_a_reader_never_sees_half_a_file(tmp_path: Path, language: dict[str, Any]) -> None:
    path = tmp_path / "result.json"
    write_result(path, language)
    stop = threading.Event()
    torn = []

    def read() -> None:
        while not stop.is_set():
            try:
                read_result(path)
            except LeanfitError as error:
                torn.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for size in range(60):
        language["stages"][0]["detail"]["padding"] = "x" * 1000 * size
        write_result(path, language)
    stop.set()
    reader.join()
    assert torn == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a readable result"),
        (b'{"schema": 1, "status": "o', "not a readable result"),
        (b"\xff\xfe\x00", "not a readable result"),
        (b"[1, 2]", "a list, not an object"),
        (b"[" * 200_000, "not a readable result"),
        (b'{"schema": 2}', "schema 2 is newer"),
    ],
)
def test_a_damaged_file_is_one_clear_line(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(LeanfitError, match=says) as caught:
        read_result(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(LeanfitError, match="there is no such result"):
        read_result(tmp_path / "result.json")
    with pytest.raises(LeanfitError, match="not a readable result"):
        read_result(tmp_path)


def test_the_module_needs_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, pipeline.report.result, pipeline.report.table, pipeline.report.sweep, pipeline.report.markdown\n"
    )
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'lightning', 'matplotlib', 'transformers')))"
    root = Path(results.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
