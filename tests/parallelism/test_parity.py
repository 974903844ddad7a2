"""The same training on one device and on several: losses of every step, and weights at the end."""

import functools
import os
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM

from pipeline import checkpoints
from pipeline.chain import Stage
from pipeline.composing import compose
from pipeline.fitting import Fitted, checkpoint_directory, fit
from pipeline.models.architecture import describe
from pipeline.models.byte_tokenizer import byte_tokenizer
from pipeline.parallelism.sharding import split_tensors
from pipeline.planner.plan import plan
from pipeline.report.metrics import read_metrics
from pipeline.stage_input import prepared
from pipeline.tasks import lookup
from pipeline.walk import stages_of
from tests.ranks import made_by_ranks

STEPS = 20
COMMON = [
    "model=gpt_nano", "model.layers=2", "model.width=32", "model.heads=4", "data.sequence_length=32",
    "data.evaluation_tokens=1024", "trainer=smoke", f"trainer.max_steps={STEPS}", "trainer.batch_size=8",
    "trainer.log_every=1", "trainer.evaluate_every=0", f"trainer.checkpoint_every={STEPS}", "trainer.grad_clip=0.5",
    "optimizer.lr=0.01", "device=cpu",
]  # fmt: skip
DOUBLE = ["precision=64-true"]
LEVERS = {
    "plain": [],
    "checkpointing": ["memory.activation_checkpointing=full"],
    "selective": ["memory.activation_checkpointing=selective"],
    "chunked": ["memory.loss_chunks=4"],
    "accumulation": ["trainer.micro_batch_size=2"],
    "released": ["memory.release_gradients=true"],
    "activations on disk": ["memory.activation_offload=disk"],
    "state on disk": ["memory.optimizer_offload=disk"],
    "lean": ["memory=lean", "memory.loss_chunks=4", "trainer.micro_batch_size=1"],
}
LLAMA = ["model=llama", "model.layers=2", "model.width=32", "model.heads=4", "model.key_value_heads=2"]


VALIDATED = [f"trainer.evaluate_every={STEPS // 2}", "trainer.evaluation_batch_size=7"]
"""Batches of 7, 7, 7, 7 and 4 samples."""
NAMES = ("ddp", "fsdp", "tp")


def two(name):
    return [f"parallelism={name}", "parallelism.devices=2"]


def four(name):
    return [f"parallelism={name}", "parallelism.devices=4"]


CASES = {
    2: {
        **{f"{name}-{lever}": [*DOUBLE, *two(name), *LEVERS[lever]] for name in NAMES for lever in LEVERS},
        **{f"{name}-float32": two(name) for name in ("ddp", "fsdp", "tp")},
        **{f"{name}-llama": [*LLAMA, *DOUBLE, *two(name)] for name in ("fsdp", "tp")},
        **{f"{name}-validated": [*DOUBLE, *two(name), *VALIDATED] for name in NAMES},
    },
    4: {
        "ddp-validated": [*DOUBLE, *four("ddp"), *VALIDATED],
        "fsdp_tp-validated": [*DOUBLE, *four("fsdp_tp"), *VALIDATED],
        "ddp-plain": [*DOUBLE, *four("ddp")],
        "fsdp-plain": [*DOUBLE, *four("fsdp")],
        "tp-plain": [*DOUBLE, *four("tp")],
        "fsdp-hybrid": [*DOUBLE, *four("fsdp"), "parallelism.replicas=2"],
        "fsdp-held": [*DOUBLE, *four("fsdp"), "parallelism.reshard=false"],
        "fsdp_tp-plain": [*DOUBLE, *four("fsdp_tp")],
        "fsdp_tp-lean": [*DOUBLE, *four("fsdp_tp"), *LEVERS["lean"]],
        "fsdp_tp-llama": [*LLAMA, *DOUBLE, *four("fsdp_tp")],
        "fsdp_tp-float32": four("fsdp_tp"),
    },
}


