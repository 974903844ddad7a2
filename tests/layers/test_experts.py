"""Experts as linear layers, beside transformers' own modules that hold them in stacked tensors."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    HunYuanMoEV1Config,
    HunYuanMoEV1ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from pipeline.artifact import store
from pipeline.composing import compose
from pipeline.compression.base import Context
from pipeline.compression.wanda import prune_wanda
from pipeline.errors import ArtifactError
from pipeline.layers.experts import LinearExperts, linear_experts, split_as_in, stacked_experts, tokens_of
from pipeline.layers.gptq import round_with_gptq
from pipeline.layers.offload import offload_module, place_of
from pipeline.layers.quantize import Grid
from pipeline.layers.quantized import quantized_layers
from pipeline.layers.select import select, split_experts
from pipeline.layers.sparsity import MASK
from pipeline.memory.measure import measure_peak
from pipeline.models.architecture import describe
from pipeline.models.unfilled import on_meta
from pipeline.planner.fakes import faked, tracing
from pipeline.planner.live import Live
from tests.tiny import mixtral, mixture

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "num_experts_per_tok": 2, "pad_token_id": 0,
}  # fmt: skip


def gpt_oss():
    """Transposed, with biases, gate and up interleaved and clamped."""
    return mixture(GptOssForCausalLM, GptOssConfig(**SIZES, head_dim=16, num_local_experts=5))


def deepseek():
    """With experts that see every token beside those that are chosen, in the second block."""
    ranks = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    chosen = {"n_routed_experts": 5, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    config = DeepseekV3Config(**SIZES, **ranks, **chosen, moe_intermediate_size=24)
    return mixture(DeepseekV3ForCausalLM, config)


def phimoe():
    """Its router is a linear layer that computes otherwise."""
    return mixture(PhimoeForCausalLM, PhimoeConfig(**SIZES, num_local_experts=5, router_jitter_noise=0.0))


def hunyuan():
    """Its router is a linear layer."""
    config = HunYuanMoEV1Config(**SIZES, num_experts=5, moe_topk=2, head_dim=16)
    return mixture(HunYuanMoEV1ForCausalLM, config)


def nemotron():
    """Without gates."""
    sizes = {**SIZES, "num_hidden_layers": None, "layers_block_type": ["moe", "attention"]}
    chosen = {"n_routed_experts": 5, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 24}
    config = NemotronHConfig(**sizes, **chosen, moe_shared_expert_intermediate_size=24, head_dim=16)
    return mixture(NemotronHForCausalLM, config)


def qwen(**changes):
    """With a shared expert, which has a gate of its own."""
    config = {**SIZES, "num_experts": 5, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, **changes}
    return mixture(Qwen2MoeForCausalLM, Qwen2MoeConfig(**config))


def minimax(**changes):
    """What its norms give is the residual too."""
    return mixture(MiniMaxForCausalLM, MiniMaxConfig(**{**SIZES, "num_local_experts": 5, "head_dim": 16, **changes}))


def llama4(**changes):
    """Its experts are given a row of every token, of zeros where it is not sent to them."""
    sizes = {
        **SIZES,
        "num_local_experts": 5,
        "intermediate_size_mlp": 24,
        "head_dim": 16,
        "interleave_moe_layer_step": 1,
    }
    return mixture(Llama4ForCausalLM, Llama4TextConfig(**{**sizes, **changes}))


FAMILIES = [mixtral, gpt_oss, deepseek, phimoe, nemotron, hunyuan, qwen, minimax, llama4]
TOKENS = torch.arange(3 * 20).reshape(3, 20) * 7 % 64


@pytest.mark.parametrize("build", FAMILIES)
def test_logits_and_gradients_are_those_of_stacked_experts(build):
    model = build()
    name, stacked = next(iter(stacked_experts(model).items()))
    loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    held = {name: parameter.grad for name, parameter in model.named_parameters()}
    with torch.no_grad():
        expected = model(TOKENS).logits
    linear = split_experts(copy.deepcopy(model))
    assert linear_experts(linear) == list(stacked_experts(model))
    linear.zero_grad()
    linear(TOKENS, labels=TOKENS).loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(linear(TOKENS).logits, expected)
    for weight, gradient in held.items():
        if not weight.startswith(f"{name}."):
            continue
        leaf = weight.removeprefix(f"{name}.")
        layer, kind = (leaf.removesuffix("_bias"), "bias" if leaf.endswith("_bias") else "weight")
        parts = [linear.get_parameter(f"{name}.{expert}.{layer}.{kind}").grad for expert in range(5)]
        turned = getattr(stacked, "is_transposed", True) and kind == "weight"
        torch.testing.assert_close(torch.stack([part.t() if turned else part for part in parts]), gradient)
    assert sum(p.numel() for p in linear.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("build", "router", "why"),
    [
        (hunyuan, "gate.wg", "chooses among experts"),
        (phimoe, "router", "PhimoeTopKRouter computes in its own way"),
        (mixtral, "gate.weight", "weights of MixtralTopKRouter, which is no layer that is known"),
    ],
)
def test_what_chooses_among_experts_stays_in_float(build, router, why):
    model = split_experts(build())
    found = select(model, describe(model))
    assert found.left_in_float[f"model.layers.1.mlp.{router}"] == why
    assert "model.layers.1.mlp.experts.4.down_proj" in found.layers


def test_a_way_up_as_wide_as_there_are_experts_chooses_nothing():
    """Of Qwen 3 Next both are 512."""
    model = deepseek()
    mixture_of = model.model.layers[1].mlp
    mixture_of.shared_experts.up_proj = nn.Linear(32, 5, bias=False)
    split_experts(model)
    found = select(model, describe(model))
    assert "model.layers.1.mlp.shared_experts.up_proj" in found.layers


def test_experts_that_a_pattern_names_as_a_whole_stay_as_they_are():
    model = split_experts(mixtral(), ["model.layers.0.*", "*.3.down_proj"])
    assert linear_experts(model) == ["model.layers.1.mlp.experts"]
    left = select(model, describe(model), ["*.3.down_proj"]).left_in_float
    assert left["model.layers.1.mlp.experts.3.down_proj"] == "ignored by '*.3.down_proj'"


def never_the_last(model):
    """Routers of which two outputs are above zero for every token, and the last one's is zero."""
    for block in model.model.layers:
        weight = block.mlp.gate.weight
        weight.data = torch.stack([weight[0], -weight[0], 2 * weight[0], -2 * weight[0], 0 * weight[0]])
    return model


