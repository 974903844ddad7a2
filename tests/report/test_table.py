"""The closing table, the last lines and the job line, as they are really rendered."""

from __future__ import annotations

import io
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from pipeline.report.result import new_result
from pipeline.report.table import closing_lines, closing_table, command, job_line, next_command, relative


def render(result: dict[str, Any], width: int) -> str:
    target = io.StringIO()
    Console(file=target, width=width, highlight=False).print(closing_table(result))
    return target.getvalue()


@pytest.mark.parametrize("width", [100, 80])
def test_the_table_says_before_after_and_change(language: dict[str, Any], width: int) -> None:
    text = render(language, width)
    lines = {line.strip().split("  ")[0]: " ".join(line.split()) for line in text.splitlines()}
    assert lines["perplexity"] == "perplexity 8.912 8.934 0.25% worse"
    assert lines["bytes on disk"] == "bytes on disk 19.6 MB 5.40 MB 3.64x smaller"
    assert lines["parameters"] == "parameters 4.91M 4.91M the same"
    assert lines["tokens/s"] == "tokens/s 410 905 2.21x faster"
    assert lines["latency, batch 1"] == "latency, batch 1 2.44 ms 1.10 ms 2.22x shorter"
    assert lines["peak memory, training"] == "peak memory, training - 215 MB measured"
    assert lines["peak memory, evaluation"] == "peak memory, evaluation - 88.0 MB measured"
    assert "65,536 held-out tokens" in " ".join(text.split())
    assert "learned nothing: 28.30" in " ".join(text.split())
    assert max(cell_len(line) for line in text.splitlines()) <= width


def test_what_did_not_improve_is_said(image: dict[str, Any]) -> None:
    text = " ".join(render(image, 100).split())
    assert "accuracy 98.10% 96.20% 1.90 points worse" in text
    assert "bytes on disk 1.00 MB 1.25 MB 1.25x larger" in text
    assert "samples/s 2.00k 800 0.400x: slower" in text
    assert "latency, batch 32 16.0 ms 40.0 ms 2.50x longer" in text
    assert "50.0% zero" in text


def test_a_predicted_peak_stands_beside_the_measured_one(language: dict[str, Any]) -> None:
    language["memory"]["predicted"]["train"] = 198_000_000
    assert "198 MB plan 215 MB plan off by -7.9%" in " ".join(render(language, 100).split())


def test_the_peak_of_a_links_own_fit_has_a_line(distilled: dict[str, Any]) -> None:
    lines = [" ".join(line.split()) for line in render(distilled, 100).splitlines()]
    (after,) = (position for position, line in enumerate(lines) if line.startswith("peak memory, training - 215 MB"))
    assert lines[after + 1] == "peak memory, training: distill 398 MB plan 400 MB plan off by -0.5%"
    assert not any("training: int8" in line for line in lines)


def test_half_precision_shows_both_ratios(language: dict[str, Any]) -> None:
    language["size"].update(bytes_before=9_820_000, ratio=1.8185)
    assert "1.82x smaller (3.64x against float32)" in " ".join(render(language, 100).split())


def test_an_empty_result_gives_an_empty_table_not_an_error() -> None:
    assert closing_table(new_result("run", [], {})).row_count == 0
    render({}, 80)


damage = st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=120) | st.lists(st.integers())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data(), st.sampled_from([80, 100]))
def test_the_table_fits_whatever_the_numbers(language: dict[str, Any], data: st.DataObject, width: int) -> None:
    result = {**language}
    for section in ("quality", "size", "speed", "memory", "artifact"):
        result[section] = {key: data.draw(damage | st.just(value)) for key, value in language[section].items()}
    lines = render(result, width).splitlines()
    assert max(map(cell_len, lines), default=0) <= width
    closing_lines(result, "outputs/run")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.data(),
    st.lists(st.text(max_size=80), max_size=6),
    st.sampled_from(["ok", "failed", "gate", None, 3]),
    st.text(max_size=300),
    st.integers(0, 10_000),
)
def test_a_job_line_is_one_line_of_fewer_than_100_columns(
    language: dict[str, Any], data: st.DataObject, overrides: list[str], status: Any, message: str, number: int
) -> None:
    result = {**language, "status": status, "overrides": overrides, "error": {"type": "X", "message": message}}
    for section in ("quality", "size"):
        result[section] = {key: data.draw(damage | st.just(value)) for key, value in language[section].items()}
    result["seconds"] = data.draw(st.floats(0, 1e9) | st.none())
    line = job_line(result, number)
    assert cell_len(line) < 100
    assert line.splitlines() in ([line], [])
    assert line.startswith(f"#{number} ")


