"""Structured pruning as a link: what it removes and reports, what it refuses, whole runs."""

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

import pipeline
from pipeline.app import main
from pipeline.composing import compose
from pipeline.compression.base import Context
from pipeline.compression.magnitude import prune_magnitude
from pipeline.compression.structured import Structured, prune_structured, spans
from pipeline.errors import ConfigError, LeanfitError
from pipeline.layers.select import select
from pipeline.layers.sparsity import masked_layers
from pipeline.models.architecture import describe
from pipeline.report.result import read_result
from tests.layers.test_depth import deepseek, ernie

IDS = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(0))


def structured(**changes):
    usual = {
        "ffn": None, "heads": None, "hidden": None, "depth": None, "channels": None, "importance": "activation",
        "round_to": 1, "steps": 0, "lr": None, "ignore": (),
    }  # fmt: skip
    return Structured(name="structured", **{**usual, **changes})


def opt(layers=4):
    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, ffn_dim=48,
            max_position_embeddings=32, word_embed_proj_dim=32, dropout=0.0, init_std=0.3,
        )
    ).eval()  # fmt: skip


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3,
        )
    ).eval()  # fmt: skip


def efficientnet():
    torch.manual_seed(0)
    return EfficientNetForImageClassification(
        EfficientNetConfig(
            image_size=16, num_channels=1, width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320,
            in_channels=[32, 16, 24], out_channels=[16, 24, 24], kernel_sizes=[3, 3, 3], strides=[1, 2, 1],
            num_block_repeats=[1, 1, 1], expand_ratios=[1, 6, 4], depthwise_padding=[], num_labels=4,
        )
    ).eval()  # fmt: skip


def context(model, stage="link"):
    batch = {"pixel_values": torch.randn(2, 1, 16, 16)} if hasattr(model, "efficientnet") else {"input_ids": IDS}
    return Context(
        stage=stage, architecture=describe(model), device="cpu", steps=0, seed=0, calibration=lambda: [batch]
    )


def run(model, method):
    told = context(model)
    assert method.preflight(model, told) == []
    made = method.finalize(method.prepare(model, told), told)
    return made, told.facts


def test_a_depth_whose_blocks_no_config_could_describe_is_refused_before_anything_runs():
    model = ernie()
    (told,) = structured(depth=0.5).preflight(model, context(model))
    assert told == (
        "compression.link.depth=0.5: the blocks of Ernie4_5_MoeForCausalLM differ, and its config cannot describe it "
        "without model.layers.0; keep such blocks with `ignore`, [model.layers.0]"
    )
    made, facts = run(model, structured(depth=0.5, ignore=("model.layers.0",)))
    assert facts["kept"]["blocks"][0] == 0
    assert len(made.model.layers) == 2


def test_dense_blocks_and_mixtures_go_alike_where_the_config_tells_them_apart(tmp_path):
    model = deepseek()
    for block in (0, 2):  # one of each kind, which change nothing
        for name, parameter in model.model.layers[block].named_parameters():
            if name.split(".")[-2] == "o_proj" or "down_proj" in name:
                parameter.data.zero_()
    want = model(input_ids=IDS).logits
    made, facts = run(model, structured(depth=0.5))
    assert facts["kept"]["blocks"] == [1, 3]
    assert (made.config.num_hidden_layers, made.config.first_k_dense_replace) == (2, 1)
    torch.testing.assert_close(made(input_ids=IDS).logits, want)
    made.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(opened(input_ids=IDS).logits, want)


