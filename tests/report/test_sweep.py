"""What a sweep leaves, read from disk: jobs that went well, failed, were killed, or wrote rubbish."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import textwrap
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from pipeline.report import sweep
from pipeline.report.console import console
from pipeline.report.result import new_result, write_result
from pipeline.report.sweep import SweepCallback, collect, finish, split_override, sweep_lines, sweep_table

ROOT = Path(sweep.__file__).parents[2]


def job(sweep_dir: Path, number: int, overrides: list[str], result: dict[str, Any] | None, name: str = "") -> Path:
    """A job's directory as Hydra and the program leave it."""
    directory = sweep_dir / (name or str(number))
    (directory / ".hydra").mkdir(parents=True)
    (directory / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides), encoding="utf-8")
    (directory / ".hydra" / "hydra.yaml").write_text(
        yaml.safe_dump({"hydra": {"job": {"num": number}}}), encoding="utf-8"
    )
    if result is not None:
        write_result(directory / "result.json", {**result, "overrides": overrides})
    return directory


@pytest.fixture
def six(tmp_path: Path, language: dict[str, Any]) -> Path:
    """compression=none,int8,int4 precision=32,bf16-mixed; the last job failed."""
    numbers = {"none": (19_640_000, 8.912), "int8": (5_400_000, 8.934), "int4": (3_200_000, 9.8)}
    for index, (compression, precision) in enumerate((c, p) for c in numbers for p in ("32", "bf16-mixed")):
        result = deepcopy(language)
        size, quality = numbers[compression]
        result["size"].update(bytes_after=size, ratio=19_640_000 / size)
        result["quality"]["after"] = quality + index / 100
        if index == 5:
            result = new_result("run", [], {})
            result["status"] = "failed"
            result["error"] = {"type": "RuntimeError", "message": "out of memory\nand more"}
        job(tmp_path, index, [f"compression={compression}", f"precision={precision}", "trainer.max_steps=8"], result)
    return tmp_path


def render(rows: list[dict[str, Any]], width: int) -> list[str]:
    target = io.StringIO()
    Console(file=target, width=width, highlight=False).print(sweep_table(rows))
    return target.getvalue().splitlines()


def test_a_row_a_job_with_the_overrides_that_differ(six: Path) -> None:
    rows = collect(six)
    assert [row["job"] for row in rows] == list(range(6))
    assert [row["compression"] for row in rows] == ["none", "none", "int8", "int8", "int4", "int4"]
    assert [row["precision"] for row in rows] == ["32", "bf16-mixed"] * 3
    assert all("trainer.max_steps" not in row for row in rows)
    assert [row["status"] for row in rows] == ["ok"] * 5 + ["failed"]
    assert rows[2]["bytes_after"] == 5_400_000
    assert rows[2]["quality_before"] == 8.912
    assert rows[2]["label"] == "int8 32"
    assert rows[2]["error"] is None
    assert rows[5]["error"] == "out of memory\nand more"
    assert rows[5]["bytes_after"] is None
    assert len({tuple(row) for row in rows}) == 1