@pytest.mark.parametrize("quantized", [False, True])
def test_an_expert_that_no_token_reaches_has_a_gradient_of_zeros(quantized):
    model = split_experts(never_the_last(mixtral()))
    if quantized:
        method = compose(["compression=int8_qat"]).chain["int8_qat"]
        model = method.prepare(model, Context("int8_qat", describe(model), "cpu", 1, 0))
    model(TOKENS, labels=TOKENS).loss.backward()
    gradients = [model.model.layers[0].mlp.experts.get_submodule(f"{n}.down_proj").weight.grad for n in range(5)]
    assert [bool(gradient.any()) for gradient in gradients] == [True, True, True, True, False]


def test_an_expert_that_calibration_never_reaches_is_rounded_to_nearest_and_named():
    model = split_experts(never_the_last(mixtral()))
    layers, facts = select(model, describe(model)).layers, {}
    weight = model.model.layers[1].mlp.experts.get_submodule("4.down_proj").weight.detach().clone()
    grids = dict.fromkeys(layers, Grid(4, None, True))
    round_with_gptq(model, grids, [{"input_ids": TOKENS}], describe(model), facts=facts)
    named = [f"model.layers.{block}.mlp.experts.4.{leaf}" for block in (0, 1) for leaf in ("gate_up_proj", "down_proj")]
    assert facts["rounded_to_nearest"] == named
    assert set(facts["damping_raised"]) <= set(layers) - set(named)
    left = quantized_layers(model)["model.layers.1.mlp.experts.4.down_proj"].dequantized()
    assert (left - weight).abs().max() <= weight.abs().amax() / 7 / 2 * 1.001


def test_an_expert_that_calibration_never_reaches_is_pruned_by_magnitude_and_named():
    model = split_experts(never_the_last(mixtral()))
    layer, facts = model.model.layers[1].mlp.experts.get_submodule("4.gate_up_proj"), {}
    layers, weight = select(model, describe(model)).layers, layer.weight.detach().clone()
    prune_wanda(model, layers, 0.5, [{"input_ids": TOKENS}], describe(model), facts=facts)
    assert [name for name in facts["by_magnitude"] if ".1." in name] == [
        f"model.layers.1.mlp.experts.4.{leaf}" for leaf in ("gate_up_proj", "down_proj")
    ]
    smallest = weight.abs().argsort(1) < 0
    smallest.scatter_(1, weight.abs().argsort(1)[:, :16], True)
    assert torch.equal(~getattr(layer, MASK), smallest)


