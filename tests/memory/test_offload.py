"""What is put away comes back bit for bit, is written once, and is really gone from memory meanwhile."""

import errno
import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.composing import compose
from pipeline.layers.offload import IN_FILES, OffloadError
from pipeline.memory import offload
from pipeline.memory.measure import measure_peak
from pipeline.memory.offload import ActivationOffload, Files, Host, offload_optimizer, unpack
from pipeline.memory.saving import apply_activation_checkpointing
from pipeline.optimizers.stepping import step_in_backward, step_one_by_one
from tests.optimizers.test_stepping import seen_by_the_hook_that_averages
from tests.parallelism.test_parity import COMMON, FITTED, outcome, train
from tests.tiny import llama, opt

MIB = 1 << 20


@pytest.fixture
def all_sizes(monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST", 1)


class Counted(Files):
    """Files that know what was put into them."""

    def __init__(self, directory):
        super().__init__(directory)
        self.sizes, self.made = [], 0

    def put(self, octets):
        self.sizes.append(octets.numel())
        return super().put(octets)

    def _new(self, size):
        self.made += 1
        return super()._new(size)


def batch():
    return torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(1))


def losses_and_gradients(model, ids, activations=None):
    torch.manual_seed(3)  # dropout

    def loss_of():
        logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    model.train()
    if activations is None:
        loss = loss_of()
    else:
        with activations.saving({"input_ids": ids}):
            loss = loss_of()
    loss.backward()
    return [loss.detach(), *(weight.grad for weight in model.parameters())]


def assert_same(got, expected):
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("make", [opt, llama, lambda: opt(dropout=0.3)], ids=["opt", "llama", "opt with dropout"])
def test_losses_and_gradients_are_those_without_bit_for_bit(all_sizes, tmp_path, make, checkpointed):
    model, files = make(), Counted(tmp_path)
    if checkpointed:
        names = [name for name, _ in model.named_modules() if name.rpartition(".")[0].endswith("layers")]
        apply_activation_checkpointing(model, names, "full")
    found = losses_and_gradients(model, batch(), ActivationOffload(model, files))
    assert files.sizes
    assert_same(found, losses_and_gradients(make(), batch()))
    assert list(tmp_path.iterdir()) == []


def test_weights_buffers_the_batch_and_small_tensors_stay(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64))
            self.register_buffer("mask", torch.randn(64, 64))

        def forward(self, rows, factor):
            hidden = rows @ self.weight.t() * self.mask  # saves rows, the weight and the mask
            return (hidden * factor).exp()  # the scalar; hidden; the result

    model, files = Model(), Counted(tmp_path)
    rows, factor = torch.randn(64, 64), torch.ones((), requires_grad=True)
    with ActivationOffload(model, files).saving({"rows": rows}):
        out = model(rows, factor)
    out.sum().backward()
    assert files.sizes == [4 * 64 * 64] * 2


def test_a_storage_is_written_once_however_often_and_in_whatever_shape_it_is_saved(all_sizes, tmp_path):
    files = Counted(tmp_path)
    activations = ActivationOffload(nn.Identity(), files)
    whole = torch.randn(6, 8)
    views = [whole, whole, whole.t(), whole.view(-1), whole[1:5], whole[:, ::2], whole.view(torch.int32)]
    kept = [activations.pack(view) for view in views]
    assert files.sizes == [whole.nbytes]
    for view, one in zip(views, kept, strict=True):
        back = unpack(one)
        assert torch.equal(back, view)
        assert (back.stride(), back.dtype) == (view.stride(), view.dtype)
        assert back.untyped_storage() in IN_FILES


def test_of_a_large_storage_only_the_part_that_is_saved_is_written(all_sizes, tmp_path):
    files = Counted(tmp_path)
    activations = ActivationOffload(nn.Identity(), files)
    part = torch.randn(1000, 8)[100:110]
    assert torch.equal(unpack(activations.pack(part)), part)
    assert torch.equal(unpack(activations.pack(part.t())), part.t())
    assert files.sizes == [part.nbytes]


def test_what_is_changed_in_place_is_written_again(all_sizes, tmp_path):
    activations = ActivationOffload(nn.Identity(), Files(tmp_path))
    value = torch.zeros(8)
    first = activations.pack(value)
    value += 1
    second = activations.pack(value)
    assert (unpack(first).sum(), unpack(second).sum()) == (0, 8)


def test_a_new_tensor_where_an_old_one_was_is_not_taken_for_it(all_sizes, tmp_path):
    activations = ActivationOffload(nn.Identity(), Files(tmp_path))
    kept = [activations.pack(torch.full((4096,), float(number))) for number in range(50)]
    assert [unpack(one)[0].item() for one in kept] == list(range(50))


def test_files_are_used_again_and_not_before_they_are_free(all_sizes, tmp_path):
    model, files = opt(), Counted(tmp_path)
    activations = ActivationOffload(model, files)
    first = losses_and_gradients(model, batch(), activations)
    made = files.made
    for _ in range(3):
        model.zero_grad()
        assert_same(losses_and_gradients(model, batch(), activations), first)
    assert made == files.made > 0


def test_a_full_disk_is_said_in_one_line(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OffloadError, match=r"no room for a file of 4096 bytes: No space left on device"):
        Files(tmp_path).keep(torch.ones(10))


def test_activations_in_files_are_not_in_memory(tmp_path):
    peaks = {}
    for where in (None, Files(tmp_path)):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Sigmoid()) for _ in range(16)))
        rows = torch.randn(4096, 64)  # 1 MiB, as each of 16 results is
        with measure_peak("cpu") as peak:
            if where is None:
                model(rows).sum().backward()
            else:
                with ActivationOffload(model, where).saving(rows):
                    loss = model(rows).sum()
                loss.backward()
        peaks[where] = peak.bytes
    none, disk = peaks.values()
    assert none > 16 * MIB
    assert disk < 6 * MIB


