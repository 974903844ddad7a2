import copy

import lightning.pytorch as lightning
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.layers.masks import GradualMasks, HoldMasks
from pipeline.layers.schemes import KINDS
from pipeline.layers.sparsity import has_masks, measured_sparsity, n_of_m_mask, set_mask, unstructured_mask


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.integers(1, 40), st.floats(0, 0.999), st.integers(0, 2**31))
def test_unstructured_prunes_exactly_the_smallest(rows, columns, sparsity, seed):
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)).round(decimals=1)  # with ties
    mask = unstructured_mask(scores, sparsity)
    pruned = int((~mask).sum())
    assert pruned == int(sparsity * scores.numel() + 1e-6)
    if 0 < pruned < scores.numel():
        assert scores[~mask].max() <= scores[mask].min()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 6), st.sampled_from([(2, 4), (4, 8), (1, 4)]), st.integers(0, 2**31))
def test_n_of_m_keeps_the_n_largest_of_every_block(rows, blocks, pattern, seed):
    keep, block = pattern
    scores = torch.rand(rows, blocks * block, generator=torch.Generator().manual_seed(seed))
    mask = n_of_m_mask(scores, keep, block).view(-1, block)
    assert (mask.sum(1) == keep).all()
    assert (
        scores.view(-1, block).masked_fill(~mask, 2).amin(1) >= scores.view(-1, block).masked_fill(mask, -1).amax(1)
    ).all()


class Regression(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch, _):
        return (self.model(batch[0]) - batch[1]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)


def trainer(directory, callbacks, steps):
    return lightning.Trainer(
        max_steps=steps, callbacks=callbacks, logger=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", default_root_dir=directory, enable_checkpointing=False,
    )  # fmt: skip


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 8, generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)


QUIET = pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and on devices


@QUIET
def test_masks_hold_through_momentum_and_weight_decay(tmp_path):
    module = Regression()
    layer = module.model[0]
    set_mask(layer, unstructured_mask(layer.weight.detach().abs(), 0.5))
    mask, before = layer.weight_mask.clone(), layer.weight.detach().clone()
    trainer(tmp_path, [HoldMasks()], 10).fit(module, data())
    assert (layer.weight[~mask] == 0).all()
    assert (layer.weight[mask] != before[mask]).all()
    assert "model.0.weight_mask" in module.state_dict()


def growing():
    def prune(module, sparsity):
        layer = module.model[0]
        set_mask(layer, unstructured_mask(layer.weight.detach().abs(), sparsity))

    return GradualMasks(prune, 0.75, until=8, every=2)


@QUIET
def test_gradual_masks_follow_the_cubic_and_resume_to_the_same_weights(tmp_path):
    whole, callback = Regression(), growing()
    trainer(tmp_path, [callback], 12).fit(whole, data())
    assert measured_sparsity(whole.model, ["0"]) == 0.75
    assert callback.target(4) == pytest.approx(0.75 * (1 - 0.5**3))

    half, first = Regression(), growing()
    part = trainer(tmp_path, [first], 4)
    part.fit(half, data())
    assert 0 < measured_sparsity(half.model, ["0"]) < 0.75
    part.save_checkpoint(tmp_path / "half.ckpt")
    rest, second = Regression(), growing()
    # The runner makes the masks of a checkpoint before it loads it; here the buffer is registered by hand.
    rest.model[0].register_buffer("weight_mask", torch.ones_like(half.model[0].weight_mask))
    trainer(tmp_path, [second], 12).fit(rest, data(), ckpt_path=tmp_path / "half.ckpt")
    assert second.state_dict() == callback.state_dict()
    assert measured_sparsity(rest.model, ["0"]) == 0.75


def test_what_was_pruned_stays_pruned_and_quantizing_keeps_zeros():
    torch.manual_seed(0)
    layer = nn.Linear(32, 16)
    set_mask(layer, unstructured_mask(layer.weight.detach().abs(), 0.5))
    first = layer.weight_mask.clone()
    set_mask(layer, ~first)
    assert not layer.weight_mask.any()
    other = nn.Linear(32, 16)
    set_mask(other, unstructured_mask(other.weight.detach().abs(), 0.5))
    assert has_masks(other)
    for scheme, settings_ in (
        ("int8", {}),
        ("weight_only", {"bits": 8}),
        ("weight_only", {"bits": 4, "group_size": 16}),
    ):
        made = KINDS[scheme, nn.Linear].from_float(copy.deepcopy(other), **settings_)
        assert made.sparse
        assert (made.dequantized()[~other.weight_mask] == 0).all()
