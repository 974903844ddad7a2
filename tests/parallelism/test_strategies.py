"""Strategies: what is refused, and ranks that torchrun starts agreeing with a single process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pipeline.errors import ConfigError
from pipeline.layers.schemes import quantize_layers
from pipeline.models.architecture import describe
from pipeline.parallelism.sharding import tensor_parallel_plan
from pipeline.parallelism.shards import clip_gradients, total_norm
from pipeline.registry import conf_root, lookup
from tests.tiny import efficientnet, llama, opt

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


ZEROS = """
import os, sys, torch
from torch import distributed, nn
from pipeline.parallelism.ddp import POWERSGD_AFTER
from tests.parallelism.test_strategies import choice

distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
for dtype, rank in ((torch.float16, 4), (torch.bfloat16, 4), (torch.float32, 1)):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).to(dtype)
    wrapped = nn.parallel.DistributedDataParallel(model)
    choice("ddp", gradient_compression="powersgd", powersgd_rank=rank).begin(wrapped)
    data = torch.randn(8, 32, dtype=dtype)
    for _ in range(POWERSGD_AFTER + 3):
        model.zero_grad()
        (wrapped(data).sum() * 0).backward()
        assert all((weight.grad == 0).all() for weight in model.parameters()), dtype
print("zeros", flush=True)
os._exit(0)  # the last to hold the group may be a thread of its own, of what was sent: ending it, it would end itself
"""


@pytest.mark.slow
def test_powersgd_sends_a_gradient_of_zeros(tmp_path):
    finished = subprocess.run(
        [sys.executable, "-c", ZEROS, tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, timeout=300, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (finished.returncode, finished.stdout) == (0, "zeros\n"), finished.stderr[-3000:]


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

scaling = dict(cache_weights=True, initial_scale=256.0, growth_interval=2)
float16 = Mixed(name="mixed", dtype="float16", gradient_dtype=None, **scaling)
float32 = Full(name="full", dtype="float32", gradient_dtype=None, stochastic_rounding=False)
for name, precision, static in (("float32", float32, True), ("float16", float16, False)):
    parallelism = DDP(
        name="ddp", devices=2, nodes=1, bucket_view=True, static_graph=static, gradient_compression="none",
        powersgd_rank=1, launcher="torchrun", rendezvous=None, node_rank=None,
    )
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


def shape_problems(model, name="tp", **changes):
    return choice(name, **changes).shape_problems(model, describe(model))


def test_a_model_that_does_not_divide_over_the_devices_is_refused_naming_what_would():
    assert shape_problems(opt()) == []
    assert shape_problems(llama(num_key_value_heads=2)) == []
    (said,) = shape_problems(opt(), devices=4)
    assert said.startswith("parallelism=tp over 4 devices: 2 heads do not divide over 4 devices; use 2, or ")
    (said,) = shape_problems(llama(num_attention_heads=4, num_key_value_heads=1))
    assert "1 key-value heads do not divide over 2 devices; use 1, or use parallelism=fsdp" in said
    assert any("a feed-forward of 65 does not" in said for said in shape_problems(opt(ffn_dim=65)))
    assert shape_problems(opt(ffn_dim=65), "fsdp") == []


def test_layouts_that_tensor_parallelism_does_not_know_are_refused():
    (said,) = shape_problems(efficientnet())
    assert "no blocks of a known layout" in said
    assert "use parallelism=fsdp" in said
    fused = GPTNeoXForCausalLM(
        GPTNeoXConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=64)
    )
    assert any("queries, keys and values are one layer" in said for said in shape_problems(fused))
    model = quantize_layers(
        opt(), ("model.decoder.layers.0.fc1",), "weight_only", bits=8, group_size=None, symmetric=True
    )
    assert any("'model.decoder.layers.0.fc1' is a" in said for said in shape_problems(model))


def test_a_norm_over_all_heads_inside_of_attention_is_refused():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = Olmo2ForCausalLM(Olmo2Config(**sizes, **heads))
    (said,) = shape_problems(model)
    assert said == (
        "parallelism=tp over 2 devices: attention has a Olmo2RMSNorm between its projections, over all heads, of which "
        "a device has its own alone; use parallelism=fsdp"
    )
    assert shape_problems(model, "fsdp") == []
    assert shape_problems(Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, head_dim=16))) == []  # one for every head


def test_every_part_of_a_block_has_its_place_in_the_plan():
    plan = tensor_parallel_plan(describe(llama()))
    kinds = {name.rpartition(".")[2]: type(style).__name__ for name, style in plan.items()}
    columns = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "Columns")
    assert kinds == {**columns, "o_proj": "Rows", "down_proj": "Rows"}
    assert len(plan) == 2 * 7


@given(st.integers(0, 1000), st.floats(1e-3, 10))
@settings(deadline=None, max_examples=20)
def test_clipping_whole_tensors_is_what_torch_does(seed, limit):
    torch.manual_seed(seed)
    ours, torchs = (nn.ParameterList([nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(5))]) for _ in "ab")
    for one, other in zip(ours, torchs, strict=True):
        one.grad = torch.randn(one.shape)
        other.grad = one.grad.clone()
    clip_gradients(ours, limit)
    nn.utils.clip_grad_norm_(torchs, limit)
    for one, other in zip(ours, torchs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1.0], ids=["whose-squares-vanish", "whose-squares-overflow"])
def test_the_norm_of_sixteen_bit_gradients_is_that_of_float32(scale, dtype):
    torch.manual_seed(0)
    gradients = [torch.randn(300, 300).mul(scale).to(dtype), torch.randn(300).mul(scale).to(dtype)]
    whole = torch.cat([gradient.float().flatten() for gradient in gradients])
    torch.testing.assert_close(total_norm(gradients), whole.norm(), rtol=1e-2, atol=0)
