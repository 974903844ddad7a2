"""Whose weights a checkpoint holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline import recipes
from pipeline.chain import Stage
from pipeline.checkpoints import save
from pipeline.composing import compose
from pipeline.compression.distill import Distill
from pipeline.earlier_run import as_locked, lock_of
from pipeline.errors import ConfigError
from pipeline.schema import RunConfig, values_of
from pipeline.stage_input import open_guest
from tests.tiny import opt

SIZES = ["model.width=32", "model.heads=2"]


def left_by(config: RunConfig, directory: Path, vocabulary: int = 64) -> Path:
    """A checkpoint with weights of the config's model, in the directory of a run that has its lock."""
    directory.mkdir()
    (directory / recipes.LOCK).write_text(recipes.lock_text(values_of(config), config.choices, {}))
    torch.manual_seed(1)
    spec = replace(config.data.open(config.model.tokenizer()).spec, vocabulary=vocabulary)
    state = {f"model.{name}": tensor for name, tensor in config.model.build(spec).state_dict().items()}
    save({"state_dict": state, "global_step": 1}, directory / "checkpoints" / "last.ckpt")
    return directory / "checkpoints" / "last.ckpt"


def link(teacher: Path) -> Stage:
    method = compose(["compression=distill"]).chain["distill"]
    assert isinstance(method, Distill)
    return Stage(1, "distill", "link", replace(method, teacher=str(teacher)))


def test_the_lock_of_a_checkpoint_is_that_of_the_run_it_lies_in(tmp_path: Path) -> None:
    lock = tmp_path / recipes.LOCK
    places = [tmp_path / "checkpoints" / place for place in ("last.ckpt", "01-wanda/last.ckpt")]
    assert [lock_of(place) for place in places] == [None, None]
    lock.touch()
    assert [lock_of(place) for place in places] == [lock, lock]
    assert lock_of(tmp_path / "last.ckpt") is None


def test_model_data_and_adapters_are_those_of_the_lock_and_the_rest_stays(tmp_path: Path) -> None:
    theirs = compose(["model=llama", "model.layers=3", "data.sequence_length=32", "adapter=lora", "trainer.seed=7"])
    lock = tmp_path / "lock.yaml"
    lock.write_text(recipes.lock_text(values_of(theirs), theirs.choices, {}))
    ours = compose(["model=gpt_nano", "trainer.seed=8"])
    assert as_locked(ours, lock) == replace(
        ours, model=theirs.model, data=theirs.data, adapter=theirs.adapter,
        choices={**ours.choices, "model": "llama", "adapter": "lora"},
    )  # fmt: skip


@pytest.mark.parametrize("text", ["model: [1\n", "model: {name: gpt, layer: 2}\n", "- a\n"])
def test_a_lock_that_cannot_be_read_is_named(text: str, tmp_path: Path) -> None:
    lock = tmp_path / "lock.yaml"
    lock.write_text(text)
    with pytest.raises(ConfigError) as told:
        as_locked(compose(["model=gpt_nano"]), lock)
    assert str(lock) in str(told.value)


@pytest.mark.parametrize("meta", [False, True])
def test_a_teacher_of_another_size_is_built_as_its_run_says_and_no_random_number_is_drawn(
    meta: bool, tmp_path: Path
) -> None:
    theirs = compose([*SIZES, "model.layers=3", "data.sequence_length=48"])
    checkpoint = left_by(theirs, tmp_path / "run")
    ours, base = compose([*SIZES, "model.layers=1"]), opt()
    before = torch.get_rng_state()
    got = open_guest(ours, link(checkpoint), base, meta, "teacher").state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    wanted = {name.removeprefix("model."): tensor for name, tensor in torch.load(checkpoint)["state_dict"].items()}
    assert {name: tensor.shape for name, tensor in got.items()} == {name: w.shape for name, w in wanted.items()}
    assert meta or all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


def test_a_teacher_that_does_not_fit_is_one_short_line(tmp_path: Path) -> None:
    theirs = compose([*SIZES, "model.layers=3", "data.sequence_length=48"])
    checkpoint = left_by(theirs, tmp_path / "run", vocabulary=80)
    moved = tmp_path / "moved.ckpt"
    moved.write_bytes(checkpoint.read_bytes())
    for place, said in (
        (
            checkpoint,
            "2 tensors of another shape (model.decoder.embed_tokens.weight: [80, 32], the model's is [64, 32])",
        ),
        (moved, "give it where its run left it"),
    ):
        with pytest.raises(ConfigError) as told:
            open_guest(theirs, link(place), opt(), False, "teacher")
        (line,) = told.value.problems
        assert line.startswith(f"compression.distill.teacher={place}: its weights are not those of the model")
        assert said in line
        assert len(line.replace(str(place), "")) < 400
    with pytest.raises(ConfigError, match="is of a run for causal lm, this one is for image classification"):
        open_guest(compose(["model=efficientnet", "data=digits"]), link(checkpoint), opt(), True, "teacher")
