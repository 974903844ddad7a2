"""What a fit leaves behind."""

import gc
import shutil
import warnings
import weakref
from functools import partial
from io import StringIO

import lightning.pytorch as lightning
import pytest
import torch
from rich.console import Console

from pipeline import checkpoints
from pipeline.composing import compose
from pipeline.fitting import TaskModule, fit, seed_generators
from pipeline.last_step import SaveWhereMemoryEnds
from pipeline.report.metrics_file import read_metrics
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
    task = lookup.get(config.data.task)
    return model, partial(fit, config, line[0], model, task, data, context.architecture, directory)


def test_a_progress_bar_that_outlives_a_fit_keeps_neither_its_trainer_nor_the_optimizers_state(tmp_path):
    _, train = ready(tmp_path, "trainer.max_steps=1")
    progress = Progress({"train": 1}, "lines", target=Console(file=StringIO()))
    gc.collect()
    before = sum(type(thing) is lightning.Trainer for thing in gc.get_objects())
    train(progress=progress)
    gc.collect()
    assert sum(type(thing) is lightning.Trainer for thing in gc.get_objects()) == before


def test_where_slurm_is_installed_a_fit_does_not_warn_that_srun_has_not_started_it(tmp_path, monkeypatch):
    for name in ("SLURM_NTASKS", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    _, train = ready(tmp_path, "trainer.max_steps=1")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*srun")
        train()


def test_a_progress_bar_that_outlives_a_fit_keeps_nothing_that_the_fit_held_beside_its_model(tmp_path):
    _, train = ready(tmp_path, "trainer.max_steps=4")
    progress = Progress({"train": 4}, "lines", target=Console(file=StringIO()))
    teacher = torch.nn.Linear(4, 4)
    gone = weakref.ref(teacher)
    train(progress=progress, beside=teacher.parameters)
    del teacher
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("precision", ["32", "16-mixed"])
def test_no_gradient_outlives_a_fit(precision, tmp_path):
    model, train = ready(tmp_path, f"precision={precision}")
    train()
    assert all(weight.grad is None for weight in model.parameters())


class Ends(lightning.Callback):
    """Ends a fit by `error` in the step after `step`, within its second micro batch where it has more than one."""

    def __init__(self, step, error, hook="on_before_backward"):
        self.step, self.error, self.hook = step, error, hook
        setattr(self, hook, self.end)

    def on_train_start(self, trainer, module):
        if self.hook == "after the optimizer's step":
            trainer.optimizers[0].register_step_post_hook(lambda *_: self.end(trainer))

    def end(self, trainer, *_):
        parts = trainer.accumulate_grad_batches
        if trainer.global_step == self.step and trainer.fit_loop.batch_idx % parts == parts - 1:
            raise self.error


@pytest.mark.parametrize(("first", "second"), [(8, 4), (4, 8), (2, 8), (8, 2)])
def test_a_fit_goes_on_from_the_same_step_with_another_micro_batch(first, second, tmp_path):
    words = ["precision=64-true", "trainer.batch_size=8", "trainer.max_steps=8", "trainer.log_every=4"]
    words += ["trainer.evaluate_every=2", "trainer.checkpoint_every=3"]
    whole, train = ready(tmp_path / "whole", *words)
    train()
    _, train = ready(tmp_path / "cut", *words, f"trainer.micro_batch_size={first}")
    with pytest.raises(RuntimeError, match="cut off"):
        train(callbacks=[Ends(4, RuntimeError("cut off"))])
    model, train = ready(tmp_path / "cut", *words, f"trainer.micro_batch_size={second}")
    train(resume=True)
    torch.testing.assert_close(model.state_dict(), whole.state_dict(), rtol=1e-9, atol=1e-12)
    rows = [read_metrics(tmp_path / name / "metrics.csv") for name in ("whole", "cut")]
    assert [[row.step for row in found] for found in rows] == [[4, 8], [4, 8]]
    assert rows[1][1].loss == pytest.approx(rows[0][1].loss, rel=1e-6)


@pytest.mark.parametrize(
    "words",
    [
        ["trainer.micro_batch_size=4"],
        ["precision=16-mixed", "model.dropout=0.1", "trainer.micro_batch_size=2"],
        ["model=efficientnet", "data=digits", "trainer.micro_batch_size=4"],  # running statistics
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("hook", ["on_before_backward", "on_after_backward"])
def test_memory_that_runs_out_within_a_step_costs_that_step_alone(words, hook, tmp_path):
    words = [*words, "trainer.batch_size=8", "trainer.max_steps=7", "trainer.checkpoint_every=3", "trainer.log_every=4"]
    words += ["trainer.evaluate_every=0", "fit.on_oom=adapt"]
    whole, train = ready(tmp_path / "whole", *words)
    train()
    _, train = ready(tmp_path / "cut", *words)
    with pytest.raises(torch.OutOfMemoryError):
        train(callbacks=[Ends(5, torch.OutOfMemoryError("no room"), hook)])
    assert checkpoints.step(tmp_path / "cut" / "checkpoints" / "last.ckpt") == 5
    model, train = ready(tmp_path / "cut", *words)
    train(resume=True)
    assert all(torch.equal(weight, whole.state_dict()[name]) for name, weight in model.state_dict().items())
    rows = [read_metrics(tmp_path / name / "metrics.csv") for name in ("whole", "cut")]
    assert [row[:4] for row in rows[0]] == [row[:4] for row in rows[1]]


def test_only_buffers_that_steps_change_are_copied(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        "pipeline.fitting.SaveWhereMemoryEnds", lambda save: made.append(SaveWhereMemoryEnds(save)) or made[-1]
    )
    _, train = ready(tmp_path, "model=efficientnet", "data=digits", "trainer.max_steps=2", "fit.on_oom=adapt")
    train()
    assert {name.rpartition(".")[2] for name in made[0].noted.buffers} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    _, train = ready(tmp_path, "adapter=lora", "compression=nf4", "trainer.max_steps=2", "fit.on_oom=adapt")
    train()
    assert made[1].noted.buffers == {}


@pytest.mark.parametrize(
    ("words", "hook", "error"),
    [
        (["memory.step_in_backward=true", "trainer.grad_clip=null"], "on_after_backward", torch.OutOfMemoryError()),
        ([], "on_before_zero_grad", RuntimeError("cut off")),
        ([], "after the optimizer's step", torch.OutOfMemoryError()),
        (["fit.on_oom=stop"], "on_before_backward", torch.OutOfMemoryError()),
    ],
    ids=["weights change in backward", "another error", "within the optimizer's step", "not asked for"],
)
def test_what_is_no_whole_step_is_not_saved(words, hook, error, tmp_path):
    words = ["trainer.max_steps=7", "trainer.checkpoint_every=3", "fit.on_oom=adapt", *words]
    _, train = ready(tmp_path, *words)
    with pytest.raises(type(error)):
        train(callbacks=[Ends(5, error, hook)])
    assert checkpoints.step(tmp_path / "checkpoints" / "last.ckpt") == 3


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


def test_ranks_round_by_chance_alike(tmp_path, monkeypatch):
    ended = []
    for rank in (0, 1):
        monkeypatch.setattr(TaskModule, "global_rank", rank)
        words = ["precision=bf16-true", "precision.stochastic_rounding=true", "trainer.max_steps=1"]
        model, train = ready(tmp_path / str(rank), *words, "trainer.evaluate_every=0", "model.layers=1")
        train()
        ended.append(model.state_dict())
    assert all(torch.equal(ended[1][name], weight) for name, weight in ended[0].items())