@pytest.mark.parametrize("favourite", [0, 4, None])
def test_what_is_held_without_gradients_does_not_depend_on_where_tokens_go(favourite):
    """Not even where one expert is given them all: a plan knows it beforehand."""
    mixed = split_experts(mixtral(hidden_size=256, intermediate_size=512)).model.layers[0].mlp.experts
    rows, weights = torch.randn(400, 256), torch.full((400, 2), 0.5)
    chosen = torch.randint(5, (400, 2)) if favourite is None else torch.full((400, 2), favourite)
    with torch.no_grad(), measure_peak("cpu", [*mixed.parameters(), rows, chosen, weights]) as measured:
        mixed(rows, chosen, weights)
    shapes = on_meta_experts()
    with tracing(), torch.no_grad():
        faked(shapes)
        live = Live()
        live.hold_model(shapes)
        inputs = torch.empty(400, 256), torch.empty(400, 2, dtype=torch.int64), torch.empty(400, 2)
        live.hold(list(inputs), "batch")
        with live:
            shapes(*inputs)
    assert live.timeline.peak().bytes == pytest.approx(measured.bytes, rel=0.005)


def on_meta_experts():
    config = mixtral().config
    config.hidden_size, config.intermediate_size = 256, 512
    return split_experts(on_meta(type(mixtral()), config)).model.layers[0].mlp.experts


def test_tokens_are_counted_by_expert():
    assert tokens_of(torch.tensor([[0, 2], [2, 3], [2, 0]]), 5) == [2, 0, 3, 1, 0]


def test_experts_that_lie_in_files_stay_there(tmp_path):
    model = mixtral()
    for module in model.modules():
        offload_module(module, tmp_path)
    split_experts(model)
    assert {place_of(parameter) for parameter in model.parameters()} == {tmp_path}


PROBE = {"input_ids": TOKENS}
METHODS = {
    "int8": "leanfit", "int8_weight_only": "pack-quantized", "int4": "pack-quantized", "nf4": "leanfit",
    "fp8": "float-quantized", "magnitude": "leanfit", "int4_gptq": "pack-quantized", "int4_awq": "pack-quantized",
    "sparsegpt": "leanfit", "int8_smoothquant": "leanfit",
}  # fmt: skip
"""In which format each leaves a mixture."""


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_makes_of_a_mixture_is_read_back_as_it_was(name, tmp_path):
    settings = {"group_size": 16, "block_size": 16}
    method = compose([f"compression={name}"]).chain[name]
    method = replace(method, **{key: value for key, value in settings.items() if hasattr(method, key)})
    model = method.entering(mixtral())
    context = Context(name, describe(model), "cpu", 0, 0, calibration=lambda: [PROBE])
    assert method.preflight(model, context) == []
    model = method.finalize(method.prepare(model, context), context).eval()
    store.save(model, tmp_path / "a", chain=[], probe=PROBE)
    back = store.load(tmp_path / "a")
    assert linear_experts(back) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert torch.equal(store.output_of(back, PROBE), store.output_of(model, PROBE))
    assert store.tensor_bytes(tmp_path / "a") < 0.7 * sum(p.nbytes for p in mixtral().parameters())
    manifest = store.read_manifest(tmp_path / "a")
    assert manifest["format"] == METHODS[name]
    assert {"model.layers.1.mlp.experts.3.gate_up_proj", "model.layers.0.mlp.experts.4.down_proj"} <= set(
        manifest["layers"]
    )


def test_an_artifact_cannot_name_what_holds_no_experts(tmp_path):
    store.save(mixtral(), tmp_path / "a", chain=[], probe=PROBE)
    file = tmp_path / "a" / "manifest.json"
    manifest = json.loads(file.read_text())
    assert (manifest["format"], manifest["model"]["linear_experts"]) == ("dense", [])
    manifest["model"]["linear_experts"] = ["model.layers.0.self_attn"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="altered"):
        store.load(tmp_path / "a")


def test_a_twin_is_split_where_its_model_is():
    model = split_experts(mixtral(), ["model.layers.1.*"])
    twin = split_as_in(model, mixtral())
    assert linear_experts(twin) == linear_experts(model) == ["model.layers.0.mlp.experts"]
    assert isinstance(twin.model.layers[0].mlp.experts, LinearExperts)
    assert {n: p.shape for n, p in twin.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_a_model_without_a_mixture_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 4))
    assert split_experts(model) is model
    assert stacked_experts(model) == {}