def weights_and_optimizer(name, *overrides):
    torch.manual_seed(0)
    model = opt(hidden_size=64, word_embed_proj_dim=64)
    config = compose([*COMMON, f"optimizer={name}", *overrides])
    return model, config.optimizer.build(model, lr=0.01), config


def run(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        losses_and_gradients(model, batch())
        optimizer.step()


def in_memory(optimizer):
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(value.nbytes for value in tensors if value.untyped_storage() not in IN_FILES)


OPTIMIZERS = ["adamw", "adamw8bit", "adafactor", "sgd", "muon"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_steps_the_same_and_its_state_is_in_files(all_sizes, tmp_path, name):
    plain, optimizer, _ = weights_and_optimizer(name)
    run(plain, optimizer, 3)
    model, offloaded, _ = weights_and_optimizer(name)
    offload_optimizer(offloaded, Files(tmp_path))
    run(model, offloaded, 3)
    assert in_memory(optimizer) > 0 == in_memory(offloaded)
    assert_same(model.parameters(), plain.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_saved_with_or_without_files_is_loaded_with_them(all_sizes, tmp_path, name):
    plain, optimizer, _ = weights_and_optimizer(name)
    run(plain, optimizer, 2)
    model, offloaded, _ = weights_and_optimizer(name)
    offload_optimizer(offloaded, Files(tmp_path))
    offloaded.load_state_dict(optimizer.state_dict())
    model.load_state_dict(plain.state_dict())
    run(model, offloaded, 1)
    torch.save(offloaded.state_dict(), tmp_path / "state")
    third, again, _ = weights_and_optimizer(name)
    again.load_state_dict(torch.load(tmp_path / "state"))
    third.load_state_dict(model.state_dict())
    run(third, again, 1)
    run(plain, optimizer, 2)
    assert in_memory(offloaded) == 0 < in_memory(again)
    assert_same(third.parameters(), plain.parameters())


def test_state_that_a_step_makes_anew_goes_to_files_too(all_sizes, tmp_path):
    found = []
    for where in (None, Files(tmp_path)):
        model, optimizer, _ = weights_and_optimizer("adamw")
        model.bfloat16()
        step_one_by_one(optimizer, stochastic=True)
        if where is not None:
            offload_optimizer(optimizer, where)
        run(model, optimizer, 3)
        found.append([*model.parameters()])
    assert in_memory(optimizer) == 0
    assert_same(*found)


def test_weights_are_stepped_within_the_backward_pass_too(all_sizes, tmp_path):
    plain, optimizer, _ = weights_and_optimizer("adamw")
    run(plain, optimizer, 3)
    model, offloaded, _ = weights_and_optimizer("adamw")
    offload_optimizer(offloaded, Files(tmp_path))
    step_in_backward(offloaded)
    for _ in range(3):
        losses_and_gradients(model, batch(), None)
    assert in_memory(offloaded) == 0
    assert_same(model.parameters(), plain.parameters())


def test_the_first_step_makes_one_weights_state_at_a_time(tmp_path):
    weights = [nn.Parameter(torch.randn(MIB // 4)) for _ in range(8)]
    optimizer = torch.optim.AdamW(weights, fused=True)
    offload_optimizer(optimizer, Files(tmp_path))
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    with measure_peak("cpu") as peak:
        optimizer.step()
    assert peak.bytes < 2.1 * MIB


BOTH = ["memory.activation_offload=disk", "memory.optimizer_offload=disk"]
SHORT = [*COMMON, "optimizer.schedule=constant", "data.sequence_length=64"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [[], ["precision=16-mixed", "trainer.micro_batch_size=4", "memory.activation_checkpointing=full"]],
    ids=["float32", "16-mixed, accumulated, checkpointed"],
)
def test_a_fit_is_the_same_fit_and_is_resumed_from_either_checkpoint(tmp_path, extra):
    train(tmp_path / "plain", compose([*SHORT, *extra, "trainer.max_steps=4"]))
    expected = outcome(tmp_path / "plain")
    for name, first, then in (("brought in", BOTH, []), ("put away", [], BOTH)):
        train(tmp_path / name, compose([*SHORT, *extra, *first, "trainer.max_steps=2"]))
        train(tmp_path / name, compose([*SHORT, *extra, *then, "trainer.max_steps=4"]), resume=True)
        losses, weights = outcome(tmp_path / name)
        assert torch.equal(losses, expected[0])
        assert_same(weights.values(), expected[1].values())
        assert {path.name for path in (tmp_path / name).iterdir()} == {"checkpoints", "metrics.csv", FITTED}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_activations_and_state_come_back_from_its_host(all_sizes):
    plain, optimizer, _ = weights_and_optimizer("adamw")
    plain.cuda()
    ids = batch().cuda()
    expected = losses_and_gradients(plain, ids)
    twin, offloaded, _ = weights_and_optimizer("adamw")
    twin.cuda()
    assert_same(losses_and_gradients(twin, ids, ActivationOffload(twin, Host())), expected)
    offload_optimizer(offloaded, Host())
    for one in (optimizer, offloaded):
        one.step()
    assert {value.device.type for state in offloaded.state.values() for value in state.values()} == {"cpu"}
    for mine, theirs in zip(twin.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_weight_that_is_stepped_on_the_host_keeps_the_hook_that_averages_its_gradient():
    weight = nn.Parameter(torch.ones(4, 4, device="cuda"))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    offload_optimizer(optimizer, Host())
    assert seen_by_the_hook_that_averages(weight, optimizer) == 2
