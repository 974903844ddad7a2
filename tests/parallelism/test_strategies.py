"""Strategies: what is refused, and ranks that torchrun starts agreeing with a single process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from pipeline.errors import ConfigError
from pipeline.registry import conf_root, lookup

ROOT = Path(__file__).parents[2]


def choice(name, **changes):
    settings = yaml.safe_load((conf_root() / "parallelism" / f"{name}.yaml").read_text()) | changes
    return lookup("parallelism", settings["name"])(**settings)


@pytest.mark.parametrize(("device", "root"), [("cpu", "cpu"), ("cuda", "cuda:0"), ("mps", "mps")])
def test_single_uses_one_device(device, root):
    strategy = choice("single").strategy(device)
    assert isinstance(strategy, SingleDeviceStrategy)
    assert strategy.root_device == torch.device(root)
    assert choice("single").problems() == []
    assert not choice("single").distributed


@pytest.mark.parametrize("key", ["devices", "nodes"])
def test_single_with_more_than_one_is_a_problem(key):
    [said] = choice("single", **{key: 2}).problems()
    assert said.startswith(f"parallelism.{key}=2: ")
    assert "parallelism=ddp" in said


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda", "nccl")])
def test_ddp_uses_the_backend_of_its_device(device, backend):
    strategy = choice("ddp").strategy(device)
    assert isinstance(strategy, DDPStrategy)
    assert strategy.process_group_backend == backend
    assert choice("ddp").distributed


def test_ddp_on_an_apple_gpu_is_refused():
    with pytest.raises(ConfigError, match="parallelism=ddp: device=mps has no communication backend; use"):
        choice("ddp").strategy("mps")


WORKER = """
import json, sys, warnings
warnings.filterwarnings("ignore")
import lightning.pytorch as lightning, torch
from pathlib import Path
from torch import nn
from pipeline.parallelism.ddp import DDP
from pipeline.precision.full import Full
from pipeline.precision.mixed import Mixed

torch.set_num_threads(1)
start, out = torch.load(sys.argv[1]), Path(sys.argv[2])

class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
        self.model.load_state_dict(start["weights"])
    def training_step(self, batch, index):
        rows = slice(self.global_rank, None, self.trainer.world_size)
        return nn.functional.cross_entropy(self.model(start["data"][rows]).float(), start["labels"][rows])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

float16 = Mixed(name="mixed", dtype="float16", cache_weights=True, initial_scale=256.0, growth_interval=2)
for name, precision, static in (("float32", Full(name="full", dtype="float32"), True), ("float16", float16, False)):
    parallelism = DDP(name="ddp", devices=2, nodes=1, bucket_view=True, static_graph=static)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy=parallelism.strategy("cpu"), plugins=[precision.plugin("cpu")],
        max_steps=4, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(range(4)))
    torch.save((trainer.world_size, module.model.state_dict()), out / f"{name}-{trainer.global_rank}.pt")
"""


def one_process(start):
    """Plain torch on the whole batch: what the mean of equal shares must come to."""
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    model.load_state_dict(start["weights"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(start["data"]), start["labels"]).backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.slow
def test_two_ranks_of_torchrun_train_as_one_process_does(tmp_path):
    torch.manual_seed(0)
    weights = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).state_dict()
    start = {"weights": weights, "data": torch.randn(8, 8), "labels": torch.randint(0, 4, (8,))}
    expected = one_process(start)
    torch.save(start, tmp_path / "start.pt")
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    finished = subprocess.run(
        [*torchrun, tmp_path / "worker.py", tmp_path / "start.pt", tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path, timeout=300, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    for name, near in (("float32", 1e-6), ("float16", 2e-3)):
        (world, first), (_, second) = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1))
        assert world == 2
        for key, reference in expected.items():
            assert torch.equal(first[key], second[key])
            assert torch.allclose(first[key], reference, atol=near)
            assert not torch.equal(first[key], start["weights"][key])
