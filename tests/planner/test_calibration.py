"""What runs measured beside their plans, kept for later plans on the same machine."""

import json
from pathlib import Path

import pytest

from pipeline.app import main
from pipeline.composing import compose
from pipeline.planner import calibration
from pipeline.planner.plan import plan

DIGITS = ["model=efficientnet", "data=digits", "trainer=smoke", "trainer.max_steps=4", "device=cpu"]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return calibration.place()


def test_it_takes_three_runs_of_a_kind_and_a_difference_to_correct_a_plan():
    assert calibration.correction([1.05, 1.05]) is None
    assert calibration.correction([1.0, 1.004, 0.999]) is None
    factor, spread = calibration.correction([1.04, 1.05, 1.08])
    assert factor == 1.05
    assert spread == pytest.approx(1.08 / 1.05 - 1)
    assert calibration.correction([1.05, 1.05, 1.05]) == (1.05, calibration.NEGLIGIBLE)  # alike so far


def test_only_the_latest_runs_are_kept_and_a_damaged_file_is_none(file: Path):
    for ratio in range(1, 31):
        calibration.remember(file, {"a": float(ratio)})
    assert calibration.ratios(file, "a") == [float(ratio) for ratio in range(11, 31)]
    assert calibration.ratios(file, "b") == []
    values = ("3", '["x", null]', "[NaN, Infinity, -1.0, 0.0]")
    for damaged in ("{", "[]", "[" * 100_000, *(f'{{"a": {value}}}' for value in values)):
        file.write_text(damaged)
        assert calibration.ratios(file, "a") == []
        calibration.remember(file, {"b": 1.0})
        assert calibration.ratios(file, "b") == [1.0]


def test_where_nothing_can_be_kept_nothing_is_and_the_run_is_not_lost(file: Path):
    file.mkdir(parents=True)
    calibration.remember(file, {"a": 1.0})
    assert calibration.ratios(file, "a") == []
    (file / "more").touch()
    calibration.remember(file / "more" / "calibration.json", {"a": 1.0})


def test_kinds_tell_models_precisions_and_links_apart():
    words = [DIGITS, [*DIGITS, "precision=bf16-mixed"], ["trainer=smoke", "device=cpu"], [*DIGITS, "compression=int8"]]
    assert len({calibration.kind(compose(w), "evaluate") for w in words}) == 4
    assert len({calibration.kind(compose(w), "train") for w in (words[0], words[3])}) == 1


def test_what_ranks_hold_says_nothing_about_one_device():
    words = [["device=cpu"], ["device=cpu", "parallelism=ddp"], ["device=cpu", "parallelism=fsdp"]]
    for phase in ("train", "validate", "save"):
        assert len({calibration.kind(compose(w), phase) for w in words}) == 3
    assert len({calibration.kind(compose(w), "evaluate") for w in words}) == 1  # on one device, whoever trained


def test_a_plan_is_corrected_by_what_runs_of_its_kind_measured_and_says_so(file: Path, tmp_path, monkeypatch):
    config = compose(DIGITS)
    data = config.data.open(config.model.tokenizer())
    before = plan(config, data).phases["train"]
    for ratio in (1.03, 1.04, 1.06):
        calibration.remember(file, {calibration.kind(config, "train"): ratio})
    after = plan(config, data).phases["train"]
    assert after.bytes == round(1.04 * before.bytes) == sum(after.kinds.values())
    assert (before.source, after.source) == ("traced", "calibrated")
    assert after.margin == pytest.approx(1.06 / 1.04 - 1)
    assert plan(compose([*DIGITS, "plan.calibrate=false"]), data).phases["train"].bytes == before.bytes
    monkeypatch.chdir(tmp_path)
    assert main([*DIGITS, "hydra.run.dir=run"]) == 0
    measured = json.loads((tmp_path / "run" / "result.json").read_text())["memory"]["measured"]["train"]
    assert calibration.ratios(file, calibration.kind(config, "train"))[-1] == pytest.approx(measured / before.bytes)
