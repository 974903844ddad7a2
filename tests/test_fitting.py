"""What a fit leaves behind."""

import gc
from functools import partial
from io import StringIO

import lightning.pytorch as lightning
import pytest
import torch
from rich.console import Console

from pipeline.app import compose
from pipeline.fitting import fit, seed_generators
from pipeline.report.progress import Progress
from pipeline.stage_input import prepared
from pipeline.tasks import lookup
from pipeline.walk import stages_of


def ready(directory, *words):
    """The model of a short run, and its fit, which takes what `fit` takes by name."""
    config = compose(["model=gpt_nano", "trainer=smoke", "device=cpu", *words])
    tokenizer = config.model.tokenizer()
    data = config.data.open(tokenizer)
    line = stages_of(config)
    model, context = prepared(config, directory, data, tokenizer, line, line[0])
    task = lookup.get("causal_lm")
    return model, partial(fit, config, line[0], model, task, data, context.architecture, directory)


def test_a_progress_bar_that_outlives_a_fit_keeps_neither_its_trainer_nor_the_optimizers_state(tmp_path):
    _, train = ready(tmp_path, "trainer.max_steps=1")
    progress = Progress({"train": 1}, "lines", target=Console(file=StringIO()))
    gc.collect()
    before = sum(type(thing) is lightning.Trainer for thing in gc.get_objects())
    train(progress=progress)
    gc.collect()
    assert sum(type(thing) is lightning.Trainer for thing in gc.get_objects()) == before


@pytest.mark.parametrize("precision", ["32", "16-mixed"])
def test_no_gradient_outlives_a_fit(precision, tmp_path):
    model, train = ready(tmp_path, f"precision={precision}")
    train()
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_generators_are_seeded_as_torch_seeds_them(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(1_000_003)
    expected = torch.rand(3), torch.rand(3, device=device)
    torch.manual_seed(0)
    seed_generators(1_000_003, torch.device(device))
    assert torch.equal(torch.rand(3), expected[0])
    assert torch.equal(torch.rand(3, device=device), expected[1])