@pytest.mark.parametrize("importance", ["activation", "magnitude"])
@pytest.mark.parametrize("build", [opt, llama])
def test_blocks_that_change_nothing_go_and_outputs_stay(build, importance):
    model = build()
    for index in (1, 2):
        layer = model.get_decoder().layers[index]
        for name, parameter in layer.named_parameters():
            if importance == "magnitude" or name.split(".")[-2] in ("out_proj", "o_proj", "fc2", "down_proj"):
                parameter.data.zero_()
    want = model(input_ids=IDS).logits
    made, facts = run(model, structured(depth=0.5, importance=importance))
    assert facts["kept"]["blocks"] == [0, 3]
    assert made.config.num_hidden_layers == 2
    assert facts["block_scores"][1:3] == pytest.approx([0, 0], abs=1e-6)
    assert facts["sizes"] == {"depth": {"before": 4, "after": 2}}
    torch.testing.assert_close(made(input_ids=IDS).logits, want)
    ids = IDS[:1, :4]
    greedy = ids
    for _ in range(6):
        greedy = torch.cat([greedy, made(input_ids=greedy, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    cached = made.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert torch.equal(cached, greedy)


def test_everything_at_once_is_reported_and_opens_in_plain_transformers(tmp_path):
    model = llama()
    parameters = sum(p.numel() for p in model.parameters())
    made, facts = run(model, structured(ffn=0.5, heads=0.5, hidden=0.25, depth=0.25))
    assert facts["sizes"] == {
        "depth": {"before": 4, "after": 3},
        "ffn": {"before": 48, "after": 24},
        "heads": {"before": 4, "after": 2},
        "hidden": {"before": 32, "after": 24},
    }
    attention, feed_forward, norms = 2 * (16 + 8) * 24, 3 * 24 * 24, 2 * 24
    assert facts["parameters_after"] == 2 * 64 * 24 + 24 + 3 * (attention + feed_forward + norms)
    assert facts["parameters_after"] == sum(p.numel() for p in made.parameters())
    assert facts["parameters_before"] == parameters
    assert len(facts["kept"]["ffn"]) == len(facts["kept"]["heads"]) == 3
    assert set(facts["kept"]["heads"]) <= {"0-1", "2-3"}  # two queries share a key
    json.dumps(facts)
    made.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(opened(input_ids=IDS).logits, made(input_ids=IDS).logits, rtol=0, atol=0)


def test_hidden_dimensions_that_hold_nothing_go_and_outputs_stay():
    model = llama()
    silent = list(range(0, 32, 4))
    model.model.embed_tokens.weight.data[:, silent] = 0
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data[silent] = 0
    want = model(input_ids=IDS).logits
    made, facts = run(model, structured(hidden=0.25))
    assert facts["kept"]["hidden"] == "1-3,5-7,9-11,13-15,17-19,21-23,25-27,29-31"
    torch.testing.assert_close(made(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("importance", ["magnitude", "activation", "taylor"])
def test_blocks_go_whatever_layers_they_are_made_of(importance):
    """GPT-1's are of `Conv1D`, which no link knows."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 4, "n_head": 2}
    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(**sizes)).eval()
    (told,) = structured(ffn=0.5, importance=importance).preflight(model, context(model))
    assert "ffn=0.5: OpenAIGPTLMHeadModel has no feed-forward layers of a known layout; use depth" in told
    made, _ = run(model, structured(depth=0.5, importance=importance))
    assert made.config.n_layer == len(made.transformer.h) == 2
    assert made(IDS).logits.isfinite().all()


def test_blocks_that_stay_keep_their_own_units():
    model = opt()
    for index, layer in enumerate(model.model.decoder.layers):
        silent = [unit for unit in range(48) if unit % 4 == index]
        layer.fc2.weight.data[:, silent] = 0
    model.model.decoder.layers[1].fc2.weight.data.zero_()
    model.model.decoder.layers[1].fc2.bias.data.zero_()
    model.model.decoder.layers[1].self_attn.out_proj.weight.data.zero_()
    want = model(input_ids=IDS).logits
    made, facts = run(model, structured(ffn=0.25, depth=0.25))
    assert facts["kept"]["blocks"] == [0, 2, 3]
    torch.testing.assert_close(made(input_ids=IDS).logits, want)


def test_preparing_twice_gives_the_same_model():
    first, _ = run(opt(), structured(ffn=0.3, hidden=0.5, depth=0.5))
    second, _ = run(opt(), structured(ffn=0.3, hidden=0.5, depth=0.5))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_masks_of_earlier_pruning_survive_in_what_is_left():
    model = opt()
    prune_magnitude(model, select(model, describe(model)).layers, 0.5)
    names = {name for name, _ in masked_layers(model) if ".3." not in name}
    made, _ = run(model, structured(ffn=0.5, hidden=0.5, depth=0.25))
    layers = dict(masked_layers(made))
    assert names == set(layers)
    assert all(torch.equal(layer.weight != 0, layer.weight_mask) for layer in layers.values())


def test_ignore_keeps_blocks_and_the_channels_of_their_stage():
    model = opt()
    for index in (1, 2):
        for parameter in model.model.decoder.layers[index].parameters():
            parameter.data.zero_()
    _, facts = run(model, structured(depth=0.5, ignore=("*.layers.1",)))
    assert 1 in facts["kept"]["blocks"]
    assert 2 not in facts["kept"]["blocks"]
    made, facts = run(efficientnet(), structured(channels=0.5, ignore=("*.blocks.1",)))
    assert made.config.expand_ratios == [1, 6, 2]
    assert list(facts["kept"]["channels"]) == ["efficientnet.encoder.blocks.2"]


def test_problems_name_the_key_the_value_and_the_fix():
    (told,) = structured().problems()
    assert told.startswith("compression.structured: ffn, heads, hidden, depth and channels are all 0 or null")
    assert structured(depth=0.5).problems() == []
    with torch.device("meta"):
        model = opt()
    for method, wanted in (
        (structured(ffn=0.01), "compression.p.ffn=0.01 removes none of 48 feed-forward units; choose at least 0.0209"),
        (structured(ffn=0.5, round_to=64), "choose a smaller round_to"),
        (structured(depth=0.2), "compression.p.depth=0.2 removes none of 4 blocks; choose at least 0.25"),
        (structured(heads=0.5), "compression.p.heads=0.5: the config of OPTForCausalLM cannot say this"),
        (structured(channels=0.5), "compression.p: nothing of a OPTForCausalLM is removed; set ffn"),
        (structured(ffn=0.5, ignore=("*.layers.0",)), "compression.p.ignore keeps blocks"),
        (structured(depth=0.5, ignore=("*.layers.?",)), "all 4 blocks are in `ignore`"),
        (structured(depth=0.5, ignore=("fc1",)), "compression.p.ignore=[fc1] names no block"),
        (structured(depth=0.5, ignore=("layerz",)), "did you mean 'layers'"),
    ):
        (told,) = method.preflight(model, context(model, "p"))
        assert wanted in told, told
    assert len(structured(ffn=0.01, depth=0.01, hidden=0.01).preflight(model, context(model))) == 3
    with pytest.raises(ConfigError, match="removes none"):
        prune_structured(opt(), describe(opt()), {"ffn": 0.001}, [{"input_ids": IDS}])


def test_without_norms_of_a_known_layout_hidden_dimensions_go_by_magnitude():
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    model = BertForSequenceClassification(config)
    (told,) = structured(hidden=0.5).preflight(model, context(model))
    assert "compression.link.importance=activation goes by norms" in told
    assert "choose magnitude" in told
    for importance in ("magnitude", "taylor"):
        made, _ = run(copy.deepcopy(model), structured(hidden=0.5, importance=importance))
        assert made.config.hidden_size == 16


@pytest.mark.parametrize(
    "wrong", ["ffn=1", "heads=-0.1", "depth=1.5", "hidden=half", "importance=random", "round_to=0"]
)
def test_values_out_of_range_are_refused_before_torch_is_needed(wrong):
    with pytest.raises(ConfigError, match=f"compression.structured.{wrong.partition('=')[0]}"):
        compose(["compression=structured", f"compression.structured.{wrong}"])


@pytest.mark.parametrize(
    ("build", "method"),
    [
        (opt, structured(ffn=0.5, depth=0.5, ignore=("*.layers.2",))),
        (opt, structured(hidden=0.5)),
        (llama, structured(heads=0.5, hidden=0.25, depth=0.25)),
        (lambda: llama().bfloat16(), structured(ffn=0.25, importance="magnitude")),
        (efficientnet, structured(channels=0.5)),
    ],
)
def test_later_links_are_checked_on_the_shapes_that_pruning_leaves(build, method):
    model = build()
    promised = method.reshaped(model, context(model))
    made, _ = run(model, method)
    assert all(tensor.is_meta for tensor in promised.parameters())
    assert {n: (t.shape, t.dtype) for n, t in promised.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in made.state_dict().items()
    }
    assert describe(promised) == describe(made)
    assert promised.config.to_dict() == made.config.to_dict()


def test_settings_that_lead_to_no_model_promise_none():
    model = opt()
    with pytest.raises(ConfigError, match="removes none"):
        structured(ffn=0.01).reshaped(model, context(model))


@pytest.mark.parametrize("importance", ["activation", "taylor", "magnitude"])
def test_a_nan_weight_is_an_error_that_names_where(importance):
    model = opt()
    model.model.decoder.layers[2].fc2.weight.data[3, 4] = float("nan")
    with pytest.raises(LeanfitError, match=r"NaN.*model\.decoder\.layers\.2"):
        run(model, structured(ffn=0.5, importance=importance))
    trained = opt()
    trained.model.decoder.layers[1].fc1.weight.data[0, 0] = float("inf")
    with pytest.raises(LeanfitError, match=r"model\.decoder\.layers\.1\.fc1"):
        structured(ffn=0.5).finalize(trained, context(trained))


@pytest.mark.parametrize("build", [opt, llama])
def test_by_taylor_units_without_weights_go_and_outputs_stay(build):
    model = build()
    for index, layer in enumerate(model.get_decoder().layers):
        mlp = layer if build is opt else layer.mlp
        down, ups = (mlp.fc2, [mlp.fc1]) if build is opt else (mlp.down_proj, [mlp.up_proj, mlp.gate_proj])
        silent = [unit for unit in range(48) if unit % 4 == index]
        down.weight.data[:, silent] = 0
        for up in ups:
            up.weight.data[silent] = 0
    want = model(input_ids=IDS).logits
    made, facts = run(model, structured(ffn=0.25, importance="taylor"))
    assert facts["importance"] == "taylor"
    assert facts["kept"]["ffn"] == [
        spans([unit for unit in range(48) if unit % 4 != index]) for index in range(len(facts["kept"]["ffn"]))
    ]
    torch.testing.assert_close(made(input_ids=IDS).logits, want)


@pytest.mark.parametrize(
    ("build", "shares"),
    [(llama, {"heads": 0.5, "ffn": 0.5, "hidden": 0.25, "depth": 0.25}), (efficientnet, {"channels": 0.5})],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_taylor_every_kind_is_cut_in_any_precision_and_leaves_no_gradients(build, shares, dtype):
    model = build().to(dtype)
    told = context(model)
    batch = {name: rows.to(dtype) if rows.is_floating_point() else rows for name, rows in told.calibration()[0].items()}
    made, facts = prune_structured(model, told.architecture, shares, [batch], importance="taylor")
    assert set(facts["sizes"]) == set(shares)
    assert all(p.grad is None and p.requires_grad and p.dtype == dtype for p in made.parameters())


def test_importance_on_data_without_data_is_an_error():
    with pytest.raises(LeanfitError, match="importance=taylor needs batches"):
        prune_structured(opt(), describe(opt()), {"ffn": 0.5}, importance="taylor")


def test_a_quantized_model_is_refused():
    with pytest.raises(ConfigError, match="'structured' cannot follow 'int8'"):
        compose(["compression=[int8,structured]"])


@pytest.mark.parametrize(
    ("indices", "short"), [([], ""), ([3], "3"), ([0, 1, 2, 5], "0-2,5"), ([1, 3, 4], "1,3-4"), ([0, 2], "0,2")]
)
def test_indices_are_told_in_short(indices, short):
    assert spans(indices) == short


def test_the_pure_function_works_without_the_framework_and_is_given_back_unchanged_width():
    model = opt()
    before = copy.deepcopy(model.state_dict())
    made, facts = prune_structured(model, describe(model), {"ffn": 0.5})
    assert facts["importance"] == "magnitude"
    assert made.config.ffn_dim == 24
    assert model.config.ffn_dim == 48
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


TINY = ["model=gpt_nano", "trainer=smoke", "trainer.max_steps=8", "data.evaluation_tokens=1024", "device=cpu"]


def whole(directory: Path, *overrides: str):
    assert main([*overrides, f"hydra.run.dir={directory}"]) == 0
    result = read_result(directory / "result.json")
    assert result["artifact"]["reload"] == {"ok": True, "max_abs_diff": 0.0}
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chain", "changes"),
    [
        ("structured", ["structured.depth=0.5", "structured.importance=magnitude"]),
        ("structured", ["structured.hidden=0.5", "structured.steps=0"]),
        ("structured", ["structured.depth=0.5", "structured.importance=taylor"]),
        ("[structured,int8]", []),
        ("[magnitude,structured]", []),
    ],
)
def test_whole_runs_of_the_nano_gpt(chain, changes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = whole(tmp_path / "run", *TINY, f"compression={chain}", *(f"compression.{change}" for change in changes))
    stage = next(stage for stage in result["stages"] if stage["name"] == "structured")
    assert stage["detail"]["sizes"]["ffn"] == {"before": 256, "after": 128}
    assert stage["detail"]["parameters_after"] == result["size"]["parameters_after"]
    assert (stage["train"] is None) == ("structured.steps=0" in changes)
    assert result["size"]["ratio"] > 1
    if chain == "structured":
        made = pipeline.load(tmp_path / "run" / "artifact")
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "artifact").eval()
        torch.testing.assert_close(opened(input_ids=IDS).logits, made(input_ids=IDS).logits, rtol=0, atol=0)
    if chain == "[magnitude,structured]":
        assert result["size"]["nonzero_after"] < result["size"]["parameters_after"] * 0.8


@pytest.mark.slow
@pytest.mark.parametrize("model", ["efficientnet", "llama"])
def test_whole_runs_of_other_models(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = (
        ["data=digits"]
        if model == "efficientnet"
        else ["model.layers=2", "model.width=64", "data.evaluation_tokens=1024"]
    )
    result = whole(
        tmp_path / "run", f"model={model}", *data, "trainer=smoke", "trainer.max_steps=4", "device=cpu",
        "compression=structured",
    )  # fmt: skip
    kind = "channels" if model == "efficientnet" else "ffn"
    assert list(result["stages"][0]["detail"]["sizes"]) == [kind]
    assert result["size"]["ratio"] > 1
