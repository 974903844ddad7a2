"""Adapters, optimizers and loss scaling over shards, against one device."""

import functools
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from pipeline.checkpoints import read
from pipeline.composing import compose
from pipeline.parallelism.shards import local
from pipeline.precision.scaling import Scaler
from tests.parallelism.test_parity import COMMON, DOUBLE, LLAMA, assert_same_weights, four, outcome, train, two
from tests.ranks import made_by_ranks

STEPS = 8
SHORT = [f"trainer.max_steps={STEPS}", f"trainer.checkpoint_every={STEPS}"]
QLORA = ["adapter=lora", "compression=nf4"]
BYTES = ["optimizer=adamw8bit", "optimizer.min_elements=0"]
SGD16 = ["precision=16-mixed", "optimizer=sgd"]
"""Where each step depends on the last digit less than with Adam, whose first updates are signs."""
HIGH = 2.0**24
"""A loss scale at which float16 gradients overflow."""
OVERFLOWS = [*SGD16, f"precision.initial_scale={HIGH}", "trainer.max_steps=20"]
CASES = {
    2: {
        "fsdp-lora": [*DOUBLE, *two("fsdp"), "adapter=lora"],
        "fsdp-lora-float32": [*two("fsdp"), "adapter=lora"],
        "fsdp-dora-llama": [*LLAMA, *DOUBLE, *two("fsdp"), "adapter=dora"],
        "fsdp-qlora": [*DOUBLE, *two("fsdp"), *QLORA],
        "fsdp-qlora-shards": [*DOUBLE, *two("fsdp"), *QLORA, "parallelism.checkpoint=sharded"],
        "tp-lora": [*DOUBLE, *two("tp"), "adapter=lora"],
        "tp-dora-llama": [*LLAMA, *DOUBLE, *two("tp"), "adapter=dora"],
        "fsdp-muon": [*DOUBLE, *two("fsdp"), "optimizer=muon"],
        "tp-muon-llama": [*LLAMA, *DOUBLE, *two("tp"), "optimizer=muon"],
        "fsdp-adafactor": [*DOUBLE, *two("fsdp"), "optimizer=adafactor"],
        "fsdp-adafactor-float32": [*two("fsdp"), "optimizer=adafactor"],
        "tp-adafactor-llama": [*LLAMA, *DOUBLE, *two("tp"), "optimizer=adafactor"],
        "fsdp-adamw8bit": [*DOUBLE, *two("fsdp"), *BYTES],
        "fsdp-adamw8bit-on-disk": [*DOUBLE, *two("fsdp"), *BYTES, "memory.optimizer_offload=disk"],
        "fsdp-muon-on-disk": [*DOUBLE, *two("fsdp"), "optimizer=muon", "memory.optimizer_offload=disk"],
        "fsdp-float16": [*two("fsdp"), *SGD16],
        "tp-float16": [*two("tp"), *SGD16],
        "fsdp-float16-overflows": [*two("fsdp"), *OVERFLOWS],
        "tp-float16-overflows": [*two("tp"), *OVERFLOWS],
    },
    4: {
        "fsdp_tp-lora": [*DOUBLE, *four("fsdp_tp"), "adapter=lora"],
        "fsdp_tp-dora-llama": [*LLAMA, *DOUBLE, *four("fsdp_tp"), "adapter=dora"],
        "fsdp_tp-muon-llama": [*LLAMA, *DOUBLE, *four("fsdp_tp"), "optimizer=muon"],
        "fsdp_tp-adafactor-llama": [*LLAMA, *DOUBLE, *four("fsdp_tp"), "optimizer=adafactor"],
        "fsdp_tp-float16": [*four("fsdp_tp"), *SGD16],
        "hybrid-adamw8bit": [*DOUBLE, *four("fsdp"), "parallelism.replicas=2", *BYTES],
        "hybrid-adafactor": [*DOUBLE, *four("fsdp"), "parallelism.replicas=2", "optimizer=adafactor"],
        "hybrid-muon": [*DOUBLE, *four("fsdp"), "parallelism.replicas=2", "optimizer=muon"],
    },
}