def test_the_files_hold_the_rows(six: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = finish(six)
    assert json.loads((six / "results.json").read_text(encoding="utf-8")) == rows
    with (six / "results.csv").open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == 6
    assert read[3]["compression"] == "int8"
    assert float(read[3]["ratio"]) == rows[3]["ratio"]
    assert read[5]["bytes_after"] == ""
    assert read[5]["error"] == "out of memory\nand more"
    assert (six / "pareto.png").read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert "#5 failed: out of memory and more" in text
    assert "5 of 6 jobs ok" in text
    assert "pareto.png" in text


@pytest.mark.parametrize("width", [100, 80])
def test_the_table_fits_and_says_the_essentials(six: Path, width: int) -> None:
    lines = render(collect(six), width)
    assert max(map(cell_len, lines)) <= width
    if width == 100:
        (line,) = [line for line in lines if line.split()[:3] == ["2", "int8", "32"]]
        assert " ".join(line.split()) == "2 int8 32 ok 8.954 0.47% worse 5.40 MB 3.64x 2.21x 74 s"
        assert "perplexity" in lines[1]


@pytest.mark.parametrize("kind", ["plan", "fit"])
def test_a_sweep_of_plans_shows_what_they_will_take(tmp_path: Path, kind: str) -> None:
    for number, (precision, train) in enumerate({"32": 9_000_000, "bf16-true": 5_000_000}.items()):
        result = new_result(kind, [], {})
        result["status"] = "ok"
        result["memory"]["predicted"].update(train=train, evaluate=7_000_000)
        if kind == "fit":
            result["fit"] = {"ranking": [{"changes": ["memory=lean"] if number else []}, {"changes": ["x=1"]}]}
        job(tmp_path, number, [f"precision={precision}"], result)
    job(tmp_path, 2, ["precision=foo"], None)
    rows = collect(tmp_path)
    assert [row["peak_predicted"] for row in rows] == [9_000_000, 7_000_000, None]
    lines = [" ".join(line.split()) for line in render(rows, 100)]
    chosen = [" as it is", " memory=lean", " chosen"] if kind == "fit" else ["", "", ""]
    assert lines[1] == f"# precision peak in{chosen[2]} time"
    assert lines[3] == f"0 32 ok 9.00 MB train{chosen[0]} -"
    assert lines[4] == f"1 bf16-true ok 7.00 MB evaluate{chosen[1]} -"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "left no result.json"),
        (b"", "not a readable result"),
        (b'{"schema": 1, "status": "ok", "qual', "not a readable result"),
        (b"\xff\x00\xfe", "not a readable result"),
        (b"null", "not an object"),
        (b'{"schema": 99}', "newer"),
        (b"{}", "says status None"),
        (b'{"status": "fine"}', "says status 'fine'"),
        (b'{"status": "failed"}', None),
        (b'{"status": "ok", "quality": [], "size": {"ratio": "x", "bytes_after": NaN}, "stages": 3}', None),
    ],
)
def test_a_missing_or_broken_result_is_a_row_not_an_end(six: Path, content: bytes | None, says: str | None) -> None:
    path = six / "3" / "result.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    rows = finish(six)
    assert len(rows) == 6
    assert rows[3]["compression"] == "int8"
    if says is not None:
        assert rows[3]["status"] == "failed"
        assert says in rows[3]["error"]
    json.loads((six / "results.json").read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize("content", [b"", b"- a\n  b: [", b"3", b"\xff\xfe", b"{a: b}", b"!!python/object:os.system x"])
def test_broken_overrides_cost_only_their_columns(six: Path, content: bytes) -> None:
    (six / "1" / ".hydra" / "overrides.yaml").write_bytes(content)
    rows = collect(six)
    assert rows[1]["status"] == "ok"
    assert rows[1]["compression"] is None
    assert rows[2]["compression"] == "int8"


def test_jobs_are_found_by_number_wherever_they_lie(tmp_path: Path, language: dict[str, Any]) -> None:
    job(tmp_path, 10, ["a=10"], language, "a=10")
    job(tmp_path, 9, ["a=9"], language, "z/deep/a=9")
    job(tmp_path, 2, ["a=2"], language, "2")
    bare = tmp_path / "11"
    bare.mkdir()
    write_result(bare / "result.json", language)
    (tmp_path / "2" / "stages" / "00-train").mkdir(parents=True)
    (tmp_path / "2" / "stages" / "00-train" / "result.json").write_text("{}", encoding="utf-8")
    (tmp_path / "multirun.yaml").touch()
    rows = collect(tmp_path)
    assert [row["job"] for row in rows] == [2, 9, 10, 11]
    assert [row["a"] for row in rows] == ["2", "9", "10", None]


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("compression=int8", ("compression", "int8")),
        ("+a.b=1", ("a.b", "1")),
        ("++a=x=y", ("a", "x=y")),
        ("~group", ("group", "deleted")),
        ("~group=x", ("group", "deleted")),
        ("a=", ("a", "")),
        ("/compression/magnitude@compression.p1=x", ("/compression/magnitude@compression.p1", "x")),
    ],
)
def test_overrides_split_into_key_and_value(text: str, pair: tuple[str, str]) -> None:
    assert split_override(text) == pair


def test_an_override_named_like_a_column_keeps_both(tmp_path: Path, language: dict[str, Any]) -> None:
    for number, name in enumerate(("run", "evaluate")):
        job(tmp_path, number, [f"job={name}", f"seconds={number}"], language)
    rows = collect(tmp_path)
    assert [row["job"] for row in rows] == [0, 1]
    assert [row["override:job"] for row in rows] == ["run", "evaluate"]
    assert [row["seconds"] for row in rows] == [74.0, 74.0]
    assert [row["override:seconds"] for row in rows] == ["0", "1"]


def test_a_sweep_of_two_tasks_says_so(tmp_path: Path, language: dict[str, Any], image: dict[str, Any]) -> None:
    job(tmp_path, 0, ["model=gpt"], language)
    job(tmp_path, 1, ["model=efficientnet"], image)
    rows = finish(tmp_path)
    assert [row["metric"] for row in rows] == ["perplexity", "accuracy"]
    text = "\n".join(render(rows, 100))
    assert "quality" in text
    assert "96.20%" in text
    assert (tmp_path / "pareto.png").exists()


