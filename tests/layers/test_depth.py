"""A model with some of its blocks against one that is built small and given those blocks' weights by hand."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pipeline.errors import LeanfitError
from pipeline.layers.decoding import decode
from pipeline.layers.depth import depth_problem, evenly_spaced, keep_blocks
from pipeline.layers.sparsity import masked_layers, set_mask
from pipeline.models.architecture import describe
from tests.tiny import fresh_efficientnet as efficientnet

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def opt(layers, tied=True):
    torch.manual_seed(layers)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, ffn_dim=48,
            max_position_embeddings=32, word_embed_proj_dim=32, dropout=0.0, tie_word_embeddings=tied, init_std=0.3,
        )
    ).eval()  # fmt: skip


def llama(layers, tied=False):
    torch.manual_seed(layers)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.3,
        )
    ).eval()  # fmt: skip


def qwen(layers, tied=False):
    """Its config lists the kind of attention of each layer."""
    torch.manual_seed(layers)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied, use_sliding_window=True, sliding_window=4,
            max_window_layers=2, initializer_range=0.3,
        )
    ).eval()  # fmt: skip


def by_hand(model, kept, build, tied):
    """A model built with as many layers, filled with the weights of the blocks `kept`."""
    stack = describe(model).blocks[0].name.rpartition(".")[0]
    weights = {}
    for name, value in model.state_dict().items():
        if name.startswith(f"{stack}."):
            old, _, rest = name.removeprefix(f"{stack}.").partition(".")
            if int(old) in kept:
                weights[f"{stack}.{kept.index(int(old))}.{rest}"] = value.clone()
        else:
            weights[name] = value.clone()
    small = build(len(kept), tied)
    small.load_state_dict(weights)
    return small


@pytest.mark.parametrize("build", [opt, llama])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kept", [(0, 3), (1,), (0, 2, 3)])
def test_outputs_are_those_of_a_small_model_given_these_blocks(build, tied, kept):
    model = build(4, tied)
    wanted = by_hand(model, kept, build, tied)(input_ids=IDS).logits
    made = keep_blocks(model, describe(model), kept)
    assert made is model
    assert len(describe(made).blocks) == len(kept)
    assert made.config.num_hidden_layers == len(kept)
    assert (made.lm_head.weight is made.get_input_embeddings().weight) == tied
    assert torch.equal(made(input_ids=IDS).logits, wanted)


@pytest.mark.parametrize("build", [opt, llama, qwen])
def test_the_key_value_cache_works_with_the_blocks_that_are_left(build):
    model = build(4)
    made = keep_blocks(model, describe(model), (1, 3))
    whole = made(input_ids=IDS).logits
    _, cache = decode(made, IDS[:, :7])
    rest, _ = decode(made, IDS[:, 7:], cache)
    torch.testing.assert_close(rest, whole[:, 7:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [opt, llama, qwen])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_opens_in_plain_transformers(build, tied, tmp_path):
    model = build(4, tied)
    made = keep_blocks(model, describe(model), (0, 3))
    wanted = made(input_ids=IDS).logits
    made.save_pretrained(tmp_path)
    opened, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    torch.testing.assert_close(opened(input_ids=IDS).logits, wanted)


def test_lists_of_the_config_keep_the_entries_of_the_blocks_that_stay():
    model = qwen(4)
    assert model.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    made = keep_blocks(model, describe(model), (1, 3))
    assert made.config.layer_types == ["full_attention", "sliding_attention"]


def test_masks_go_with_their_blocks():
    model = opt(4)
    for place, block in enumerate(model.model.decoder.layers):
        mask = torch.ones_like(block.fc1.weight, dtype=torch.bool)
        mask[place] = False
        set_mask(block.fc1, mask)
    made = keep_blocks(model, describe(model), (1, 3))
    masks = [layer.weight_mask for _, layer in masked_layers(made)]
    assert [int((~mask).any(1).nonzero()) for mask in masks] == [1, 3]


@pytest.mark.parametrize("kept", [(), (0, 1, 2, 3), (2, 1), (1, 1), (0, 4), (-1, 2)])
def test_what_is_no_smaller_stack_is_refused_and_nothing_changed(kept):
    model = opt(4)
    with pytest.raises(LeanfitError):
        keep_blocks(model, describe(model), kept)
    assert len(model.model.decoder.layers) == model.config.num_hidden_layers == 4


def test_blocks_that_a_config_does_not_count_stay():
    model = efficientnet()
    told = depth_problem(model, describe(model), (0,))
    assert (
        told == "the config of EfficientNetForImageClassification does not count its 2 blocks, so none can be dropped"
    )
    with pytest.raises(LeanfitError, match="does not count"):
        keep_blocks(model, describe(model), (0,))


def test_blocks_of_unequal_shapes_cannot_stand_in_for_one_another():
    model = opt(4)
    model.model.decoder.layers[3].fc1 = torch.nn.Linear(32, 16)
    assert "has other layers" in str(depth_problem(model, describe(model), (0, 3)))
    assert depth_problem(model, describe(model), (0, 1)) is None


def test_the_problem_is_found_on_meta_and_leaves_the_config_alone():
    with torch.device("meta"):
        model = opt(4)
    assert depth_problem(model, describe(model), (0, 3)) is None
    assert model.config.num_hidden_layers == 4


def test_distilberts_layers():
    assert evenly_spaced(12, 6) == (0, 2, 4, 7, 9, 11)
    assert evenly_spaced(4, 2) == (0, 3)
    assert evenly_spaced(5, 1) == (0,)
    for kept in (0, 6):
        with pytest.raises(ValueError, match="of 5 blocks"):
            evenly_spaced(5, kept)


@given(st.integers(2, 200).flatmap(lambda total: st.tuples(st.just(total), st.integers(2, total))))
def test_kept_blocks_are_in_order_with_the_ends_and_even_gaps(sizes):
    total, kept = sizes
    places = evenly_spaced(total, kept)
    assert len(places) == kept
    assert (places[0], places[-1]) == (0, total - 1)
    gaps = {after - before for before, after in itertools.pairwise(places)}
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1
