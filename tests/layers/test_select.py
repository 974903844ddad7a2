"""What a method works on, and what it says of the rest: nothing is left out in silence."""

from dataclasses import replace

from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from pipeline.composing import compose
from pipeline.layers.select import select, selection_problems
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
