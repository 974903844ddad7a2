"""Adafactor's steps of single weights in shards, on two ranks, against torch's own."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from pipeline.optimizers.sharded import Adafactor
from tests.ranks import made_by_ranks

WEIGHTS = [((4, 6), 0), ((1, 6), 0), ((3, 6), 0), ((6, 1), 1), ((1, 6, 4), 0), ((6, 4), None)]
"""Shape and dimension that is split: of some the second rank has nothing."""


def stepped(kind, place):
    torch.manual_seed(0)
    weights = [nn.Parameter(place(torch.randn(shape), dim)) for shape, dim in WEIGHTS]
    optimizer = kind(weights, lr=0.1)
    for _ in range(3):
        for weight, (shape, dim) in zip(weights, WEIGHTS, strict=True):
            weight.grad = place(torch.randn(shape), dim)
        optimizer.step()
    return [weight.detach() for weight in weights]


@pytest.mark.skipif(sys.platform == "win32", reason="ranks are forked")
def test_weights_of_which_a_rank_has_nothing_are_stepped_too(tmp_path_factory):
    found = torch.load(made_by_ranks(__file__, 2, tmp_path_factory) / "weights.pt")
    wanted = stepped(torch.optim.Adafactor, lambda whole, dim: whole)
    for ours, alone in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-6, atol=1e-7)


if __name__ == "__main__":
    mesh = init_device_mesh("cpu", (2,))

    def spread(whole, dim):
        return distribute_tensor(whole, mesh, [Replicate() if dim is None else Shard(dim)])

    whole = [weight.full_tensor() for weight in stepped(Adafactor, spread)]
    if dist.get_rank() == 0:
        torch.save(whole, Path(sys.argv[2]) / "weights.pt")
