"""The program from the outside: exit codes, error lines, help, completion, sweeps, resume, signals."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import app, recipes
from pipeline.errors import ArtifactError, ConfigError, ReceiptError
from pipeline.schema import RunConfig, values_of

ROOT = Path(__file__).resolve().parent.parent
Runner = Callable[[RunConfig, Path], dict[str, Any]]


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory of its own, and logging at the level that it had."""
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    level = root.level
    yield tmp_path
    root.setLevel(level)


@pytest.fixture
def runs(outside: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[RunConfig, Path]]:
    """A runner that only remembers what it was asked."""
    seen: list[tuple[RunConfig, Path]] = []

    def run(config: RunConfig, run_dir: Path) -> dict[str, Any]:
        seen.append((config, run_dir))
        (run_dir / "result.json").write_text('{"schema": 1, "status": "ok"}')
        return {"status": "ok"}

    install(monkeypatch, run)
    return seen


def install(monkeypatch: pytest.MonkeyPatch, run: Runner) -> None:
    module = types.ModuleType("pipeline.runner")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pipeline.runner", module)


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(config: RunConfig, run_dir: Path) -> dict[str, Any]:
        raise error

    install(monkeypatch, run)


def program(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *argv],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )


def test_a_python_without_our_packages_is_told_what_to_type() -> None:
    done = subprocess.run(
        [sys.executable, "-S", str(ROOT / "run.py"), "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "pip install -e . here first" in line


class TestRun:
    def test_hands_the_frozen_config_to_the_runner_in_a_fresh_directory(
        self, runs: list[tuple[RunConfig, Path]], outside: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert app.main(["compression=[magnitude,int8]", "precision=32", "prompt_file=null", "job=run"]) == 2
        assert app.main(["compression=[magnitude,int8]", "precision=32"]) == 0
        ((config, run_dir),) = runs
        assert list(config.chain) == ["magnitude", "int8"]
        assert config.overrides == ("compression=[magnitude,int8]", "precision=32")
        assert not config.resume
        assert not config.sweep
        assert run_dir.is_relative_to(outside / "outputs")
        assert (run_dir / ".hydra" / "config.yaml").is_file()
        assert (run_dir / "run.log").is_file()
        assert capsys.readouterr().out == ""

    def test_two_runs_in_one_second_have_directories_of_their_own(self, runs: list[tuple[RunConfig, Path]]) -> None:
        assert app.main([]) == app.main([]) == 0
        assert len({run_dir for _, run_dir in runs}) == 2

    def test_a_hostile_prompt_arrives_and_is_recorded_as_typed(
        self, runs: list[tuple[RunConfig, Path]], outside: Path
    ) -> None:
        (outside / "an, artifact = (1)").mkdir()
        (outside / "an, artifact = (1)" / "manifest.json").write_text("{}")
        argv = ["job=generate", "artifact=an, artifact = (1)", "prompt=def f(x, y=2): \"a\" ${z} 'q' \\ "]
        assert app.main(argv) == 0
        config, _ = runs[0]
        assert config.prompt == argv[2].removeprefix("prompt=")
        assert config.artifact == str(outside / "an, artifact = (1)")
        assert config.overrides == tuple(argv)

    def test_every_recipe_file_is_copied(self, runs: list[tuple[RunConfig, Path]], outside: Path) -> None:
        (outside / "base.yaml").write_text("trainer: {seed: 3}\n")
        (outside / "top one.yaml").write_text("defaults: [base, int8]\n")
        assert app.main(["recipe=top one.yaml"]) == 0
        copies = sorted((runs[0][1] / ".hydra").glob("recipe.*"))
        assert {copy.name.split(".", 2)[2] for copy in copies} == {"base.yaml", "top one.yaml", "int8.yaml"}
        assert "seed: 3" in next(copy for copy in copies if "base" in copy.name).read_text()

    def test_a_bad_config_makes_no_directory(self, runs: list[tuple[RunConfig, Path]], outside: Path) -> None:
        assert app.main(["optimizer.lrr=1"]) == 2
        assert runs == []
        assert list(outside.iterdir()) == []


class TestExitCodes:
    @pytest.mark.parametrize(
        ("error", "code", "line"),
        [
            (ConfigError(["a=1 must be 2", "b=3 must be 4"]), 2, "error: b=3 must be 4"),
            (ReceiptError("size.ratio 1.1 is below gate.min_ratio 3.5"), 3, "error: size.ratio 1.1 is below"),
            (
                ArtifactError("model.safetensors is truncated"),
                1,
                "error: model.safetensors is truncated (log: outputs/",
            ),
            (RuntimeError("mat1 and mat2\ncannot"), 1, "error: RuntimeError: mat1 and mat2 cannot (log: outputs/"),
            (MemoryError(), 1, "error: MemoryError (log: outputs/"),
            (KeyboardInterrupt(), 130, "stopped by SIGINT"),
            (SystemExit(1), 1, ""),
        ],
    )
    def test_what_a_run_raises_is_one_line_and_a_code(
        self,
        outside: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        error: BaseException,
        code: int,
        line: str,
    ) -> None:
        failing(monkeypatch, error)
        assert app.main([]) == code
        told = capsys.readouterr().err
        assert "Traceback" not in told
        assert (told.splitlines() or [""])[-1].startswith(line)
        if code == 1 and line:
            assert f"{type(error).__name__}" in next(outside.rglob("run.log")).read_text()

    def test_a_gate_that_is_not_met(self, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        install(monkeypatch, lambda config, run_dir: {"status": "gate"})
        assert app.main([]) == 3

    @pytest.mark.parametrize("variable", ["HYDRA_FULL_ERROR", "LEANFIT_DEBUG"])
    def test_a_traceback_for_those_who_ask(
        self, outside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str
    ) -> None:
        monkeypatch.setenv(variable, "1")
        failing(monkeypatch, RuntimeError("boom"))
        assert app.main([]) == 1
        assert "raise error" in capsys.readouterr().err
        assert os.environ[variable] == "1"

    def test_sigterm_is_143_whatever_a_library_makes_of_it(
        self, outside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def run(config: RunConfig, run_dir: Path) -> dict[str, Any]:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except SystemExit:
                raise SystemExit(0) from None
            return {}

        before = signal.getsignal(signal.SIGTERM)
        install(monkeypatch, run)
        assert app.main([]) == 143
        assert "stopped by SIGTERM" in capsys.readouterr().err
        assert signal.getsignal(signal.SIGTERM) is before

    def test_ctrl_c_is_130_even_if_a_library_exits_with_1(self, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def run(config: RunConfig, run_dir: Path) -> dict[str, Any]:
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                raise SystemExit(1) from None
            return {}

        install(monkeypatch, run)
        assert app.main([]) == 130

    def test_the_environment_and_argv_are_as_before(
        self, runs: list[tuple[RunConfig, Path]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        argv = list(sys.argv)
        assert app.main([]) == 0
        assert sys.argv == argv
        assert "HYDRA_FULL_ERROR" not in os.environ


class TestSweep:
    def test_every_job_runs_and_a_bad_one_is_recorded_as_failed(
        self, runs: list[tuple[RunConfig, Path]], outside: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert app.main(["recipe=prune_then_int8", "-m", "compression=none,int9,int8", "precision=32,bf16-mixed"]) == 1
        assert [list(config.chain) for config, _ in runs] == [[], [], ["int8"], ["int8"]]
        assert all(config.sweep for config, _ in runs)
        assert [config.choices["precision"] for config, _ in runs] == ["32", "bf16-mixed"] * 2
        results = [json.loads(file.read_text()) for file in sorted(outside.rglob("result.json"))]
        assert [result["status"] for result in results] == ["ok", "ok", "failed", "failed", "ok", "ok"]
        assert results[2]["error"]["type"] == "ConfigError"
        assert "int9" in results[2]["error"]["message"]
        assert results[2]["overrides"] == ["recipe=prune_then_int8", "compression=int9", "precision=32"]
        told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")]
        told, failures = told[:6], told[6:]
        assert [line.split()[0] for line in told] == [f"#{number}" for number in range(6)]
        assert [line.split()[0] for line in failures] == ["#2", "#3"]
        assert ["int9" in line and "failed" in line for line in told] == [False, False, True, True, False, False]

    def test_a_failing_job_does_not_stop_the_rest(
        self, outside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        seen = []

        def run(config: RunConfig, run_dir: Path) -> dict[str, Any]:
            seen.append(config.trainer.seed)
            if config.trainer.seed == 0:
                raise RuntimeError("boom")
            (run_dir / "result.json").write_text('{"schema": 1, "status": "ok"}')
            return {"status": "ok"}

        install(monkeypatch, run)
        assert app.main(["-m", "trainer.seed=0,1,2"]) == 1
        assert seen == [0, 1, 2]
        assert "#0 trainer.seed=0 failed: boom" in capsys.readouterr().out

    def test_all_jobs_fine_is_0_and_an_unmet_gate_3(self, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def run(config: RunConfig, run_dir: Path) -> dict[str, Any]:
            status = "gate" if config.trainer.seed == 7 else "ok"
            (run_dir / "result.json").write_text(json.dumps({"schema": 1, "status": status}))
            return {"status": status}

        install(monkeypatch, run)
        assert app.main(["-m", "trainer.seed=1,2"]) == 0
        assert app.main(["-m", "trainer.seed=1,7"]) == 3

    @pytest.mark.parametrize(
        "argv", [["-m", "compression=none,int8", "optimizer.lrr=1"], ["-m", "compression=int9,int7"], ["-m", "a b"]]
    )
    def test_a_sweep_none_of_whose_jobs_can_run_is_2_at_once(
        self, runs: list[tuple[RunConfig, Path]], outside: Path, argv: list[str]
    ) -> None:
        assert app.main(argv) == 2
        assert runs == []
        assert list(outside.iterdir()) == []

    def test_several_recipes_are_swept(self, runs: list[tuple[RunConfig, Path]]) -> None:
        assert app.main(["-m", "recipe=int8,prune_then_int8"]) == 0
        assert [list(config.chain) for config, _ in runs] == [["int8"], ["magnitude", "int8"]]

    def test_a_raw_value_is_no_sweep(self, runs: list[tuple[RunConfig, Path]], outside: Path) -> None:
        (outside / "a").mkdir()
        (outside / "a" / "manifest.json").write_text("{}")
        assert app.main(["-m", "job=generate", "artifact=a", "prompt=x, y ${z} = \\ ", "trainer.seed=1,2"]) == 0
        assert [config.prompt for config, _ in runs] == ["x, y ${z} = \\ "] * 2


class TestResume:
    def test_goes_on_in_place(self, runs: list[tuple[RunConfig, Path]]) -> None:
        assert app.main(["trainer.max_steps=40", "compression=int8"]) == 0
        config, run_dir = runs[0]
        (run_dir / recipes.LOCK).write_text(recipes.lock_text(values_of(config), config.choices, {"results": {}}))
        before = (run_dir / ".hydra" / "overrides.yaml").read_text()
        assert app.main([f"resume={run_dir}", "trainer.max_steps=80"]) == 0
        again, there = runs[1]
        assert there == run_dir
        assert again.resume
        assert again.trainer.max_steps == 80
        assert again.overrides == (f"resume={run_dir}", "trainer.max_steps=80")
        assert again.choices["recipe"] is None
        assert config.choices["recipe"] is None
        assert list(again.chain) == ["int8"]
        assert (run_dir / ".hydra" / "overrides.yaml").read_text() == before
        assert app.main([f"resume={run_dir}"]) == 0
        assert sorted(path.name for path in run_dir.glob(".hydra*")) == [
            ".hydra",
            ".hydra-resumed-1",
            ".hydra-resumed-2",
        ]

    def test_another_model_is_refused(
        self, runs: list[tuple[RunConfig, Path]], capsys: pytest.CaptureFixture[str], outside: Path
    ) -> None:
        assert app.main([f"resume={outside}", "model=llama"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2
        assert "nothing to resume" in lines[0]
        assert lines[1].startswith("error: model=llama: a resumed run takes only")


class TestStopped:
    """Where a run that was stopped says how to go on with it."""

    @pytest.mark.parametrize(
        ("argv", "leaves", "told"),
        [
            ([], [], False),
            ([], [recipes.LOCK], False),
            ([], ["checkpoints/last.ckpt"], False),
            ([], [recipes.LOCK, "checkpoints/last.ckpt"], True),
            ([], [recipes.LOCK, "stages/00-train/manifest.json"], True),
            (["-m", "trainer.seed=1,2"], [recipes.LOCK, "checkpoints/last.ckpt"], False),
            (["job=evaluate", "artifact=a"], [recipes.LOCK, "checkpoints/last.ckpt"], False),
        ],
    )
    def test_resume_is_offered_where_there_is_something_to_resume(
        self,
        outside: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        argv: list[str],
        leaves: list[str],
        told: bool,
    ) -> None:
        def run(config: RunConfig, run_dir: Path) -> dict[str, Any]:
            for name in leaves:
                (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
                (run_dir / name).touch()
            raise KeyboardInterrupt

        (outside / "a").mkdir()
        (outside / "a" / "manifest.json").write_text("{}")
        install(monkeypatch, run)
        assert app.main(argv) == 130
        assert ("(resume=" in capsys.readouterr().err) == told


class TestRunDirectory:
    def test_a_failed_job_does_not_pass_for_an_earlier_one_in_its_directory(
        self, outside: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def good(config: RunConfig, run_dir: Path) -> dict[str, Any]:
            (run_dir / "result.json").write_text('{"schema": 1, "status": "ok"}')
            return {"status": "ok"}

        argv = ["-m", "hydra.sweep.dir=here", "trainer.seed=1,2"]
        install(monkeypatch, good)
        assert app.main(argv) == 0
        failing(monkeypatch, RuntimeError("boom"))
        assert app.main(argv) == 1
        results = [json.loads((outside / "here" / str(job) / "result.json").read_text()) for job in range(2)]
        assert [result["status"] for result in results] == ["failed", "failed"]
        install(monkeypatch, good)
        assert app.main(["-m", "hydra.sweep.dir=here", "compression=none,int9"]) == 1

    def test_a_job_of_a_sweep_leaves_alone_the_directory_that_another_run_is_at_work_in(
        self, runs: list[tuple[RunConfig, Path]], outside: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        theirs = outside / "here" / "0"
        theirs.mkdir(parents=True)
        held = os.open(theirs, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)
        try:
            assert app.main(["-m", "hydra.sweep.dir=here", "trainer.seed=1,2"]) == 1
            assert not (theirs / "result.json").exists()
            assert "another run is at work" in capsys.readouterr().out
            (theirs / "result.json").write_text('{"schema": 1, "status": "ok"}')  # the other one is done meanwhile
            assert app.main(["-m", "hydra.sweep.dir=here", "trainer.seed=1,2"]) == 1
        finally:
            os.close(held)
        assert len(runs) == 2, "only the other job ran"

    def test_a_resumed_run_keeps_its_result_until_the_runner_writes_another(
        self, runs: list[tuple[RunConfig, Path]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert app.main([]) == 0
        config, run_dir = runs[0]
        (run_dir / recipes.LOCK).write_text(recipes.lock_text(values_of(config), config.choices, {}))
        failing(monkeypatch, ConfigError("no"))
        assert app.main([f"resume={run_dir}"]) == 2
        assert (run_dir / "result.json").is_file()

    @pytest.mark.parametrize("argv", [["hydra.run.dir=file/x"], ["hydra.run.dir=file"], ["-m", "hydra.sweep.dir=file"]])
    def test_one_that_cannot_be_made_is_2_and_named(
        self,
        runs: list[tuple[RunConfig, Path]],
        outside: Path,
        capsys: pytest.CaptureFixture[str],
        argv: list[str],
    ) -> None:
        (outside / "file").touch()
        assert app.main(argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {argv[-1].partition('=')[0]}: ")
        assert "file" in line
        assert runs == []

    def test_tips_of_libraries_stay_out_of_the_log(self, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def run(config: RunConfig, run_dir: Path) -> dict[str, Any]:
            for name in app.ADVERTISERS:
                logger = logging.getLogger(name)
                monkeypatch.setattr(logger, "propagate", True)
                logger.warning("💡 Tip: For cloud logging, try installing [litlogger](https://x) to enable it")
                logger.warning("GPU available: False")
            return {"status": "ok"}

        install(monkeypatch, run)
        assert app.main([]) == 0
        (log,) = outside.rglob("run.log")
        assert "litlogger" not in log.read_text()
        assert log.read_text().count("GPU available") == 2


@pytest.mark.started
class TestProgram:
    """As a process of its own: what is imported, what is printed."""

    @pytest.mark.parametrize(
        ("argv", "lines"),
        [
            (["compresion=int8"], ["error: compresion=int8: no such key; "]),
            (["compression=int9"], ["error: compression=int9: no such choice; choose one of distill, fp8, int4"]),
            (["optimizer.lrr=1"], ["error: optimizer.lrr=1: no such key; "]),
            (["precision=fp8-mixed", "device=cpu"], ["error: precision=fp8-mixed: device=cpu has no float8 kernels"]),
            (["data=digits"], ["error: data=digits is for image classification"]),
            (["-m", "compression=int9,int7"], ["error: compression=int9", "error: compression=int7"]),
            (["resume=/nowhere"], ["error: resume=/nowhere: nothing to resume"]),
            (["recipe=/no/such.yaml"], ["error: recipe=/no/such.yaml: no such file"]),
            (["--config-dir", "/nowhere"], ["error: --config-dir /nowhere: no such directory"]),
            (["optimizer.lrr=1", "model.layers=a", "compression=int9"], ["error: "] * 3),
        ],
    )
    def test_a_static_mistake_is_2_with_one_line_each_and_no_torch(self, argv: list[str], lines: list[str]) -> None:
        told = self.refused(argv)
        assert len(told) == len(lines), told
        assert all(line.startswith(start) for line, start in zip(told, lines, strict=True)), told

    def refused(self, argv: list[str]) -> list[str]:
        """What a command line is told that ends with exit code 2, without anything heavy imported."""
        code = (
            "import sys; from pipeline.app import main; code = main(sys.argv[1:]); "
            "heavy = [m for m in ('torch', 'lightning', 'transformers', 'numpy') if m in sys.modules]; "
            "assert not heavy, heavy; sys.exit(code)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
        )
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        return done.stderr.splitlines()

    def test_to_resume_a_finished_run_is_refused_without_torch(self, tmp_path: Path) -> None:
        config = app.compose(["trainer.max_steps=40", "device=cpu"])
        (tmp_path / recipes.LOCK).write_text(recipes.lock_text(values_of(config), config.choices, {}))
        (tmp_path / "result.json").write_text('{"status": "ok", "train": {"steps": 40}}')
        (line,) = self.refused([f"resume={tmp_path}"])
        assert line == (
            f"error: resume={tmp_path}: nothing to resume, the run is over; to train longer say trainer.max_steps=MORE"
        )
        (line,) = self.refused([f"resume={tmp_path}", "trainer.max_steps=20"])
        assert line.endswith("it has trained 40 steps already, so trainer.max_steps=20 cannot be met")

    def test_cfg_prints_the_config_without_running(self) -> None:
        done = program("--cfg", "job", "compression=int8", "--resolve")
        assert done.returncode == 0, done.stderr
        assert yaml.safe_load(done.stdout)["compression"]["int8"]["name"] == "int8"
        assert program("--cfg", "job", "optimizer.lrr=1").returncode == 2

    def test_resolve_needs_cfg(self, runs: list[tuple[RunConfig, Path]], capsys: pytest.CaptureFixture[str]) -> None:
        assert app.main(["--resolve"]) == 2
        assert "write --cfg job --resolve" in capsys.readouterr().err
        assert runs == []

    def test_info_and_hydras_help(self) -> None:
        assert "precision/32-true" in program("--info", "defaults").stdout
        assert "Hydra" in program("--hydra-help").stdout

    def test_help_explains_every_choice_within_100_columns(self) -> None:
        from pipeline.registry import PACKAGES, available

        done = program("--help")
        assert done.returncode == 0
        assert max(map(len, done.stdout.splitlines())) <= 100
        for group in PACKAGES:
            for choice in available(group):
                assert any(choice in line.split() for line in done.stdout.splitlines()), (group, choice)
        for name in recipes.listed():
            assert f"  {name}" in done.stdout
        for words in (
            "trainer:",
            "max_steps=150",
            "devices=1",
            "* 32",
            "* gpt",
            "resume=",
            "job=evaluate",
            "Exit codes",
        ):
            assert words in done.stdout

    @pytest.mark.parametrize(
        ("typed", "offered"),
        [
            ("compression=int8_s", "compression=int8_smoothquant compression=int8_static"),
            ("recipe=prune", "recipe=prune_then_int8"),
            ("model.lay", "model.layers="),
            ("precision=32", "precision=32 precision=32-true"),
        ],
    )
    def test_completion(self, typed: str, offered: str) -> None:
        done = program("-sc", "query=bash", COMP_LINE=f"python run.py {typed}")
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == offered.split()

    def test_completion_recognises_run_py(self) -> None:
        assert "@hydra.main" in (ROOT / "run.py").read_text()

    def test_a_further_folder_adds_choices(self, tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "mine.yaml").write_text("defaults: [gpt, _self_]\nlayers: 3\n")
        done = program("model=mine", "--config-dir", str(tmp_path), "--cfg", "job")
        assert yaml.safe_load(done.stdout)["model"]["layers"] == 3
        (tmp_path / "model" / "mine.yaml").write_text("defaults: [gpt, _self_]\nlayer: 3\n")
        done = program("model=mine", f"--config-dir={tmp_path}")
        assert done.returncode == 2
        assert "model.layer=3: no such key; " in done.stderr
        assert str(tmp_path / "model" / "mine.yaml") in done.stderr
