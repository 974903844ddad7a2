"""Quantized tables, against torch's own modules on the dequantized weight."""

import pytest
import torch
from torch import nn

from pipeline.layers.schemes import KINDS, quantize_layers
from pipeline.layers.select import select
from pipeline.models.architecture import describe

SETTINGS = [{"bits": 8}, {"bits": 4, "group_size": 8}, {"bits": 2, "group_size": 16, "symmetric": False}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_an_embedding_looks_up_the_dequantized_rows(settings):
    table = nn.Embedding(50, 32, padding_idx=3)
    layer = KINDS["weight_only", nn.Embedding].from_float(table, **settings)
    ids = torch.randint(0, 50, (4, 7))
    assert torch.equal(layer(ids), layer.dequantized()[ids])
    assert layer.weight_packed.numel() * 4 == 50 * 32 * settings["bits"] / 8


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 0, 9])
def test_a_bag_reduces_the_dequantized_rows(settings, mode, padding):
    table = nn.EmbeddingBag(50, 32, mode=mode, padding_idx=padding)
    layer = KINDS["weight_only", nn.EmbeddingBag].from_float(table, **settings)
    with torch.no_grad():
        table.weight.copy_(layer.dequantized())
    ids, offsets = torch.randint(0, 50, (23,)), torch.tensor([0, 4, 4, 11])
    torch.testing.assert_close(layer(ids, offsets), table(ids, offsets))
    torch.testing.assert_close(layer(ids[:20].view(4, 5)), table(ids[:20].view(4, 5)))
    if mode == "sum":
        weights = torch.rand(23)
        torch.testing.assert_close(
            layer(ids, offsets, per_sample_weights=weights), table(ids, offsets, per_sample_weights=weights)
        )


def test_a_model_of_tables_is_quantized_but_for_those_that_cannot_be():
    class Odd(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids + 1)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.users, self.items = nn.EmbeddingBag(20, 16), nn.Embedding(30, 16)
            self.norm, self.odd = nn.Embedding(4, 16, max_norm=1.0), Odd(5, 16)
            self.tied = nn.Linear(16, 30, bias=False)
            self.words = nn.Embedding(30, 16)
            self.tied.weight = self.words.weight

    model = Model()
    types = (nn.Embedding, nn.EmbeddingBag)
    selection = select(model, describe(model), (), types)
    assert selection.layers == ("users", "items")
    assert selection.left_in_float == {
        "norm": "renormalises its rows (max_norm)",
        "odd": "Odd looks up in its own way",
        "words": "tied to tied.weight",
    }
    before = model.users(torch.tensor([[1, 2]]))
    quantize_layers(model, selection.layers, "weight_only", bits=8)
    assert (model.users(torch.tensor([[1, 2]])) - before).abs().max() < 0.05