def test_a_job_line_reads_well(language: dict[str, Any], image: dict[str, Any]) -> None:
    said = job_line(language, 3)
    assert said == "#3 compression=int8 precision=16-mixed ok perplexity 8.912 -> 8.934 5.40 MB 3.64x 74 s"
    assert "accuracy 98.10% -> 96.20%" in job_line(image, 0)


def test_a_failed_job_says_why(language: dict[str, Any]) -> None:
    failed = new_result("run", ["compression=int4"], {})
    failed["status"] = "failed"
    failed["error"] = {"type": "RuntimeError", "message": "out of memory"}
    assert job_line(failed, 2) == "#2 compression=int4 failed: out of memory"
    assert job_line({}, 2) == "#2 failed"
    language.update(status="gate", error={"type": "ReceiptError", "message": "gate.min_ratio=4: 3.6"})
    assert job_line(language, 2).endswith("gate.min_ratio=4: 3.6")


def test_the_result_of_a_long_command_line_is_not_cut(language: dict[str, Any]) -> None:
    language["overrides"] = ["compression.int8.ignore=[" + ",".join(f"layer{n}" for n in range(50)) + "]"]
    line = job_line(language, 1)
    assert line.endswith("… ok perplexity 8.912 -> 8.934 5.40 MB 3.64x 74 s")


@pytest.mark.parametrize("folder", ["plain", "with space", "it's", "a=b,c", "[int8]", "$HOME"])
def test_the_next_command_survives_the_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language: dict[str, Any], folder: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder / "artifact").mkdir(parents=True)
    words = shlex.split(next_command(language, folder))
    assert words == ["python", "run.py", "job=generate", f"artifact={folder}/artifact", "prompt=def "]


def test_the_next_command_of_other_data_tasks_and_jobs(language: dict[str, Any], image: dict[str, Any]) -> None:
    assert shlex.split(next_command(image, "out"))[2:] == ["job=evaluate", "artifact=out/artifact"]
    language["choices"]["data"] = "text"
    assert shlex.split(next_command(language, "out"))[-1] == "prompt=The "
    language["job"] = "generate"
    assert "job=evaluate" in next_command(language, "out")
    image["job"] = "evaluate"
    assert "job=verify" in next_command(image, "out")
    image["artifact"]["path"] = None
    assert next_command(image, "out") == ""


def test_the_console_script_is_named_by_its_own_name(language: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/leanfit", "compression=int8"])
    assert next_command(language, "out").startswith("leanfit job=generate")


def test_a_line_that_composes_a_config_names_the_folders_that_it_needs(
    monkeypatch: pytest.MonkeyPatch, language: dict[str, Any]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--config-dir=my conf", "--multirun=false", "--", "model=mine"])
    assert command(["model=mine"]) == "python run.py '--config-dir=my conf' model=mine"
    assert "--config-dir" not in next_command(language, "out")  # an artifact holds all that it needs


def test_the_last_lines_say_where_things_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "outputs" / "run"
    (run_dir / "artifact").mkdir(parents=True)
    (run_dir / "report.md").touch()
    assert closing_lines(language, run_dir) == [
        "artifact  outputs/run/artifact",
        "receipt   reloaded in a fresh process: same outputs, largest difference 0",
        "report    outputs/run/report.md",
        "next      python run.py job=generate artifact=outputs/run/artifact prompt='def '",
    ]
    language["artifact"]["path"] = "outputs/run/artifact"
    assert closing_lines(language, run_dir)[0] == "artifact  outputs/run/artifact"
    language["artifact"]["path"] = str(run_dir / "artifact")
    assert closing_lines(language, run_dir)[0] == "artifact  outputs/run/artifact"


def test_a_broken_receipt_comes_first(tmp_path: Path, language: dict[str, Any]) -> None:
    (tmp_path / "run.log").touch()
    language.update(status="gate", error={"type": "ReceiptError", "message": "outputs differ by 3"})
    language["artifact"]["reload"].update(ok=False, max_abs_diff=3.0)
    lines = closing_lines(language, tmp_path)
    assert lines[0] == "not accepted: outputs differ by 3"
    assert "receipt   reloaded in a fresh process: NOT the same model, largest difference 3.0" in lines
    assert f"log       {tmp_path / 'run.log'}" in lines
    language["artifact"]["reload"]["max_abs_diff"] = None
    assert "receipt   NOT given: outputs could not be compared" in closing_lines(language, tmp_path)


def test_a_path_outside_is_shown_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert relative(tmp_path / "there") == str(tmp_path / "there")
    assert relative("below/it") == os.path.join("below", "it")
    assert relative(tmp_path / "here") == "."
