"""Checkpoints in one file that go from one device to two, in shards, and back."""

import functools
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from pipeline.composing import compose
from tests.parallelism.test_parity import COMMON, DOUBLE, assert_same_weights, outcome, train, two
from tests.parallelism.test_shards import BYTES, QLORA, alone, single
from tests.ranks import made_by_ranks

__all__ = ["alone"]  # a fixture

CONSTANT = [*DOUBLE, "optimizer.schedule=constant", "optimizer.warmup_steps=0"]
STATELESS = ["optimizer=sgd", "optimizer.momentum=0", "optimizer.nesterov=false"]
LEGS = {
    "fsdp-adamw": [*CONSTANT, *two("fsdp")],
    "tp-adamw": [*CONSTANT, *two("tp")],
    "tp-lora": [*CONSTANT, *two("tp"), "adapter=lora"],
    "fsdp-qlora": [*CONSTANT, *two("fsdp"), *QLORA],
    "fsdp-muon": [*CONSTANT, *two("fsdp"), "optimizer=muon"],
    "tp-adafactor": [*CONSTANT, *two("tp"), "optimizer=adafactor"],
    "fsdp-adamw8bit": [*CONSTANT, *two("fsdp"), *BYTES],
    "fsdp-without-state": [
        *CONSTANT,
        *two("fsdp"),
        "optimizer=sgd",
        "optimizer.momentum=0",
        "optimizer.nesterov=false",
    ],
}
"""Fits that begin on one device, go on over two, and end on one."""
BEGUN = "LEANFIT_TEST_BEGUN"
"""Environment variable: where ranks find what one device has begun."""


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """{case: directory} of `LEGS`, after 20 steps: 7 on one device, 6 on two, 7 on one."""
    begun = tmp_path_factory.mktemp("begun")
    for case, overrides in LEGS.items():
        train(begun / case, compose([*COMMON, *single(overrides), "trainer.max_steps=7"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(BEGUN, str(begun))
        between = made_by_ranks(__file__, 2, tmp_path_factory) / "legs"
    done = tmp_path_factory.mktemp("ended")
    for case, overrides in LEGS.items():
        shutil.copytree(between / case, done / case)
        train(done / case, compose([*COMMON, *single(overrides)]), resume=True)
    return {case: done / case for case in LEGS}


@pytest.mark.slow
@pytest.mark.parametrize("case", LEGS)
def test_a_fit_goes_from_one_device_to_two_and_back_as_if_it_had_stayed(case, ended, alone):
    losses, weights = outcome(ended[case])
    expected, one = alone(LEGS[case])
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=0)
    assert_same_weights(weights, one, 1e-10)


if __name__ == "__main__":
    from lightning.pytorch.strategies import model_parallel

    # A run has one fit a process; see test_parity.
    model_parallel._setup_device_mesh = functools.cache(model_parallel._setup_device_mesh)
    torch.set_num_threads(1)
    directory = Path(sys.argv[2])
    if os.environ["RANK"] == "0":
        shutil.copytree(os.environ[BEGUN], directory / "legs")
        (directory / "copied").touch()
    while not (directory / "copied").exists():
        time.sleep(0.1)
    for case, overrides in LEGS.items():
        train(directory / "legs" / case, compose([*COMMON, *overrides, "trainer.max_steps=13"]), resume=True)