FITTED = "fitted.json"
"""What the first rank measured of a fit."""


def train(directory, config, **settings):
    """Stage 0's fit of this very process (one rank of many, or the only one), with `settings` of `fit`."""
    directory.mkdir(parents=True, exist_ok=True)
    line = stages_of(config)
    tokenizer = config.model.tokenizer() or byte_tokenizer()
    data = config.data.open(tokenizer)
    model, context = prepared(config, directory, data, tokenizer, line, line[0])
    task = lookup.get(config.data.task)
    fitted = fit(config, line[0], model, task, data, context.architecture, directory, **settings)
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        fitted.write(directory / FITTED)
    if config.parallelism.name == "ddp":  # whose ranks have one model
        weights = torch.cat([weight.detach().double().flatten() for weight in model.parameters()])
        (directory / f"weights-{rank}.txt").write_text(sha256(weights.numpy().tobytes()).hexdigest())


def outcome(directory):
    """(loss of each step, weights at the end)."""
    losses = [row.loss for row in read_metrics(directory / "metrics.csv")]
    weights = checkpoints.weights(checkpoint_directory(directory, Stage(0, "train", "train")) / "last.ckpt")
    return torch.tensor(losses, dtype=torch.float64), weights


def assert_same_weights(found, expected, within):
    """`within`: of the largest value of a weight."""
    assert found.keys() == expected.keys()
    # A softmax does not see its keys' bias: that gradient is rounding, which Adam makes as large as any. In float32
    # it does the same to small gradients of other weights.
    for name, weight in expected.items():
        if not name.endswith("k_proj.bias"):
            margin = within * weight.abs().max().item()
            torch.testing.assert_close(found[name], weight, rtol=0, atol=margin, msg=name)


