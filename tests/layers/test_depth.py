"""A model with some of its blocks against one that is built small and given those blocks' weights by hand."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    BeitConfig,
    BeitForImageClassification,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    Dinov2Config,
    Dinov2ForImageClassification,
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from pipeline.errors import LeanfitError
from pipeline.layers.decoding import decode
from pipeline.layers.depth import depth_problem, described, droppable_problem, evenly_spaced, heaviest, keep_blocks
from pipeline.layers.experts import linear_experts
from pipeline.layers.select import split_experts
from pipeline.layers.sparsity import masked_layers, set_mask
from pipeline.models.architecture import describe
from tests.tiny import fresh_efficientnet as efficientnet
from tests.tiny import mixture

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


def diffllama(layers, tied=False):
    """Its attention takes a number from the place of its block."""
    torch.manual_seed(layers)
    return DiffLlamaForCausalLM(
        DiffLlamaConfig(
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


@pytest.mark.parametrize("build", [opt, llama, diffllama])
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
    torch.testing.assert_close(rest, whole[:, -1:], rtol=1e-4, atol=1e-5)


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


SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "num_experts_per_tok": 2, "pad_token_id": 0,
}  # fmt: skip


def deepseek():
    """Two dense blocks, then two mixtures."""
    ranks = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    chosen = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2}
    return mixture(DeepseekV3ForCausalLM, DeepseekV3Config(**SIZES, **ranks, **chosen, moe_intermediate_size=24))


def qwen_moe():
    """Dense, mixture, dense, dense: every second one but for the last."""
    chosen = {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
    config = Qwen2MoeConfig(**SIZES, **chosen, decoder_sparse_step=2, mlp_only_layers=[3])
    return mixture(Qwen2MoeForCausalLM, config)


def llama4():
    """Dense, mixture, dense, mixture, whose last takes no positions."""
    sizes = {**SIZES, "num_experts_per_tok": 1, "num_local_experts": 4, "head_dim": 16, "intermediate_size_mlp": 40}
    return mixture(Llama4ForCausalLM, Llama4TextConfig(**sizes, interleave_moe_layer_step=2))


def ernie():
    """Dense, then three mixtures, of which the config tells the first and the last by their places."""
    chosen = {"moe_num_experts": 4, "moe_intermediate_size": 24, "moe_layer_start_index": 1}
    config = Ernie4_5_MoeConfig(**SIZES, **chosen, moe_layer_end_index=3)
    return mixture(Ernie4_5_MoeForCausalLM, config)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("build", [deepseek, qwen_moe, llama4])
@pytest.mark.parametrize("kept", [(0,), (1,), (3,), (1, 2), (0, 2, 3), (2, 3)])
def test_blocks_of_several_kinds_are_those_that_the_changed_config_describes(build, kept, split, tmp_path):
    model = split_experts(build()) if split else build()
    kinds = [dict(block.named_parameters()).keys() for block in model.model.layers]
    blocks = list(model.model.layers)
    ids = IDS[:, :8]
    made = keep_blocks(model, describe(model), kept)
    assert [dict(block.named_parameters()).keys() for block in made.model.layers] == [kinds[place] for place in kept]
    assert all(one is blocks[old] for one, old in zip(made.model.layers, kept, strict=True))
    if split:  # no class of transformers has such layers
        config, plain = made.config, build()
        plain.model.layers = torch.nn.ModuleList(plain.model.layers[place] for place in kept)
        for place, block in enumerate(plain.model.layers):
            block.self_attn.layer_idx = place
    else:
        config, plain = made.config, made
    plain.config = config
    plain.save_pretrained(tmp_path)
    opened, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    torch.testing.assert_close(opened(input_ids=ids).logits, made(input_ids=ids).logits)


def test_a_config_that_cannot_say_which_blocks_are_left_is_told_with_the_blocks_to_keep():
    model = ernie()
    architecture = describe(model)
    assert "has other layers" in str(depth_problem(model, architecture, (1, 2, 3)))
    told = str(droppable_problem(model, architecture))
    assert told == (
        "the blocks of Ernie4_5_MoeForCausalLM differ, and its config cannot describe it without model.layers.0; keep "
        "such blocks with `ignore`, [model.layers.0]"
    )
    assert droppable_problem(model, architecture, {0}) is None
    for build in (deepseek, qwen_moe, llama4):
        assert droppable_problem(build(), describe(build())) is None


def test_of_blocks_of_several_kinds_the_heaviest_are_planned_with_those_that_stay():
    model = split_experts(deepseek())
    architecture = describe(model)
    assert heaviest(model, architecture, 2) == (2, 3)
    assert heaviest(model, architecture, 2, {1}) == (1, 2)
    twin = described(model, architecture, (1, 3))
    assert linear_experts(twin) == ["model.layers.1.mlp.experts"]
    assert heaviest(opt(4), describe(opt(4)), 2) == (0, 1)


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


@pytest.mark.parametrize(
    ("cls", "config"), [(BeitForImageClassification, BeitConfig), (Dinov2ForImageClassification, Dinov2Config)]
)
def test_a_classifier_that_may_be_a_backbone_opens_with_fewer_blocks(tmp_path, cls, config):
    """Its config names each block as a stage, and refuses to be read where one that is named is not there."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    model = keep_blocks(built := cls(config(**sizes)).eval(), describe(built), (0, 3))
    assert model.config.stage_names == ["stem", "stage1", "stage2"]
    model.save_pretrained(tmp_path)
    opened = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert len(describe(opened).blocks) == 2
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(opened(images).logits, model(images).logits)
