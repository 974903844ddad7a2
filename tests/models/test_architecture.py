"""Descriptions checked against real transformers models: every name exists and is the right kind of layer."""

import pytest
import torch
import transformers
from torch import nn

from pipeline.models.architecture import describe
from pipeline.models.base import Architecture, Attention, FeedForward


def check_names(model: nn.Module, architecture: Architecture) -> None:
    modules = {name for name, _ in model.named_modules()}
    for block in architecture.blocks:
        names = [block.name, *block.norms]
        if block.attention:
            names += [block.attention.query, block.attention.key, block.attention.value, block.attention.output]
        if block.feed_forward:
            names += [n for n in (block.feed_forward.up, block.feed_forward.down, block.feed_forward.gate) if n]
        assert set(names) <= modules
    assert {n for n in (*architecture.embeddings, architecture.final_norm, architecture.head) if n} <= modules
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for group in architecture.tied:
        assert len({id(parameters[name]) for name in group}) == 1


def on_meta(config: transformers.PreTrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def opt(**settings: object) -> transformers.OPTConfig:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "ffn_dim": 96, "num_attention_heads": 4}
    return transformers.OPTConfig(**{**sizes, "max_position_embeddings": 16, "word_embed_proj_dim": 32, **settings})


def test_opt_is_described_in_full() -> None:
    model = on_meta(opt())
    found = describe(model)
    check_names(model, found)
    assert [block.name for block in found.blocks] == [f"model.decoder.layers.{i}" for i in range(3)]
    assert found.blocks[1].attention == Attention(
        query="model.decoder.layers.1.self_attn.q_proj",
        key="model.decoder.layers.1.self_attn.k_proj",
        value="model.decoder.layers.1.self_attn.v_proj",
        output="model.decoder.layers.1.self_attn.out_proj",
        heads=4,
        key_value_heads=4,
    )
    assert found.blocks[2].feed_forward == FeedForward(
        up="model.decoder.layers.2.fc1", down="model.decoder.layers.2.fc2"
    )
    assert found.blocks[0].norms == (
        "model.decoder.layers.0.self_attn_layer_norm",
        "model.decoder.layers.0.final_layer_norm",
    )
    assert found.embeddings == ("model.decoder.embed_tokens", "model.decoder.embed_positions")
    assert found.final_norm == "model.decoder.final_layer_norm"
    assert found.head == "lm_head"
    assert found.tied == (("model.decoder.embed_tokens.weight", "lm_head.weight"),)


def test_untied_and_post_norm_opt_has_no_ties_and_no_final_norm() -> None:
    found = describe(on_meta(opt(tie_word_embeddings=False, do_layer_norm_before=False)))
    assert found.tied == ()
    assert found.final_norm is None


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_llama_like_models_share_one_layout(family: str) -> None:
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = on_meta(config)
    found = describe(model)
    check_names(model, found)
    assert len(found.blocks) == 2
    block = found.blocks[1]
    assert block.attention is not None
    assert (block.attention.heads, block.attention.key_value_heads) == (4, 2)
    assert block.attention.output == "model.layers.1.self_attn.o_proj"
    assert block.feed_forward == FeedForward(
        gate="model.layers.1.mlp.gate_proj", up="model.layers.1.mlp.up_proj", down="model.layers.1.mlp.down_proj"
    )
    assert block.norms == ("model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm")
    assert (found.embeddings, found.final_norm, found.head) == (("model.embed_tokens",), "model.norm", "lm_head")


def test_fused_query_key_value_of_gpt_neox_is_one_name() -> None:
    config = transformers.GPTNeoXConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = on_meta(config)
    found = describe(model)
    check_names(model, found)
    attention = found.blocks[0].attention
    assert attention is not None
    assert attention.query == attention.key == attention.value == "gpt_neox.layers.0.attention.query_key_value"
    assert attention.output == "gpt_neox.layers.0.attention.dense"
    assert found.blocks[0].feed_forward == FeedForward(
        up="gpt_neox.layers.0.mlp.dense_h_to_4h", down="gpt_neox.layers.0.mlp.dense_4h_to_h"
    )
    assert found.final_norm == "gpt_neox.final_layer_norm"


def test_phi_has_its_own_name_for_the_way_out_of_attention() -> None:
    model = on_meta(transformers.PhiConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    found = describe(model)
    check_names(model, found)
    attention = found.blocks[1].attention
    assert attention is not None
    assert (attention.value, attention.output) == ("model.layers.1.self_attn.v_proj", "model.layers.1.self_attn.dense")


def test_gpt2_and_bert_feed_forwards_are_not_mistaken_for_attention_outputs() -> None:
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    gpt2 = describe(on_meta(transformers.GPT2Config(**sizes)))
    assert gpt2.blocks[0].feed_forward == FeedForward(up="transformer.h.0.mlp.c_fc", down="transformer.h.0.mlp.c_proj")
    assert gpt2.blocks[0].attention is not None
    assert gpt2.blocks[0].attention.output == "transformer.h.0.attn.c_proj"
    with torch.device("meta"):
        bert = transformers.BertForSequenceClassification(
            transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
        )
    found = describe(bert)
    check_names(bert, found)
    assert found.blocks[1].attention is not None
    assert found.blocks[1].attention.query == "bert.encoder.layer.1.attention.self.query"
    assert found.blocks[1].feed_forward == FeedForward(
        up="bert.encoder.layer.1.intermediate.dense", down="bert.encoder.layer.1.output.dense"
    )
    assert found.head == "classifier"


def test_efficientnet_has_its_blocks_and_its_classifier() -> None:
    with torch.device("meta"):
        model = transformers.EfficientNetForImageClassification(
            transformers.EfficientNetConfig(width_coefficient=0.5, depth_coefficient=0.5, hidden_dim=64, num_labels=10)
        )
    found = describe(model)
    check_names(model, found)
    assert [block.name for block in found.blocks] == [
        f"efficientnet.encoder.blocks.{i}" for i in range(len(model.efficientnet.encoder.blocks))
    ]
    assert all(block.attention is None and block.feed_forward is None for block in found.blocks)
    assert (found.embeddings, found.final_norm, found.head) == ((), None, "classifier")


def test_unknown_models_fall_back_to_their_largest_stack_of_equal_blocks() -> None:
    def stack(width: int, depth: int) -> nn.ModuleList:
        return nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, dim_feedforward=2 * width, dropout=0.0) for _ in range(depth)
        )

    model = nn.Module()
    model.small = stack(8, 5)
    model.large = stack(32, 2)
    model.head = nn.Linear(32, 3)
    found = describe(model)
    check_names(model, found)
    assert [block.name for block in found.blocks] == ["large.0", "large.1"]
    assert found.blocks[0].norms == ("large.0.norm1", "large.0.norm2")
    assert found.head == "head"


def test_a_model_that_repeats_nothing_has_no_blocks() -> None:
    assert describe(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))) == Architecture(blocks=())


def test_replacing_linears_in_place_leaves_the_description_unchanged() -> None:
    class Replacement(nn.Module):
        pass

    model = on_meta(opt())
    before = describe(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, Replacement())
    after = describe(model)
    assert after.blocks == before.blocks
    assert (after.embeddings, after.final_norm, after.head) == (before.embeddings, before.final_norm, before.head)
