"""ZeRO's three stages against one device: losses, weights, checkpoints that any other strategy goes on from."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from pipeline import checkpoints, rank_rules
from pipeline.composing import compose
from pipeline.errors import ConfigError
from pipeline.parallelism.deepspeed import DeepSpeed
from pipeline.parallelism.zero import engine_config, kinds_of_state
from pipeline.registry import conf_root
from tests.parallelism.test_parity import COMMON, LEVERS, assert_same_weights, check_saving, outcome, train
from tests.ranks import made_by_ranks

engine = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs leanfit[deepspeed]")


def zero(stage, *more):
    sharded = [f"parallelism.stage={stage}", "parallelism.persistence_threshold=0"]
    return ["parallelism=deepspeed", "parallelism.devices=2", *sharded, *more]


CASES = {
    "stage 1": zero(1),
    "stage 2": zero(2),
    "stage 3": zero(3),
    "stage 3, lean": zero(3, *LEVERS["lean"]),
    "stage 2, selective": zero(2, *LEVERS["selective"]),
}
CONSTANT = ["optimizer.schedule=constant", "optimizer.warmup_steps=0", "optimizer.lr=0.003", "optimizer.eps=1e-4"]
"""A learning rate that does not depend on where the fit ends; gradients that are but rounding move nothing."""
LEGS = {10: zero(2), 15: zero(3), 20: zero(1)}
"""Steps, up to which a fit that goes on from the former's checkpoint takes a strategy."""
ROUNDED = {
    "stage 3, bf16-true": zero(3, "precision=bf16-true"),
    "stage 3, bf16-mixed": zero(3, "precision=bf16-mixed"),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return made_by_ranks(__file__, 2, tmp_path_factory)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(losses, weights) of one device with these words."""
    done = {}

    def of(*words):
        if words not in done:
            directory = tmp_path_factory.mktemp("single")
            train(directory, compose([*COMMON, *words]))
            done[words] = outcome(directory)
        return done[words]

    return of


def check(directory, expected, *, losses=1e-5, weights=1e-3):
    ours = outcome(directory)
    assert len(ours[0]) == 20
    torch.testing.assert_close(ours[0], expected[0], rtol=losses, atol=0)
    assert_same_weights(ours[1], expected[1], weights)


@engine
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_shards_train_as_one_device_does(case, ranks, alone):
    check(ranks / case, alone())


@engine
@pytest.mark.slow
@pytest.mark.parametrize("case", ROUNDED)
def test_in_bfloat16_they_train_as_one_device_does_in_bfloat16(case, ranks, alone):
    losses, weights = outcome(ranks / case)
    expected, one = alone(*(word for word in ROUNDED[case] if word.startswith("precision")))
    torch.testing.assert_close(losses, expected, rtol=2e-2, atol=0)
    assert {name: weight.dtype for name, weight in weights.items()} == {name: one[name].dtype for name in one}


@engine
@pytest.mark.slow
@pytest.mark.parametrize("case", [*(f"stage {number}" for number in (1, 2, 3)), *ROUNDED])
def test_what_a_checkpoint_takes_is_planned(case, ranks):
    check_saving({**CASES, **ROUNDED}[case], ranks / case)


@engine
@pytest.mark.slow
def test_each_stage_goes_on_from_the_checkpoint_of_another(ranks, alone):
    check(ranks / "legs", alone(*CONSTANT))


@engine
@pytest.mark.slow
def test_one_device_goes_on_from_a_checkpoint_of_shards(ranks, alone, tmp_path):
    shutil.copytree(ranks / "half", tmp_path / "half")
    train(tmp_path / "half", compose([*COMMON, *CONSTANT]), resume=True)
    check(tmp_path / "half", alone(*CONSTANT))


@engine
@pytest.mark.slow
def test_a_checkpoint_is_one_file_as_a_single_device_writes_it(ranks, tmp_path):
    train(tmp_path, compose([*COMMON, *CONSTANT, "trainer.max_steps=10"]))
    ours, one = (checkpoints.read(place / "checkpoints" / "last.ckpt") for place in (ranks / "half", tmp_path))
    (ours_state,), (state,) = ours["optimizer_states"], one["optimizer_states"]
    assert [group["params"] for group in ours_state["param_groups"]] == [g["params"] for g in state["param_groups"]]
    assert ours_state["state"].keys() == state["state"].keys()
    for number, values in state["state"].items():
        shapes = {name: (value.shape, value.dtype) for name, value in values.items()}
        assert {name: (value.shape, value.dtype) for name, value in ours_state["state"][number].items()} == shapes
        assert ours_state["state"][number]["step"] == values["step"] == 10


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["parallelism.stage=3", "memory.activation_checkpointing=selective"], "use parallelism.stage=2, or memory"),
        (["parallelism.offload=optimizer", "device=cpu"], "use device=cuda, or offload=null"),
        (["precision=64-true"], "use precision=bf16-mixed"),
        (["precision=16-mixed"], "use precision=bf16-mixed"),
        (["precision=16-true", "optimizer.eps=1e-4"], "use precision=bf16-mixed"),
        (["optimizer=muon"], "use optimizer=adamw or sgd"),
        (["adapter=lora"], "use parallelism=fsdp"),
        (["memory.optimizer_offload=disk"], "use parallelism=fsdp"),
        (["memory.step_in_backward=true", "trainer.grad_clip=null"], "use parallelism=single"),
        (["compression=distill"], "use parallelism=ddp"),
        (["parallelism.stage=4"], "parallelism.stage=4 must be one of 1, 2, 3"),
        (["parallelism.devices=3"], "trainer.batch_size=8 is not a multiple of 3 devices"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_with_what_can_be_had(words, told, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: object())
    with pytest.raises(ConfigError) as refused:
        compose([*COMMON, "parallelism=deepspeed", *words])
    (line,) = refused.value.problems
    assert told in line


@engine
def test_weights_go_to_the_host_with_stage_3_only():
    settings = yaml.safe_load((conf_root() / "parallelism" / "deepspeed.yaml").read_text())
    (said,) = DeepSpeed(**{**settings, "stage": 2, "offload": "parameters"}).problems()
    assert said.startswith("parallelism.offload=parameters: stage 2 ")
    assert "use parallelism.stage=3, or parallelism.offload=optimizer" in said
    assert DeepSpeed(**{**settings, "stage": 3, "offload": "parameters"}).problems() == []


def test_without_the_package_one_line_says_how_to_install_it(monkeypatch):
    config = compose([*COMMON])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    with pytest.raises(ConfigError, match=r"pip install 'leanfit\[deepspeed\]', or use parallelism=fsdp") as refused:
        compose([*COMMON, "parallelism=deepspeed"])
    assert len(refused.value.problems) == 1
    assert rank_rules.deepspeed(config) == []


def test_the_engine_is_told_our_clipping_accumulation_and_dtype():
    given = {"accumulation": 4, "clip": 0.5, "elements": 1000, "offload": "parameters", "persistence_threshold": 7}
    told = engine_config(3, precision="bf16-mixed", **given)
    assert told["gradient_accumulation_steps"] == 4
    assert told["gradient_clipping"] == 0.5
    assert told["zero_optimization"]["reduce_bucket_size"] == 1000
    assert told["zero_optimization"]["stage3_param_persistence_threshold"] == 7
    assert told["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert told["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert "bf16" not in told
    plain = engine_config(1, precision="32-true", **(given | {"clip": None, "offload": None}))
    assert plain["gradient_clipping"] == 0
    assert not {"bf16", "torch_autocast"} & plain.keys()
    assert "offload_optimizer" not in plain["zero_optimization"]


def test_counts_of_steps_are_told_from_values_by_element():
    state = {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4), "momentum_buffer": None}}
    assert kinds_of_state(state) == ({"exp_avg": torch.float32}, {"step": torch.tensor(3.0), "momentum_buffer": None})
    assert kinds_of_state({}) == ({}, {})


if __name__ == "__main__":
    torch.set_num_threads(1)
    directory = Path(sys.argv[2])
    for steps, words in LEGS.items():
        train(
            directory / "legs",
            compose([*COMMON, *CONSTANT, *words, f"trainer.max_steps={steps}"]),
            resume=steps != min(LEGS),
        )
    train(directory / "half", compose([*COMMON, *CONSTANT, *zero(3), "trainer.max_steps=10"]))
    for case, words in {**CASES, **ROUNDED}.items():
        train(directory / case, compose([*COMMON, *words]))
