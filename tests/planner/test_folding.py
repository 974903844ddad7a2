"""Blocks computed once beside a measured pass in which each is."""

import pytest
import torch
from torch import nn

from pipeline.memory.measure import measure_peak
from pipeline.planner.estimate import shapes_of
from pipeline.planner.fakes import faked, inside, tracing
from pipeline.planner.folding import Folding, folded
from pipeline.planner.live import Live

WIDTH, LENGTH = 32, 256


class Block(nn.Module):
    """Gives its attention's weights beside its output, as transformers' BLOOM does; made before the feed-forward."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16 * WIDTH), nn.Linear(16 * WIDTH, WIDTH)

    def forward(self, x):
        weights = torch.softmax(x @ x.transpose(1, 2), dim=-1)
        x = x + weights @ x
        return x + self.down(torch.relu(self.up(x))), weights


class Stack(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x):
        for block in self.blocks:
            outputs = block(x)
            x = outputs[0]
        return x


@pytest.mark.parametrize("blocks", [1, 2, 5])
@torch.no_grad()
def test_what_a_block_gives_counts_from_where_it_is_made(blocks):
    model = Stack(blocks)
    with measure_peak("cpu", model.parameters()) as measured:
        model(torch.ones(4, LENGTH, WIDTH))
    live = Live(inside)
    folding = Folding(live)
    with tracing():
        fake = faked(shapes_of(model))
        live.hold_model(fake)
        with live, folded(fake, [f"blocks.{n}" for n in range(blocks)], folding):
            fake(torch.ones(4, LENGTH, WIDTH))
        found = folding.unrolled().peak()
    assert len(folding.repeats) == blocks - 1
    assert found.bytes == measured.bytes