COMPRESSED = {kind: [*two("ddp"), f"parallelism.gradient_compression={kind}"] for kind in ("float16", "powersgd")}
"""Cases of two ranks whose gradients lose something on the way."""
# More than the 1 MiB of gradients that DDP sends first.
COMPRESSED["powersgd-large"] = [*COMPRESSED["powersgd"], "model.width=128", "optimizer.lr=0.001"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one device makes of the same settings."""
    done = {}

    def of(overrides):
        single = tuple(word for word in overrides if not word.startswith("parallelism") and word not in MEMORY_ONLY)
        if single not in done:
            directory = tmp_path_factory.mktemp("single")
            train(directory, compose([*COMMON, *single]))
            done[single] = outcome(directory)
        return done[single]

    return of


MEMORY_ONLY = {word for lever in LEVERS.values() for word in lever}
"""Levers that must not change what is computed: one device goes without them."""


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "case"), [(n, case) for n, cases in CASES.items() for case in cases])
def test_several_devices_train_as_one_does(devices, case, alone, tmp_path_factory):
    overrides = CASES[devices][case]
    directory = made_by_ranks(__file__, devices, tmp_path_factory) / case
    losses, weights = outcome(directory)
    expected, one = alone(overrides)
    assert len(losses) == STEPS
    assert len({held.read_text() for held in directory.glob("weights-*.txt")}) <= 1
    double = "precision=64-true" in overrides
    torch.testing.assert_close(losses, expected, rtol=1e-10 if double else 1e-5, atol=0)
    assert_same_weights(weights, one, 1e-10 if double else 1e-3)


def validation_loss(directory):
    """Of the checkpoint that is the best one so far."""
    last = checkpoint_directory(directory, Stage(0, "train", "train")) / "last.ckpt"
    callbacks = torch.load(last, weights_only=False)["callbacks"]
    (best,) = (state for name, state in callbacks.items() if "'val_loss'" in name)
    return best["best_model_score"].item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "case"), [(n, case) for n, cases in CASES.items() for case in cases if case.endswith("validated")]
)
def test_several_devices_share_an_evaluation_and_find_what_one_does(devices, case, tmp_path_factory):
    overrides = [word for word in CASES[devices][case] if not word.startswith("parallelism")]
    train(directory := tmp_path_factory.mktemp("single"), compose([*COMMON, *overrides]))
    shared = made_by_ranks(__file__, devices, tmp_path_factory) / case
    assert validation_loss(shared) == pytest.approx(validation_loss(directory), rel=1e-9)
    config = compose([*COMMON, *CASES[devices][case], "plan.calibrate=false"])
    planned = plan(config, config.data.open(config.model.tokenizer() or byte_tokenizer())).phases["validate"]
    assert planned.bytes == pytest.approx(Fitted.read(shared / FITTED).validating["bytes"], rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_gradients_train_nearly_as_whole_ones(kind, alone, tmp_path_factory):
    losses, _ = outcome(made_by_ranks(__file__, 2, tmp_path_factory) / kind)
    expected, _ = alone(COMPRESSED[kind])
    assert not torch.equal(losses[-5:], expected[-5:])
    torch.testing.assert_close(losses, expected, rtol=1e-3 if kind == "float16" else 0.02, atol=0)
    if kind != "float16":  # the first steps send whole gradients
        torch.testing.assert_close(losses[:10], expected[:10], rtol=1e-5, atol=0)
        assert losses[-1] < losses[9]


def check_saving(overrides, directory):
    """What the first rank held while it wrote the last checkpoint is what was planned."""
    config = compose([*COMMON, *overrides, "plan.calibrate=false"])
    save = plan(config, config.data.open(config.model.tokenizer() or byte_tokenizer())).phases["save"]
    assert 0.95 * save.bytes < Fitted.read(directory / FITTED).saving_bytes < save.most


SAVED = {2: ("ddp-plain", "fsdp-lean", "tp-llama"), 4: ("fsdp-plain", "fsdp-hybrid", "fsdp_tp-plain", "fsdp_tp-llama")}


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "case"), [(n, case) for n, cases in SAVED.items() for case in cases])
def test_what_a_checkpoint_takes_is_planned(devices, case, tmp_path_factory):
    check_saving(CASES[devices][case], made_by_ranks(__file__, devices, tmp_path_factory) / case)


def with_norms_of_heads():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    torch.manual_seed(0)
    yield "qwen3", Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)).double()
    yield "gemma3", Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads)).double()


def gradients(model):
    tokens = torch.arange(2 * 20).reshape(2, 20) * 7 % 64
    model(tokens, labels=tokens).loss.backward()
    found = ((name, parameter.grad) for name, parameter in model.named_parameters())
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_a_norm_of_every_head_learns_from_the_heads_of_all_devices(family, tmp_path_factory):
    found = torch.load(made_by_ranks(__file__, 2, tmp_path_factory) / f"{family}.pt")
    expected = gradients(dict(with_norms_of_heads())[family])
    assert any(name.endswith("q_norm.weight") for name in found)
    for name, gradient in expected.items():
        margin = 1e-5 * gradient.abs().max().item()  # norms compute in float32
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=margin, msg=name)


if __name__ == "__main__":
    from lightning.pytorch.strategies import model_parallel

    # A run has one fit a process. Here many share one, and a second mesh over the same ranks confuses gloo's groups.
    model_parallel._setup_device_mesh = functools.cache(model_parallel._setup_device_mesh)
    torch.set_num_threads(1)
    count = int(sys.argv[1])
    for case, overrides in {**CASES[count], **(COMPRESSED if count == 2 else {})}.items():
        train(Path(sys.argv[2]) / case, compose([*COMMON, *overrides]))
    if count == 2:
        mesh = init_device_mesh("cpu", (2,))
        for family, model in with_norms_of_heads():
            split_tensors(model, describe(model), mesh)
            made = gradients(model)
            if os.environ["RANK"] == "0":
                torch.save(made, Path(sys.argv[2]) / f"{family}.pt")