def single(overrides):
    return tuple(word for word in overrides if not word.startswith(("parallelism", "memory")))


@functools.cache
def _alone(directory, words):
    train(directory, compose([*COMMON, *words]))
    return outcome(directory)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one device makes of the same settings: (losses, weights)."""
    places = {}

    def of(overrides):
        words = single(overrides)
        places.setdefault(words, tmp_path_factory.mktemp("single"))
        return _alone(places[words], words)

    return of


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "case"), [(n, case) for n, cases in CASES.items() for case in cases])
def test_shards_train_as_one_device_does(devices, case, alone, tmp_path_factory):
    overrides = CASES[devices][case]
    losses, weights = outcome(made_by_ranks(__file__, devices, tmp_path_factory) / case)
    expected, one = alone([*SHORT, *overrides])
    assert len(losses) == (20 if "trainer.max_steps=20" in overrides else STEPS)
    double = "precision=64-true" in overrides
    torch.testing.assert_close(losses, expected, rtol=1e-10 if double else 1e-5, atol=0)
    assert_same_weights(weights, one, 1e-10 if double else 2e-3)
    if "adapter=lora" not in overrides and "adapter=dora" not in overrides:
        assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "tp"])
def test_steps_that_overflow_are_those_that_do_on_one_device(name, tmp_path_factory):
    directory = made_by_ranks(__file__, 2, tmp_path_factory) / f"{name}-float16-overflows"
    scale = read(directory / "checkpoints" / "last.ckpt")["Mixed"]["scale"]
    alone = tmp_path_factory.mktemp("single")
    train(alone, compose([*COMMON, *SHORT, *OVERFLOWS]))
    assert scale == read(alone / "checkpoints" / "last.ckpt")["Mixed"]["scale"]
    assert HIGH / 2**12 <= scale <= HIGH / 2**4  # as many steps were skipped, and others were not


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_a_step_that_overflowed_on_one_rank_is_skipped_on_all(fused, tmp_path_factory):
    directory = made_by_ranks(__file__, 2, tmp_path_factory) / "overflow"
    told = [torch.load(directory / f"{fused}-{rank}.pt") for rank in range(2)]
    assert [one["finite"] for one in told] == [True, False]  # of the gradients in each rank's own shard
    for one in told:
        assert torch.equal(one["skipped"], one["begun"])
        assert not torch.equal(one["stepped"], one["begun"])
        assert one["scales"] == [1024.0, 512.0, 512.0]
    assert torch.equal(told[0]["stepped"], told[1]["stepped"])


def overflow(directory, fused):
    """The gradient of the last row, which is rank 1's, overflows in the first step and not in the second."""
    directory.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = nn.Linear(4, 4, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    scaler = Scaler("cpu", init_scale=1024.0)
    told = {"scales": [scaler.get_scale()], "begun": model.weight.full_tensor()}
    for name, huge in (("skipped", 1e38), ("stepped", 1.0)):
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4))[:, 0].sum() + model(torch.ones(2, 4))[:, 3].sum() * huge
        scaler.scale(loss).backward()
        told.setdefault("finite", bool(local(model.weight.grad).isfinite().all()))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        told[name] = model.weight.full_tensor()
        told["scales"].append(scaler.get_scale())
    assert isinstance(model.weight, DTensor)
    torch.save(told, directory / f"{fused}-{dist.get_rank()}.pt")


if __name__ == "__main__":
    from lightning.pytorch.strategies import model_parallel

    # A run has one fit a process; see test_parity.
    model_parallel._setup_device_mesh = functools.cache(model_parallel._setup_device_mesh)
    torch.set_num_threads(1)
    count, directory = int(sys.argv[1]), Path(sys.argv[2])
    for case, overrides in CASES[count].items():
        train(directory / case, compose([*COMMON, *SHORT, *overrides]))
    if count == 2:
        for fused in (True, False):
            overflow(directory / "overflow", fused)
