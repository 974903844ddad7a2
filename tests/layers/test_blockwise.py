"""Calibration block by block, against one hooked forward pass of the whole model."""

import weakref

import pytest
import torch
from torch import nn

from pipeline.layers.blockwise import hidden_of, is_chain, segments
from pipeline.layers.offload import offload_module
from pipeline.layers.select import select
from pipeline.models.architecture import describe
from tests import tiny
from tests.tiny import fresh_efficientnet as efficientnet
from tests.tiny import uneven_batches as token_batches


def opt():
    return tiny.opt(num_hidden_layers=3, dropout=0.1)


def llama():
    return tiny.llama(num_hidden_layers=3)


def image_batches():
    return [
        {"pixel_values": torch.randn(size, 1, 16, 16, generator=torch.Generator().manual_seed(size))} for size in (3, 2)
    ]


MODELS = {"opt": (opt, token_batches), "llama": (llama, token_batches), "efficientnet": (efficientnet, image_batches)}


def hooked_inputs(model, layers, batches):
    seen = {name: [] for name in layers}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda m, a, name=name: seen[name].append(a[0].clone()))
        for name in layers
    ]
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(("build", "data"), MODELS.values(), ids=MODELS)
def test_each_layer_is_shown_what_a_whole_forward_pass_shows_it(build, data):
    model, batches = build().train(), data()
    layers = select(model, describe(model)).layers
    seen = {name: [] for name in layers}
    order = []
    for segment in segments(model, describe(model), layers, batches, "cpu"):
        assert not model.training
        order.append(segment.name)
        segment.observe({name: seen[name].append for name in segment.layers})
    assert model.training
    want = hooked_inputs(model, layers, batches)
    for name in layers:
        assert len(seen[name]) == len(batches)
        for got, expected in zip(seen[name], want[name], strict=True):
            torch.testing.assert_close(got, expected)
    blocks = [block.name for block in describe(model).blocks]
    assert order[: len(blocks)] == blocks
    assert order[len(blocks) :] == ([] if build is not efficientnet else [""])


def test_a_block_sees_what_the_changed_blocks_before_it_give():
    model, batches = opt(), token_batches()
    layers = select(model, describe(model)).layers
    seen = {name: [] for name in layers}
    for segment in segments(model, describe(model), layers, batches, "cpu"):
        segment.observe({name: seen[name].append for name in segment.layers})
        for name in segment.layers:
            model.get_submodule(name).weight.data.mul_(0.5)
    want = hooked_inputs(model, layers, batches)
    last = layers[-6]  # a query of the last block: nothing before it in its own block was changed when it was seen
    assert last.endswith("2.self_attn.k_proj")
    for got, expected in zip(seen[last], want[last], strict=True):
        torch.testing.assert_close(got, expected)


def test_a_replaced_layer_is_what_the_next_block_is_computed_with():
    model, batches = opt(), token_batches()
    calls = []

    class Counted(nn.Linear):
        def forward(self, x):
            calls.append(x.shape)
            return super().forward(x)

    first = "model.decoder.layers.0.fc1"
    wanted = (first, "model.decoder.layers.1.fc1")
    for segment in segments(model, describe(model), wanted, batches, "cpu"):
        if segment.layers == (first,):
            model.model.decoder.layers[0].fc1 = Counted(32, 64)
    assert len(calls) == len(batches)


def test_blocks_that_are_no_chain_are_one_segment():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)])

        def forward(self, x):
            first = self.blocks[0](x)
            return self.blocks[2](self.blocks[1](first) + first)

    model = Skipping()
    names = [f"blocks.{n}" for n in range(3)]
    assert not is_chain(model, names, {"x": torch.randn(2, 8)})
    layers = [f"{name}.0" for name in names]
    found = list(segments(model, describe(model), layers, [{"x": torch.randn(2, 8)}], "cpu"))
    assert [(s.name, s.layers) for s in found] == [("", tuple(layers))]


def test_the_model_is_back_in_its_mode_when_a_walk_is_left_early():
    model = opt().train()
    walk = segments(model, describe(model), select(model, describe(model)).layers, token_batches(), "cpu")
    next(walk)
    walk.close()
    assert model.training


@pytest.mark.parametrize(("build", "data"), list(MODELS.values())[:2], ids=list(MODELS)[:2])
def test_arguments_that_all_calls_share_are_held_once(build, data):
    model, batches = build(), [*data(), *data()]
    layers = select(model, describe(model)).layers
    first = next(segments(model, describe(model), layers, batches, "cpu"))
    for name, value in first.calls[0].kwargs.items():
        if isinstance(value, torch.Tensor) and name != "hidden_states":
            assert first.calls[2].kwargs[name] is value
    assert first.calls[2].hidden is not first.calls[0].hidden


def test_where_hidden_states_lie_in_files_nothing_that_a_block_gave_stays_in_memory(tmp_path):
    model, batches, given = opt(), token_batches(), []
    for module in model.modules():
        offload_module(module, tmp_path)
    first = model.model.decoder.layers[0]
    walk = segments(model, describe(model), select(model, describe(model)).layers, batches, "cpu")
    next(walk)
    first.register_forward_hook(lambda module, args, output: given.append(weakref.ref(hidden_of(output))))
    next(walk)
    assert len(given) == len(batches)
    assert not any(output() is not None for output in given)