def test_a_sweep_that_all_failed_has_no_plot_but_a_table(tmp_path: Path) -> None:
    for number in range(3):
        job(tmp_path, number, [f"a={number}"], None)
    rows = finish(tmp_path)
    assert not (tmp_path / "pareto.png").exists()
    assert list(sweep_lines(rows, tmp_path))[3] == "0 of 3 jobs ok"


def test_an_empty_sweep_leaves_empty_files(tmp_path: Path) -> None:
    assert finish(tmp_path / "nothing") == []
    assert json.loads((tmp_path / "nothing" / "results.json").read_text(encoding="utf-8")) == []


words = st.text(max_size=120)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.data(), st.lists(words, min_size=0, max_size=6, unique=True), st.sampled_from([80, 100]))
def test_the_table_fits_whatever_was_swept(data: st.DataObject, keys: list[str], width: int) -> None:
    number = st.none() | st.floats(allow_nan=False, allow_infinity=False)
    rows = []
    for index in range(data.draw(st.integers(1, 4))):
        row: dict[str, Any] = dict.fromkeys(sweep.FACTS)
        for key in ("quality_before", "quality_after", "bytes_after", "ratio", "speed_ratio", "seconds"):
            row[key] = data.draw(number)
        row |= {"metric": data.draw(words), "status": "ok", "error": data.draw(words)}
        free = [key for key in keys if key not in (*sweep.FACTS, "job", "label")]
        rows.append({"job": index, **{key: data.draw(words) for key in free}, "label": "", **row})
    assert max(map(cell_len, render(rows, width))) <= width
    assert all(cell_len(line) <= width for line in sweep_lines(rows, Path("/nowhere"), width))


def test_the_callback_never_raises(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    SweepCallback().on_multirun_end(config=None)
    (tmp_path / "file").touch()
    config = SimpleNamespace(hydra=SimpleNamespace(sweep=SimpleNamespace(dir=tmp_path / "file" / "below")))
    SweepCallback().on_multirun_end(config=config, config_name="config")
    assert caplog.text.count("could not be collected") == 2


def test_a_plot_that_fails_costs_neither_files_nor_table(
    six: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.report import plots

    def fail(*_: Any) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(plots, "pareto", fail)
    finish(six)
    assert (six / "results.csv").exists()
    text = capsys.readouterr().out
    assert "pareto.png could not be drawn: RuntimeError: no fonts" in text
    assert "5 of 6 jobs ok" in text


@pytest.fixture(autouse=True)
def fresh_console() -> Any:
    """The shared console keeps the standard output it was made with; each test has its own."""
    console.cache_clear()
    yield
    console.cache_clear()


APP = """
import json, os, sys
from pathlib import Path
import hydra
from hydra.core.hydra_config import HydraConfig

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config):
    directory = Path(HydraConfig.get().runtime.output_dir)
    if config.a == 2:
        raise RuntimeError("two is not allowed")
    from pipeline.report.result import new_result, write_result
    result = new_result("run", [], {})
    result["status"] = "ok"
    result["quality"].update(metric="perplexity", direction="lower", before=8.0, after=8.0 + config.a)
    result["size"].update(bytes_after=1000 * (4 - config.a))
    write_result(directory / "result.json", result)

main()
"""
CONFIG = """
a: 1
b: x
hydra:
  sweep:
    dir: swept/${now:%Y-%m-%d}/${now:%H-%M-%S-%f}
    subdir: ${hydra.job.num}
  callbacks:
    sweep:
      _target_: pipeline.report.sweep.SweepCallback
"""


def test_under_hydra_itself_a_sweep_ends_in_table_and_files(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text(textwrap.dedent(CONFIG), encoding="utf-8")
    (tmp_path / "app.py").write_text(textwrap.dedent(APP), encoding="utf-8")
    import os

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "app.py", "-m", "a=1,3", "b=x,y"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.rglob("results.json")
    rows = json.loads(results.read_text(encoding="utf-8"))
    assert [(row["a"], row["b"], row["status"]) for row in rows] == [
        ("1", "x", "ok"),
        ("1", "y", "ok"),
        ("3", "x", "ok"),
        ("3", "y", "ok"),
    ]
    assert (results.parent / "pareto.png").exists()
    assert (results.parent / "results.csv").exists()
    assert "4 of 4 jobs ok" in done.stdout
    assert str(results.relative_to(tmp_path)) in done.stdout
    assert all(cell_len(line) <= 100 for line in done.stdout.splitlines() if not line.startswith("["))
