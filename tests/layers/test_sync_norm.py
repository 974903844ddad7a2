"""Batch norms over ranks against torch's on the whole batch: outputs, gradients, running statistics."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from pipeline.layers.sync_norm import SyncedBatchNorm, synchronise_batch_norms


def net(momentum=0.1):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.Flatten(), nn.BatchNorm1d(64))
    return nn.Sequential(layers, nn.Linear(64, 2)).double()


def batch():
    return torch.randn(6, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 3


def step(model, images):
    model(images).square().mean().backward()
    return model


def rank(index, directory):
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=index, world_size=2)
    for momentum in (0.1, None):
        model = synchronise_batch_norms(net(momentum))
        step(model, batch()[index::2])
        for parameter in model.parameters():  # as ddp averages them
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2
        torch.save((model.state_dict(), [p.grad for p in model.parameters()]), f"{directory}/{momentum}-{index}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_normalise_as_one_does(tmp_path):
    mp.spawn(rank, (str(tmp_path),), nprocs=2)
    for momentum in (0.1, None):
        whole = step(net(momentum), batch())
        expected = (whole.state_dict(), [parameter.grad for parameter in whole.parameters()])
        for index in range(2):
            state, gradients = torch.load(tmp_path / f"{momentum}-{index}.pt")
            torch.testing.assert_close(state, dict(expected[0]), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(gradients, expected[1], rtol=1e-10, atol=1e-12)


def test_alone_it_is_the_plain_one():
    plain = net()
    synced = synchronise_batch_norms(copy.deepcopy(plain))
    assert sum(isinstance(module, SyncedBatchNorm) for module in synced.modules()) == 2
    for mode in (True, False):
        assert torch.equal(plain.train(mode)(batch()), synced.train(mode)(batch()))
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), synced.buffers(), strict=True))
    assert plain.state_dict().keys() == synced.state_dict().keys()
