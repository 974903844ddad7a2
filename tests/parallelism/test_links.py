"""Links that train, in two processes (gloo) against one with the same global batch, as whole runs."""

import csv
from pathlib import Path

import pytest
import torch

import pipeline
from pipeline.app import main
from pipeline.report.result import read_result

TINY = [
    "model=gpt_nano", "trainer=smoke", "trainer.log_every=1", "data.evaluation_tokens=1024", "device=cpu",
    "trainer.max_steps=0", "trainer.micro_batch_size=4",
]  # fmt: skip

CHAIN = "compression=[structured,magnitude,distill,int4_qat]"
SETTINGS = ["structured.steps=3", "magnitude.steps=4", "distill.steps=3", "int4_qat.steps=3"]
CASES = {
    "ddp": [CHAIN, *(f"compression.{key}" for key in SETTINGS), "compression.magnitude.schedule=cubic"],
    "fsdp": [CHAIN, *(f"compression.{key}" for key in SETTINGS)],
}


def losses(directory: Path) -> dict[tuple[str, str], float]:
    with (directory / "metrics.csv").open() as file:
        return {(row["stage"], row["step"]): float(row["loss"]) for row in csv.DictReader(file)}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", CASES)
def test_links_train_in_two_processes_as_in_one(strategy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("single", strategy):
        assert main([*TINY, *CASES[strategy], f"parallelism={name}", f"hydra.run.dir={tmp_path / name}"]) == 0
    alone, together = losses(tmp_path / "single"), losses(tmp_path / strategy)
    assert alone.keys() == together.keys()
    for (stage, step), loss in alone.items():
        # Rounding to a grid makes whole steps of differences in the last digit.
        near = 2e-4 if stage.endswith("_qat") else 1e-5
        assert together[stage, step] == pytest.approx(loss, rel=near), (stage, step)
    one, two = (read_result(tmp_path / name / "result.json") for name in ("single", strategy))
    assert two["parallelism"] == {"strategy": strategy, "devices": 2, "nodes": 1}
    assert two["artifact"]["reload"] == {"ok": True, "max_abs_diff": 0.0}
    assert [stage["train"]["samples"] for stage in two["stages"]] == [s["train"]["samples"] for s in one["stages"]]
    assert two["quality"]["after"] == pytest.approx(one["quality"]["after"], rel=1e-3)
    ids = torch.arange(32)[None]
    first, second = (pipeline.load(tmp_path / name / "artifact")(input_ids=ids).logits for name in ("single", strategy))
    assert (first - second).abs().max() < 0.05 * first.abs().max()


@pytest.mark.slow
def test_a_teacher_is_measured_in_two_processes_as_it_is_planned(tmp_path):
    words = ["compression=distill", "compression.distill.steps=3"]
    asked = [*TINY, *words, "parallelism=ddp", "plan.calibrate=false", f"hydra.run.dir={tmp_path}"]
    assert main(asked) == 0
    (stage,) = read_result(tmp_path / "result.json")["stages"]
    assert stage["memory"]["train"] == pytest.approx(stage["memory"]["train_predicted"], rel=0.005)


@pytest.mark.slow
def test_what_a_pruner_on_a_schedule_finds_in_two_processes_is_told(tmp_path):
    words = ["compression=sparsegpt", "compression.sparsegpt.schedule=cubic", "compression.sparsegpt.steps=3"]
    assert main([*TINY, *words, "parallelism=ddp", "plan.calibrate=false", f"hydra.run.dir={tmp_path}"]) == 0
    (stage,) = read_result(tmp_path / "result.json")["stages"]
    assert stage["detail"]["damping_largest"] == 0.01
    assert stage["detail"]["by_magnitude"] == []
