"""SmoothQuant against int8 on a model with outlier channels, and against float before quantization."""

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from pipeline.compression.base import Context
from pipeline.compression.int8 import quantize_int8
from pipeline.compression.int8_smoothquant import Int8SmoothQuant, quantize_int8_smoothquant
from pipeline.errors import LeanfitError
from pipeline.layers.quantized import quantized_layers
from pipeline.layers.select import select, split_experts
from pipeline.layers.sparsity import mask_of, set_mask
from pipeline.models.architecture import describe
from tests.compression.test_int8_static import IDS, batches
from tests.tiny import efficientnet, mixtral, opt
from tests.tiny import odd_llama as llama


def with_outliers(model, norms, factor=100.0):
    """The same function, with one channel of each norm's output `factor` times as large."""
    with torch.no_grad():
        for norm, consumers in norms.items():
            module = model.get_submodule(norm)
            module.weight[3] *= factor
            if getattr(module, "bias", None) is not None:
                module.bias[3] *= factor
            for name in consumers:
                model.get_submodule(name).weight[:, 3] /= factor
    return model


def opt_norms():
    block = "model.decoder.layers.{}."
    found = {}
    for n in (0, 1):
        at = block.format(n)
        found[f"{at}self_attn_layer_norm"] = [f"{at}self_attn.{p}_proj" for p in "qkv"]
        found[f"{at}final_layer_norm"] = [f"{at}fc1"]
    return found


def llama_norms():
    at = "model.layers.0."
    return {
        f"{at}input_layernorm": [f"{at}self_attn.{p}_proj" for p in "qkv"],
        f"{at}post_attention_layernorm": [f"{at}mlp.{p}_proj" for p in ("gate", "up")],
    }


def smoothed(model, alpha=0.5, data=None):
    architecture = describe(model)
    return quantize_int8_smoothquant(model, select(model, architecture).layers, architecture, data or batches(), alpha)


def strong(model):
    """Layers large enough that what they lose shows in the logits."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "proj" in name or "fc" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize(("build", "norms"), [(opt, opt_norms), (llama, llama_norms)])
def test_outlier_channels_cost_less_than_with_int8(build, norms):
    def model():
        torch.manual_seed(0)
        return with_outliers(strong(build()), norms())

    want = model()(**IDS).logits
    plain = quantize_int8(model(), select(model(), describe(model())).layers)(**IDS).logits
    made, detail = smoothed(model())
    found = made(**IDS).logits
    assert (found - want).norm() < 0.4 * (plain - want).norm()
    assert set(detail["smoothed"]) >= {
        f"{norm} -> " + ", ".join(n.split(".", norm.count("."))[-1] for n in _in_order(model(), consumers))
        for norm, consumers in norms().items()
    }
    assert {layer.scheme for layer in quantized_layers(made).values()} == {"int8"}


def test_outlier_channels_of_a_mixture_cost_less_than_with_int8():
    def model():
        made = strong(split_experts(mixtral(num_key_value_heads=2)))
        norms = {}
        for n in (0, 1):
            at = f"model.layers.{n}."
            experts = [f"{at}mlp.experts.{place}.gate_up_proj" for place in range(5)]
            norms[f"{at}input_layernorm"] = [f"{at}self_attn.{p}_proj" for p in "qkv"]
            norms[f"{at}post_attention_layernorm"] = [f"{at}mlp.gate", *experts]
        return with_outliers(made, norms)

    want = model()(**IDS).logits
    plain = quantize_int8(model(), select(model(), describe(model())).layers)(**IDS).logits
    made, detail = smoothed(model())
    assert (made(**IDS).logits - want).norm() < 0.4 * (plain - want).norm()
    assert {f"model.layers.{n}.post_attention_layernorm -> mlp.gate, mlp.experts" for n in (0, 1)} <= {
        *detail["smoothed"]
    }
    assert type(made.model.layers[0].mlp.gate).__name__ == "MixtralTopKRouter"


def _in_order(model, names):
    return [name for name, _ in model.named_modules() if name in names]


def test_a_post_norm_model_has_its_norms_refused_and_said_so():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, dropout=0.0,
        max_position_embeddings=32, word_embed_proj_dim=32, activation_function="gelu", do_layer_norm_before=False,
    )  # fmt: skip
    model = strong(OPTForCausalLM(config))
    before = model(**IDS).logits
    made, detail = smoothed(model)
    assert all("v_proj -> self_attn.out_proj" in pair for pair in detail["smoothed"])
    assert detail["pairs_smoothed"] == 2
    assert "model.decoder.layers.0.self_attn_layer_norm -> fc1" in detail["not_smoothed"]
    assert ((made(**IDS).logits - before).norm() / before.norm()) < 0.1


def test_nothing_to_smooth_is_an_error_or_a_problem():
    model = strong(opt())
    architecture = describe(model)
    only = ["model.decoder.layers.0.fc2"]  # behind a ReLU that was made a GELU
    for layer in model.model.decoder.layers:
        layer.activation_fn = torch.nn.GELU()
    with pytest.raises(LeanfitError, match="no scale can be moved"):
        quantize_int8_smoothquant(model, only, architecture, batches())
    model = efficientnet()
    context = Context(stage="sq", architecture=describe(model), device="cpu", steps=0, seed=0)
    method = Int8SmoothQuant(name="int8_smoothquant", alpha=0.5, ignore=())
    problems = method.preflight(model, context)
    assert len(problems) == 1
    assert "compression.sq: the model has no norm" in problems[0]


def test_masked_weights_stay_zero_and_a_nan_is_named():
    model = strong(opt())
    layer = model.model.decoder.layers[0].fc1
    set_mask(layer, mask_of(layer.weight.detach().abs(), 0.5, None))
    pruned = layer.weight == 0
    made, _ = smoothed(model)
    assert made.model.decoder.layers[0].fc1.sparse
    assert not made.model.decoder.layers[0].fc1.integers()[pruned].any()
    model = opt()
    model.model.decoder.layers[1].fc2.weight.data[3, 4] = float("nan")
    with pytest.raises(LeanfitError, match=r"layers\.1\.fc2.*NaN"):
        smoothed(model)
    assert not quantized_layers(model)
