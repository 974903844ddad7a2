"""Runs that have ended, or went too far, are not resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.composing import compose
from pipeline.resuming import finished_run


@pytest.mark.parametrize(
    ("written", "over"),
    [
        ('{"status": "ok", "train": {"steps": 40}}', "the run is over"),
        ('{"status": "ok", "train": {"steps": 41}}', "has trained 41 steps already, so trainer.max_steps=40 cannot"),
        ('{"status": "ok", "train": {"steps": 39}}', ""),
        ('{"status": "gate", "train": {"steps": 40}}', ""),
        ('{"status": "failed", "train": null}', ""),
        ('{"status": "ok"', ""),
        ("[]", ""),
        (None, ""),
    ],
)
def test_a_finished_run_is_not_resumed(written: str | None, over: str, tmp_path: Path) -> None:
    plain = compose(["device=cpu"])
    if written is not None:
        (tmp_path / "result.json").write_text(written)
    told = finished_run(replace(plain, trainer=replace(plain.trainer, max_steps=40)), tmp_path)
    assert len(told) == bool(over)
    assert all(over in line and line.startswith(f"resume={tmp_path}: ") for line in told)


@pytest.mark.parametrize(
    ("steps", "fix"), [("null", ""), ("0", ""), ("40", "; to train longer say trainer.max_steps=MORE")]
)
def test_only_a_run_that_trained_is_told_how_to_train_longer(steps: str, fix: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(f'{{"status": "ok", "train": {{"steps": {steps}}}}}')
    plain = compose(["device=cpu"])
    asked = replace(plain, trainer=replace(plain.trainer, max_steps=40 if fix else 0))
    assert finished_run(asked, tmp_path) == [f"resume={tmp_path}: nothing to resume, the run is over{fix}"]
