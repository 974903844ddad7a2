"""Compiled blocks compute what plain ones do, are compiled once for all that are alike, and leave no trace."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from pipeline.composing import compose
from pipeline.layers.lora import LowRank, adapt
from pipeline.layers.schemes import quantize_layers
from pipeline.layers.sliced_loss import IGNORED
from pipeline.memory.saving import apply_activation_checkpointing
from pipeline.trainer import compiling
from pipeline.trainer.compiling import FirstStepCompiles, compiled_blocks, compiled_criterion
from pipeline.trainer.settings import missing_compiler
from tests.parallelism.test_parity import COMMON, LLAMA, outcome, train
from tests.tiny import efficientnet, llama, opt


@pytest.fixture
def traced(monkeypatch):
    """All but the kernels: what is traced runs by torch's own. Seconds instead of a minute."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    counters.clear()


def blocks(model):
    return [name for name, _ in model.named_modules() if name.rpartition(".")[0].endswith("layers")]


def step(model):
    torch.manual_seed(1)
    ids = torch.randint(0, 64, (3, 16))
    model.train()
    logits = model(input_ids=ids, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return [loss.detach(), *(weight.grad for weight in model.parameters())]


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("make", [llama, lambda: opt(dropout=0.3)], ids=["llama", "opt with dropout"])
def test_blocks_that_are_alike_are_compiled_once_and_compute_the_same(traced, make, checkpointed):
    model, plain = make(), make()
    with compiled_blocks(model, blocks(model)):
        if checkpointed:
            apply_activation_checkpointing(model, blocks(model), "full")
        found = step(model)
        frames = dict(counters["frames"])
        model.zero_grad()
        again = step(model)
        assert dict(counters["frames"]) == frames == {"total": 1, "ok": 1}
        assert not counters["graph_break"]
    for first, second, expected in zip(found, again, step(plain), strict=True):
        assert torch.equal(first, expected)
        assert torch.equal(second, expected)


def test_names_stay_and_nothing_is_left_afterwards(traced):
    model = opt()
    names, before = list(model.state_dict()), [set(vars(module)) for module in model.modules()]
    with pytest.raises(ZeroDivisionError), compiled_blocks(model, blocks(model)):  # noqa: PT012
        step(model)
        assert list(model.state_dict()) == names
        raise ZeroDivisionError
    assert [set(vars(module)) for module in model.modules()] == before
    assert torch._dynamo.config.recompile_limit == 8


@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_adapters_beside_a_compressed_base_are_compiled_with_their_block(traced, magnitude):
    def adapted():
        model = llama()
        layers = [name for name, module in model.named_modules() if name.endswith(("q_proj", "down_proj"))]
        quantize_layers(model, layers, "nf4", block_size=16, double_quant=True)
        adapt(model, layers, LowRank(4, 2.0, magnitude), seed=3)
        for name, weight in model.named_parameters():
            if "lora" in name:
                torch.manual_seed(5)
                nn.init.normal_(weight, std=0.1)
        return model

    model, plain = adapted(), adapted()
    trained = [weight.requires_grad for weight in model.parameters()]
    with compiled_blocks(model, blocks(model)):
        found = step(model)
    assert dict(counters["frames"]) == {"total": 2, "ok": 2}  # what the first block is given has no gradient
    assert not counters["graph_break"]
    expected = step(plain)
    torch.testing.assert_close(found[0], expected[0])
    for gradient, other, learns in zip(found[1:], expected[1:], trained, strict=True):
        if learns:
            torch.testing.assert_close(gradient, other)
        else:
            assert gradient is None


def test_evaluation_runs_blocks_as_they_are(traced):
    model = opt()
    with compiled_blocks(model, blocks(model)), torch.no_grad():
        model(input_ids=torch.ones(1, 8, dtype=torch.long))
    assert not counters["frames"]


def test_a_copy_runs_its_own_weights(traced):
    model = opt()
    with compiled_blocks(model, blocks(model)):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for weight in twin.parameters():
                weight.zero_()
        assert step(twin)[0].item() == pytest.approx(torch.tensor(64.0).log().item())
        assert step(model)[0].item() != step(twin)[0].item()


def test_a_forward_that_was_replaced_on_the_block_is_compiled_and_kept(traced):
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].forward = replaced = lambda data: data * 3
    with compiled_blocks(model, ["0"]):
        assert torch.equal(model(torch.ones(2, 4, requires_grad=True)), torch.full((2, 4), 3.0))
    assert model[0].forward is replaced
    assert counters["frames"]["ok"] == 1


def test_a_model_without_blocks_is_compiled_as_a_whole(traced):
    model, plain = efficientnet(), efficientnet()
    data = torch.randn(2, 1, 16, 16)
    with compiled_blocks(model, []):
        found = model(data).logits
    assert counters["frames"]["ok"] >= 1
    torch.testing.assert_close(found, plain(data).logits)


def test_what_would_run_uncompiled_in_the_end_is_an_error(traced, monkeypatch):
    monkeypatch.setattr(compiling, "PER_BLOCK", 1)

    class Odd(nn.Module):
        def forward(self, data, times):
            return data * times

    model = Odd()
    data = torch.ones(2, requires_grad=True)
    with compiled_blocks(model, []):
        model(data, 1)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            model(data, 2.5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_is_compiled_and_the_same(traced, reduction):
    logits = torch.randn(12, 40, requires_grad=True)
    targets = torch.randint(40, (12,))
    targets[::5] = IGNORED
    criterion = compiled_criterion()
    loss = criterion(logits, targets, reduction)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert dict(counters["frames"]) == {"total": 1, "ok": 1}
    expected = F.cross_entropy(logits, targets, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


def test_evaluation_computes_the_loss_as_it_is(traced):
    with torch.no_grad():
        found = compiled_criterion()(torch.zeros(2, 4), torch.tensor([0, IGNORED]))
    assert found.item() == pytest.approx(torch.tensor(4.0).log().item())
    assert not counters["frames"]


SHORT = [*COMMON, *LLAMA, "model.layers=1", "trainer.max_steps=4"]


@pytest.mark.slow
def test_a_compiled_fit_trains_as_an_eager_one(tmp_path):
    train(tmp_path / "eager", compose(SHORT))
    counters.clear()
    train(tmp_path / "compiled", compose([*SHORT, "trainer.compile=true", "memory.activation_checkpointing=full"]))
    losses, weights = outcome(tmp_path / "compiled")
    expected, plain = outcome(tmp_path / "eager")
    assert dict(counters["frames"]) == {"total": 2, "ok": 2}  # the block, and the loss
    assert counters["inductor"]
    assert weights.keys() == plain.keys()
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


def test_the_first_step_is_announced_and_left_out_of_rates():
    class Trainer:
        global_step = 7

    said = []
    first = FirstStepCompiles("train", 3, said.append)
    first.on_train_start(Trainer(), None)
    assert said == ["train: compiling 3 blocks in the first step"]
    assert first.step == 8
    first.on_train_batch_end(Trainer(), None, None, None, 0)  # a micro batch
    Trainer.global_step = 8
    first.on_train_batch_end(Trainer(), None, None, None, 1)
    first.on_train_batch_end(Trainer(), None, None, None, 2)
    assert len(said) == 2
    assert said[1].startswith("train: compiled in ")


def test_what_lacks_to_compile_is_named(monkeypatch):
    assert missing_compiler("cpu") is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert missing_compiler("cpu") == "there is no C++ compiler (no-such-compiler)"
