"""What a method works on, and what it says of the rest: nothing is left out in silence."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.bloom.modeling_bloom import BloomAttention

from pipeline.composing import compose
from pipeline.layers.schemes import quantize_layers
from pipeline.layers.select import read_in, select, selection_problems
from pipeline.models.architecture import describe
from pipeline.models.unfilled import on_meta


def mixtral():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return on_meta(MixtralForCausalLM, MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=4))


def test_experts_in_one_tensor_are_named_among_what_is_left():
    model = mixtral()
    found = select(model, describe(model))
    assert len(found.layers) == 8  # attention's
    assert found.left_in_float["model.layers.1.mlp.experts.down_proj"] == (
        "weights of MixtralExperts, which is no layer that is known"
    )
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    told = {name.removesuffix(".weight") for name in (*found.layers, *found.left_in_float, "model.embed_tokens")}
    assert {name.removesuffix(".weight") for name in matrices} == told


def test_convolutions_over_time_and_recurrences_are_named_among_what_is_left():
    circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.GRU(4, 4), circular)
    found = select(model, describe(model))
    assert found.layers == ("3",)
    assert found.left_in_float == {
        "0.weight": "weights of Conv1d, which is no layer that is known",
        "1.weight": "weights of ConvTranspose2d, which is no layer that is known",
        "2.weight_ih_l0": "weights of GRU, which is no layer that is known",
        "2.weight_hh_l0": "weights of GRU, which is no layer that is known",
    }


def test_a_model_whose_matrices_are_of_an_unknown_layer_is_refused_by_its_name():
    model = on_meta(GPT2LMHeadModel, GPT2Config(n_embd=16, n_layer=2, n_head=2))
    (told,) = selection_problems(model, describe(model), (), "compression.int8")
    assert told.startswith("compression.int8: no layer to work on; it knows Linear, Conv2d")
    assert told.endswith("; the matrices of this model are those of Conv1D")


def test_falcon_s_linear_layers_are_worked_on_though_their_product_is_written_out():
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = on_meta(FalconForCausalLM, FalconConfig(**sizes))
    block, parts = "transformer.h.0", ("self_attention", "mlp")
    found = select(model, describe(model))
    assert found.layers == tuple(
        f"{block}.{part}.{name}"
        for part, names in zip(parts, (("query_key_value", "dense"), ("dense_h_to_4h", "dense_4h_to_h")), strict=True)
        for name in names
    )


def assert_left_in_float(model, inputs, layer, told):
    """`layer` is left for the reason `told`, and the model runs with all others quantized."""
    float_logits = model(inputs).logits
    found = select(model, describe(model))
    assert found.left_in_float[layer] == told
    quantize_layers(model, found.layers, "weight_only", bits=8)
    torch.testing.assert_close(model(inputs).logits, float_logits, rtol=0, atol=0.02)


def test_a_layer_of_whose_weight_the_data_type_is_asked_stays_in_float():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "v_head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "index_n_heads": 4, "index_head_dim": 32}
    ranks = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16}
    model = DeepseekV32ForCausalLM(DeepseekV32Config(**sizes, **heads, **ranks, index_topk=16, pad_token_id=0)).eval()
    layer = "model.layers.0.self_attn.indexer.weights_proj"
    assert_left_in_float(model, torch.arange(16)[None], layer, "DeepseekV32Indexer reads its weight by itself")


def test_a_layer_further_in_of_whose_weight_the_data_type_is_asked_stays_in_float():
    """A ViT casts its images to the data type of the layer that cuts them into patches: to integers, were it
    quantized."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_channels=1)).eval()
    layer = "vit.embeddings.patch_embeddings.projection"
    assert_left_in_float(model, torch.randn(4, 1, 16, 16), layer, "ViTModel reads its weight by itself")


def test_a_classifier_s_head_is_worked_on_though_the_model_has_embeddings():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = on_meta(BertForSequenceClassification, BertConfig(**sizes, num_attention_heads=2))
    assert describe(model).embeddings
    assert "classifier" in select(model, describe(model)).layers
    model = nn.ModuleDict({"words": nn.EmbeddingBag(64, 8), "head": nn.Linear(8, 4)})
    assert select(model, describe(model)).layers == ("head",)
    model = nn.ModuleDict({"words": nn.Embedding(64, 8), "head": nn.Linear(8, 64)})
    assert select(model, describe(model)).left_in_float == {"head": "projects to the vocabulary"}


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_layer_whose_weight_is_computed_from_other_parameters_stays_in_float(norm):
    model = nn.Sequential(norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    found = select(model, describe(model))
    assert found.layers == ("1",)
    assert found.left_in_float["0"] == "its weight is computed from others, as by weight norm"


class Either(nn.Module):
    """Reads one child's weight whatever comes, and another's only where it is asked to."""

    def __init__(self):
        super().__init__()
        self.always, self.seldom, self.called = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, fast=False):
        if fast:
            x = x @ self.always.weight
            x = x + self.seldom.weight
        else:
            x = x @ self.always.weight.T
        return self.called(x) if fast else x + self.seldom.weight


def test_a_weight_that_is_read_only_in_some_cases_is_not_left_out():
    assert read_in(Either.forward) == {"always"}
    assert read_in(nn.MultiheadAttention.forward) == {"out_proj"}
    assert read_in(BloomAttention.forward) == read_in(eval("lambda self: self.made.weight")) == frozenset()


def test_a_layer_whose_weight_the_module_around_it_reads_stays_in_float():
    """Quantized it would hold none, and an adapter beside it would never be asked."""
    model = on_meta(MambaForCausalLM, MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1))
    found = select(model, describe(model))
    mixer = "backbone.layers.0.mixer"
    assert found.layers == (f"{mixer}.in_proj", f"{mixer}.x_proj", f"{mixer}.out_proj")
    assert found.left_in_float[f"{mixer}.dt_proj"] == "MambaMixer reads its weight by itself"
    adapter = compose(["adapter=lora"]).adapter
    assert adapter.layers(model, describe(model)) == found.layers
    (told,) = replace(adapter, targets=("dt_proj",)).preflight(model, describe(model))
    assert told.startswith("adapter.targets=dt_proj: no linear layer of the model is called so")
