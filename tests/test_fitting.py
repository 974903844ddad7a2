"""What a fit leaves behind."""

import gc
from io import StringIO

import lightning.pytorch as lightning
import pytest
from rich.console import Console

from pipeline.app import compose
from pipeline.fitting import fit
from pipeline.report.progress import Progress
from pipeline.stage_input import prepared
from pipeline.tasks import lookup
from pipeline.walk import stages_of


def test_a_progress_bar_that_outlives_a_fit_keeps_neither_its_trainer_nor_the_optimizers_state(tmp_path):
    config = compose(["model=gpt_nano", "trainer=smoke", "trainer.max_steps=1", "device=cpu"])
    tokenizer = config.model.tokenizer()
    data = config.data.open(tokenizer)
    line = stages_of(config)
    model, context = prepared(config, tmp_path, data, tokenizer, line, line[0])
    progress = Progress({"train": 1}, "lines", target=Console(file=StringIO()))
    task = lookup.get("causal_lm")
    gc.collect()
    before = sum(type(thing) is lightning.Trainer for thing in gc.get_objects())
    fit(config, line[0], model, task, data, context.architecture, tmp_path, progress=progress)
    gc.collect()
    assert sum(type(thing) is lightning.Trainer for thing in gc.get_objects()) == before


@pytest.mark.parametrize("precision", ["32", "16-mixed"])
def test_no_gradient_outlives_a_fit(precision, tmp_path):
    config = compose(["model=gpt_nano", "trainer=smoke", "device=cpu", f"precision={precision}"])
    tokenizer = config.model.tokenizer()
    data = config.data.open(tokenizer)
    line = stages_of(config)
    model, context = prepared(config, tmp_path, data, tokenizer, line, line[0])
    fit(config, line[0], model, lookup.get("causal_lm"), data, context.architecture, tmp_path)
    assert all(weight.grad is None for weight in model.parameters())
