"""Moved scales: the float model computes what it did, and pairs for which that does not hold are left and named."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from pipeline.layers.blockwise import segments
from pipeline.layers.equalize import (
    ChannelRange,
    Pair,
    channel_ranges,
    find_pairs,
    fold,
    is_homogeneous,
    smooth,
    smoothing_scales,
    watched,
)
from pipeline.layers.experts import LinearExperts, stacked_experts
from pipeline.layers.select import select, split_experts
from pipeline.models.architecture import describe
from pipeline.models.base import Block
from tests.layers.test_experts import (
    FAMILIES,
    deepseek,
    gpt_oss,
    hunyuan,
    minimax,
    nemotron,
    never_the_last,
    phimoe,
    qwen,
)
from tests.tiny import mixtral


def opt(tied=True, activation="gelu", pre_norm=True):
    torch.manual_seed(0)
    return trained(OPTForCausalLM(OPTConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, dropout=0.0,
        max_position_embeddings=32, word_embed_proj_dim=32, activation_function=activation, tie_word_embeddings=tied,
        do_layer_norm_before=pre_norm,
    )))  # fmt: skip


def llama(tied=False, key_value_heads=2):
    torch.manual_seed(0)
    return trained(LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=key_value_heads, tie_word_embeddings=tied,
    )))  # fmt: skip


def trained(model):
    """Weights of a size that makes each layer matter, and norms that are not all one."""
    for name, parameter in model.named_parameters():
        if "embed" not in name:
            nn.init.normal_(parameter, std=0.3)
            parameter.data += 1.0 * ("norm" in name and name.endswith("weight"))
    return model.eval()


def batches():
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 64, (size, 16), generator=generator)} for size in (3, 2)]


def pairs_of(model):
    """(exact, refused) of the whole model."""
    exact, refused = [], {}
    architecture = describe(model)
    layers = select(model, architecture).layers
    for segment in segments(model, architecture, layers, batches(), "cpu"):
        found = find_pairs(segment, architecture, segment.layers)
        exact += found.exact
        refused |= found.refused
    return exact, refused


def suffixes(pairs):
    return {(p.producer.split(".")[-1], tuple(sorted(c.split(".")[-1] for c in p.consumers))) for p in pairs}


MODELS = {
    "opt": opt,
    "opt untied": lambda: opt(tied=False),
    "opt relu": lambda: opt(activation="relu"),
    "opt post-norm": lambda: opt(pre_norm=False),
    "llama": llama,
    "llama tied": lambda: llama(tied=True),
    "llama grouped by four": lambda: llama(key_value_heads=1),
}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_folding_any_scales_into_every_exact_pair_leaves_the_outputs(build):
    model = build()
    pairs, _ = pairs_of(model)
    assert pairs
    ids = batches()[0]["input_ids"]
    before, weights = model(input_ids=ids).logits, copy.deepcopy(model.state_dict())
    for pair in pairs:
        channels = len(model.get_submodule(pair.producer).weight)
        fold(model, pair, torch.empty(channels).log_normal_(0, 1.5))
    after = model(input_ids=ids).logits
    assert ((after - before).norm() / before.norm()) < 1e-4
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])}
    assert changed >= {f"{name}.weight" for pair in pairs for name in (pair.producer, *pair.consumers)}


QKV, NORMS = ("k_proj", "q_proj", "v_proj"), ("input_layernorm", "post_attention_layernorm")


def test_pairs_are_found_by_what_is_computed():
    exact, refused = pairs_of(opt())
    assert suffixes(exact) == {
        ("self_attn_layer_norm", QKV), ("final_layer_norm", ("fc1",)), ("v_proj", ("out_proj",))
    }  # fmt: skip
    assert set(refused) == {f"model.decoder.layers.{n}.fc1 -> fc2" for n in (0, 1)}  # GELU
    assert "gelu lies between" in refused["model.decoder.layers.0.fc1 -> fc2"]
    assert ("fc1", ("fc2",)) in suffixes(pairs_of(opt(activation="relu"))[0])
    exact, refused = pairs_of(llama())
    assert refused == {}
    assert suffixes(exact) == {
        (NORMS[0], QKV), (NORMS[1], ("gate_proj", "up_proj")), ("v_proj", ("o_proj",)), ("up_proj", ("down_proj",))
    }  # fmt: skip


def test_which_activations_let_scales_through_is_found_in_fake_mode_too():
    with FakeTensorMode():
        found = {name: is_homogeneous(name) for name in ("relu", "leaky_relu", "relu2", "gelu", "silu", "tanh")}
    assert [name for name, passes in found.items() if passes] == ["relu", "leaky_relu"]


def test_a_norm_whose_output_is_a_residual_too_is_refused():
    exact, refused = pairs_of(opt(pre_norm=False))
    assert suffixes(exact) == {("v_proj", ("out_proj",))}
    assert "moving scales changes the outputs" in refused["model.decoder.layers.0.self_attn_layer_norm -> fc1"]
    assert "no linear layer" in refused["model.decoder.layers.0.final_layer_norm"]


def split(build):
    """Experts as linear layers, and every norm other than one."""
    model = split_experts(build())
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model


@pytest.mark.parametrize("build", FAMILIES)
def test_folding_into_a_mixture_leaves_its_outputs_and_its_choices(build):
    model = split(build).double()
    pairs, _ = pairs_of(model)
    ids, chosen = batches()[0]["input_ids"], []
    for module in model.modules():
        if isinstance(module, LinearExperts):
            module.register_forward_pre_hook(lambda _, args: chosen.append(args[1] if args[1:] else args[0].any(-1)))
    before = model(input_ids=ids).logits
    for pair in pairs:
        fold(model, pair, torch.empty(pair.channels(model)).log_normal_(0, 1.0))
    after = model(input_ids=ids).logits
    # Routers compute in float32 whatever the model is in.
    assert ((after - before).norm() / before.norm()) < 1e-5
    blocks = len(chosen) // 2
    assert blocks
    assert all(torch.equal(one, other) for one, other in zip(chosen[:blocks], chosen[blocks:], strict=True))


MIXED = [
    (mixtral, ("gate", "experts")),
    (gpt_oss, ("router", "experts")),
    (phimoe, ("router", "experts")),
    (hunyuan, ("shared_mlp.gate_proj", "shared_mlp.up_proj", "gate.wg", "experts")),
    (deepseek, ("shared_experts.gate_proj", "shared_experts.up_proj", "gate", "experts")),
    (qwen, ("shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert_gate", "gate", "experts")),
]


@pytest.mark.parametrize(("build", "readers"), MIXED)
def test_a_norm_before_a_mixture_feeds_its_router_every_expert_and_those_that_are_shared(build, readers):
    model = split(build)
    (pair,) = (p for p in pairs_of(model)[0] if p.producer == "model.layers.1.post_attention_layernorm")
    assert set(pair.readers) == {f"model.layers.1.mlp.{name}" for name in readers}
    assert pair.readers[-1] == "model.layers.1.mlp.experts"
    assert str(pair).endswith(", mlp.experts")
    experts = {f"model.layers.1.mlp.experts.{place}.gate_up_proj" for place in range(5)}
    assert set(pair.consumers) == {*pair.readers[:-1], *experts}


def test_the_way_up_of_an_expert_and_its_second_layer_are_a_pair_where_what_lies_between_lets_scales_through():
    def of_experts(build):
        exact, refused = pairs_of(split(build))
        found = [pair for pair in exact if pair.consumers[0].endswith("experts.3.down_proj")]
        return found, {pair: why for pair, why in refused.items() if ".experts." in pair}

    (first, second), refused = of_experts(mixtral)
    assert (first.producer, first.first) == ("model.layers.0.mlp.experts.3.gate_up_proj", 48)
    assert refused == {}
    assert second.consumers == ("model.layers.1.mlp.experts.3.down_proj",)
    for build, name in ((gpt_oss, "gate_up_proj"), (nemotron, "up_proj")):  # clamped and interleaved; squared
        found, refused = of_experts(build)
        assert found == []
        assert {"moving scales changes the outputs, by what lies between"} == set(refused.values())
        assert all(f".experts.*.{name} -> " in pair for pair in refused)


@pytest.mark.parametrize("build", [mixtral, gpt_oss, nemotron])
def test_what_lies_between_is_found_in_fake_mode_too(build):
    real = next(m for m in split(build).modules() if isinstance(m, LinearExperts))
    with FakeTensorMode():
        fake = next(m for m in split_experts(build()).modules() if isinstance(m, LinearExperts))
        assert fake.passes_scales() == real.passes_scales() == (build is mixtral)


def test_experts_left_in_one_tensor_cannot_take_a_norm_s_scales_and_this_is_said():
    model = split_experts(qwen(), ["*.experts"])
    assert len(stacked_experts(model)) == 2
    exact, refused = pairs_of(model)
    assert all("post_attention_layernorm" not in pair.producer for pair in exact)
    (told,) = (why for pair, why in refused.items() if pair.startswith("model.layers.1.post_attention_layernorm"))
    assert told == "moving scales changes the outputs: model.layers.1.mlp.gate reads the norm's too"


def test_a_norm_that_is_the_residual_too_is_told_from_its_readers_alone():
    """So that a plan, which has no values to try scales with, refuses what a run does."""
    _, refused = pairs_of(split(minimax))
    assert refused["model.layers.0.post_attention_layernorm -> mlp.gate, mlp.experts"] == (
        "moving scales changes the outputs: model.layers.0 reads the norm's too"
    )


class Reading(nn.Module):
    """A norm whose output `read` is given, beside a linear layer."""

    def __init__(self, read):
        super().__init__()
        self.norm, self.linear, self.read = nn.LayerNorm(4), nn.Linear(4, 4), read

    def forward(self, x):
        given = self.norm(x)
        return self.linear(given.reshape(-1, 4)), self.read(given.transpose(0, 1).clone())


@pytest.mark.parametrize(
    ("read", "who"),
    [
        (lambda x: x, []),
        (lambda x: x.reshape(-1).to(torch.float64), []),
        (lambda x: x * 2, [("block",)]),
        (lambda x: x.add_(1), [("block",)]),
        (lambda x: torch.zeros(2, 3, 4).add_(x), [("block",)]),
        (nn.Softmax(-1), [("block", "block.read")]),
    ],
)
def test_views_and_copies_of_a_norms_output_are_no_reading_of_it(read, who):
    root = nn.ModuleDict({"block": Reading(read)})
    with torch.no_grad(), watched(root, Block("block", norms=("block.norm",))) as reads:
        root["block"](torch.randn(3, 2, 4))
    assert [path for path in reads["block.norm"] if "block.linear" not in path] == who
    assert ("block", "block.linear") in reads["block.norm"]


def test_an_expert_that_calibration_never_reaches_is_not_smoothed_and_named():
    model = never_the_last(split(mixtral))
    architecture = describe(model)
    layers = select(model, architecture).layers
    segment = next(segments(model, architecture, layers, batches(), "cpu"))
    way_up = model.model.layers[0].mlp.experts.get_submodule("4.down_proj").weight
    before = way_up.detach().clone()
    pairs = smooth(segment, architecture, segment.layers, 0.5)
    named = "model.layers.0.mlp.experts.4.gate_up_proj -> mlp.experts.4.down_proj"
    assert pairs.refused == {named: "no token of the calibration set reaches it"}
    assert torch.equal(way_up, before)
    assert len(pairs.exact) == 3 + 4


def test_parameters_shared_with_another_module_are_not_touched():
    model = opt()
    layers = model.model.decoder.layers
    layers[1].final_layer_norm.weight = layers[0].final_layer_norm.weight
    exact, refused = pairs_of(model)
    assert ("final_layer_norm", ("fc1",)) not in suffixes(exact)
    assert "shares its parameters" in refused["model.decoder.layers.0.final_layer_norm -> fc1"]


def test_a_trial_leaves_the_model_as_it_was():
    model = llama()
    before = copy.deepcopy(model.state_dict())
    pairs_of(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_zeros_stay_zeros_and_bias_is_divided():
    root = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(6, 3)})
    root["b"].weight.data[:, ::2] = 0
    root["a"].weight.data[1, :] = 0
    weight, bias = root["a"].weight.detach().clone(), root["a"].bias.detach().clone()
    scales = torch.rand(6) + 0.1
    fold(root, Pair("", "a", ("b",)), scales)
    torch.testing.assert_close(root["a"].bias.data, bias / scales)
    torch.testing.assert_close(root["a"].weight.data, weight / scales.view(-1, 1))
    assert not root["b"].weight[:, ::2].any()
    assert not root["a"].weight[1].any()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.floats(0, 1), st.integers(1, 9))
def test_smoothing_scales_are_the_papers_formula(seed, alpha, columns):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(columns, generator=generator) * 50
    weights = [torch.randn(rows, columns, generator=generator) for rows in (3, 2)]
    inputs[0] = 0.0  # never used
    found = smoothing_scales(inputs, weights, alpha)
    assert found[0] == 1
    for j in range(1, columns):
        largest = max(abs(float(w[row, j])) for w in weights for row in range(len(w)))
        assert float(found[j]) == pytest.approx(float(inputs[j]) ** alpha / largest ** (1 - alpha), rel=1e-4)


def test_channel_ranges_are_those_of_the_whole_calibration_set():
    model = opt()
    architecture = describe(model)
    seen = []
    handle = model.model.decoder.layers[0].fc1.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    for batch in batches():
        model(**batch)
    handle.remove()
    rows = torch.cat([x.reshape(-1, 32) for x in seen]).abs()
    pair = Pair("", "model.decoder.layers.0.final_layer_norm", ("model.decoder.layers.0.fc1",))
    segment = next(segments(model, architecture, pair.consumers, batches(), "cpu"))
    found = channel_ranges(segment, [pair])[pair.producer]
    assert isinstance(found, ChannelRange)
    torch.testing.assert_close(found.peak, rows.amax(0))
    torch.testing.assert_close(found.mean, rows.mean(0))


def test_grouped_queries_share_a_values_scale():
    pair = Pair("", "v", ("o",), heads=4, key_value_heads=2)
    scales = torch.arange(6.0)
    columns = pair.to_columns(scales)
    assert columns.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert torch.equal(pair.from_columns(columns), scales)
