"""Steps that are timed are real ones, in this process and on ranks."""

import pytest
import torch

from pipeline.composing import compose
from pipeline.planner import timing
from pipeline.report.metrics_file import read_metrics
from pipeline.tasks import lookup

GPT = ["model=gpt_nano", "trainer=smoke", "device=cpu"]


def time_of(config, steps):
    return timing.measured(config, config.data.open(config.model.tokenizer()), lookup.get(config.data.task), steps)


def test_timing_trains_for_real_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timing.tempfile, "tempdir", str(tmp_path))
    assert time_of(compose(GPT), steps=1) > 0
    assert list(tmp_path.iterdir()) == []
    assert type(torch.ones(1)) is torch.Tensor


@pytest.mark.slow
@pytest.mark.parametrize("words", [GPT, [*GPT[1:], "model=efficientnet", "data=digits"]], ids=["gpt", "efficientnet"])
def test_ranks_are_started_and_their_quickest_step_is_told(words, tmp_path, monkeypatch):
    monkeypatch.setattr(timing.tempfile, "tempdir", str(tmp_path))
    rates = []
    monkeypatch.setattr(timing, "read_metrics", lambda path: rates.extend(read_metrics(path)) or rates)
    config = compose([*words, "parallelism=ddp", "parallelism.devices=2", "compression=int8"])
    took = time_of(config, steps=2)
    warm = [row for row in rates if row.step > timing.WARM_FROM]
    per_step = config.trainer.batch_size * (config.data.sequence_length if words is GPT else 1)
    assert [row.step for row in warm] == [6, 7]
    assert took == pytest.approx(min(per_step / row.tokens_per_second for row in warm))
    assert list(tmp_path.iterdir()) == []
