import copy
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Dinov2Config,
    Dinov2ForImageClassification,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    FalconConfig,
    FalconForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    IJepaConfig,
    IJepaForImageClassification,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from pipeline.artifact import receipt, store
from pipeline.compression.magnitude import prune_magnitude
from pipeline.errors import ArtifactError
from pipeline.layers.offload import place_of
from pipeline.layers.schemes import quantize_layers
from pipeline.layers.select import select, split_experts
from pipeline.layers.sparsity import masked_layers
from pipeline.memory.measure import measure_peak, storage_bytes
from pipeline.models.architecture import describe
from tests.tiny import mixtral

ROOT = Path(__file__).resolve().parents[2]
IDS = {"input_ids": torch.arange(80).view(2, 40) % 64}
# compressed-tensors' and accelerate's loaders warn about their own dependencies
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def llama4():
    """Experts in stacked tensors, which transformers exchanges where a config tells of quantization."""
    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, intermediate_size_mlp=40, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_local_experts=4, max_position_embeddings=128,
        pad_token_id=0,
    )  # fmt: skip
    return Llama4ForCausalLM(config).eval()


def test_a_quantized_model_of_which_transformers_would_exchange_experts_is_no_public_format(tmp_path):
    """It does so for whatever names compressed-tensors, and would look for experts as layers of their own."""
    model = llama4()
    assert store.save(model, tmp_path / "dense", chain=[], probe=IDS)["format"] == "dense"
    quantize_layers(model, select(model, describe(model)).layers, "int8")
    manifest = store.save(model, tmp_path / "a", chain=[], probe=IDS)
    assert (manifest["format"], manifest["opens_with"]) == ("leanfit", ["pipeline.load"])
    assert torch.equal(store.output_of(store.load(tmp_path / "a"), IDS), store.output_of(model, IDS))
    with pytest.raises(ValueError, match="leanfit"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a")


SIZES = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SPACE = {**SIZES, **TOKENS, "state_size": 8}
READING = {
    "Falcon": lambda: FalconForCausalLM(FalconConfig(**SIZES, **HEADS)),
    "Falcon Mamba": lambda: FalconMambaForCausalLM(FalconMambaConfig(**SPACE)),
    "Mamba": lambda: MambaForCausalLM(MambaConfig(**SPACE)),
    "Mamba 2": lambda: Mamba2ForCausalLM(Mamba2Config(**SPACE, num_heads=4, head_dim=16, n_groups=1, chunk_size=16)),
    "ModernBERT decoder": lambda: ModernBertDecoderForCausalLM(
        ModernBertDecoderConfig(**SIZES, **HEADS, **TOKENS, intermediate_size=48)
    ),
    "nanochat": lambda: NanoChatForCausalLM(NanoChatConfig(**SIZES, **HEADS, intermediate_size=48)),
    "RecurrentGemma": lambda: RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(**{**SIZES, "num_hidden_layers": 3}, **HEADS, intermediate_size=64, lru_width=32)
    ),
    "StarCoder": lambda: GPTBigCodeForCausalLM(GPTBigCodeConfig(**SIZES, **HEADS, **TOKENS, n_positions=64)),
}


@pytest.mark.parametrize("build", READING.values(), ids=READING)
def test_quantized_layers_that_transformers_reads_without_their_scheme_are_of_no_public_format(tmp_path, build):
    """It looks for a weight, of which there is none while it is packed; integers of 8 bits are one."""
    torch.manual_seed(0)
    model, whole = build().eval(), build().eval()
    quantize_layers(whole, select(whole, describe(whole)).layers, "int8")
    assert store.save(whole, tmp_path / "whole", chain=[], probe=IDS)["format"] == "int-quantized"
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    quantize_layers(model, select(model, describe(model)).layers, "weight_only", bits=4, group_size=16)
    manifest = store.save(model, tmp_path / "a", chain=[], probe=IDS)
    assert (manifest["format"], manifest["opens_with"]) == ("leanfit", ["pipeline.load"])
    assert torch.equal(store.output_of(store.load(tmp_path / "a"), IDS), store.output_of(model, IDS))


def test_a_config_with_a_number_that_json_has_not_comes_back(tmp_path):
    model = READING["Mamba 2"]().eval()
    assert model.config.time_step_limit == (0.0, float("inf"))
    store.save(model, tmp_path / "a", chain=[], probe=IDS)
    loaded = store.load(tmp_path / "a")
    assert tuple(loaded.config.time_step_limit) == (0.0, float("inf"))
    assert torch.equal(store.output_of(loaded, IDS), store.output_of(model, IDS))


def opt(tied=True, width=32, layers=2):
    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=256, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, ffn_dim=4 * width,
            max_position_embeddings=128, word_embed_proj_dim=width, dropout=0.0, tie_word_embeddings=tied,
            activation_function="gelu", attention_dropout=0.0,
        )
    ).eval()  # fmt: skip


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
        )
    ).eval()  # fmt: skip


def efficientnet():
    torch.manual_seed(0)
    model = EfficientNetForImageClassification(
        EfficientNetConfig(
            image_size=16, num_channels=1, width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320,
            in_channels=[32], out_channels=[16], kernel_sizes=[3], strides=[1], num_block_repeats=[1],
            expand_ratios=[1], depthwise_padding=[], num_labels=4,
        )
    ).eval()  # fmt: skip
    for parameter in model.parameters():  # the fresh ones are so small that outputs vanish
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
    return model


SCHEMES = {
    "int8": ("int8", {"share_flat": True}),
    "w8": ("weight_only", {"bits": 8}),
    "w4": ("weight_only", {"bits": 4, "group_size": 16}),
    "w4 with zero points": ("weight_only", {"bits": 4, "group_size": 16, "symmetric": False}),
    "w3": ("weight_only", {"bits": 3, "group_size": 16}),
    "w2 with zero points": ("weight_only", {"bits": 2, "group_size": 16, "symmetric": False}),
}


def quantized(model, name, layers=None):
    scheme, settings = SCHEMES[name]
    return quantize_layers(model, layers or select(model, describe(model)).layers, scheme, **settings)


def pruned(model, sparsity=0.5, pattern=None):
    return prune_magnitude(model, select(model, describe(model)).layers, sparsity, pattern)


MODELS = {"opt tied": opt, "opt untied": lambda: opt(False), "llama": llama}
FORMATS = {
    None: "dense", "int8": "int-quantized", "w8": "pack-quantized", "w4": "pack-quantized", "w3": "pack-quantized",
    "w4 with zero points": "leanfit", "w2 with zero points": "leanfit",
}  # fmt: skip


@pytest.mark.parametrize("scheme", FORMATS, ids=str)
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_round_trip_is_exact_and_plain_transformers_agrees(tmp_path, build, scheme, dtype):
    model = build().to(dtype)
    if scheme:
        quantized(model, scheme)
    manifest = store.save(model, tmp_path / "a", chain=[], probe=IDS, extra={})
    assert manifest["format"] == FORMATS[scheme]
    loaded = store.load(tmp_path / "a")
    assert not loaded.training
    want, got = store.output_of(model, IDS), store.output_of(loaded, IDS)
    assert torch.equal(want, got)
    assert {n: t.dtype for n, t in loaded.state_dict().items()} == {n: t.dtype for n, t in model.state_dict().items()}
    if dtype == torch.float32 and manifest["format"] != "leanfit":
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
        theirs = store.output_of(plain, IDS)
        assert (theirs - got).abs().max() <= 1e-3 * got.abs().max()


def test_an_embedding_scale_of_64_bits_is_as_plain_transformers_makes_it(tmp_path):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}
    sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "sliding_window": 32}
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads, pad_token_id=0)).double().eval()
    quantized(model, "int8")
    store.save(model, tmp_path / "a", chain=[], probe=IDS)
    want = store.output_of(model, IDS)
    assert torch.equal(store.output_of(store.load(tmp_path / "a"), IDS), want)
    theirs = store.output_of(AutoModelForCausalLM.from_pretrained(tmp_path / "a"), IDS)
    # A scale that was rounded to 32 bits moves activations over edges of int8: 1e-3 of an output each.
    assert (theirs - want).abs().max() <= 1e-9 * want.abs().max()


@pytest.mark.parametrize("scheme", ["int8", "w4"])
def test_ignored_linears_are_float_for_transformers_too(tmp_path, scheme):
    model = opt()
    layers = select(model, describe(model), ignore=("fc1",)).layers
    quantized(model, scheme, layers)
    store.save(model, tmp_path / "a", chain=[], probe=IDS)
    config = json.loads((tmp_path / "a/config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["model.decoder.layers.0.fc1", "model.decoder.layers.1.fc1", "lm_head"]
    theirs = store.output_of(AutoModelForCausalLM.from_pretrained(tmp_path / "a"), IDS)
    ours = store.output_of(store.load(tmp_path / "a"), IDS)
    assert (theirs - ours).abs().max() <= 1e-3 * ours.abs().max()


def test_dequantized_loading_gives_our_weights(tmp_path):
    model = quantized(opt(), "w4")
    store.save(model, tmp_path / "a", chain=[], probe=IDS)
    config = transformers.CompressedTensorsConfig(dequantize=True)
    with pytest.warns(UserWarning, match="quantization_config"):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "a", quantization_config=config)
    torch.testing.assert_close(
        plain.model.decoder.layers[0].fc1.weight, model.model.decoder.layers[0].fc1.dequantized(), rtol=0, atol=0
    )


def test_sizes_that_are_promised(tmp_path):
    model = opt(width=256, layers=4)
    store.save(model, tmp_path / "before", chain=[], probe=IDS)
    quantized(model, "int8")
    store.save(model, tmp_path / "after", chain=[], probe=IDS)
    assert store.tensor_bytes(tmp_path / "before") >= 3.5 * store.tensor_bytes(tmp_path / "after")
    layer = model.model.decoder.layers[0].fc1
    stored = layer.weight.numel() + layer.weight_scale.numel() * 4
    assert layer.weight.numel() * 4 >= 3.9 * stored
    assert store.count(model) == store.count(store.load(tmp_path / "after"))


@pytest.mark.parametrize("scheme", [None, "int8", "w8", "w4", "w3"], ids=str)
@pytest.mark.parametrize("pattern", [None, "2:4"], ids=str)
def test_pruned_models_are_stored_as_bitmask_and_come_back(tmp_path, scheme, pattern):
    dense = store.save(quantized(opt(), scheme) if scheme else opt(), tmp_path / "dense", chain=[], probe=IDS)
    model = pruned(opt(), 0.75 if pattern is None else 0.5, pattern)
    masks = {name: layer.weight_mask.clone() for name, layer in masked_layers(model)}
    if scheme:
        quantized(model, scheme)
    manifest = store.save(model, tmp_path / "a", chain=[], probe=IDS)
    assert dense["format"] != "leanfit"
    assert manifest["format"] == "leanfit"
    assert manifest["opens_with"] == ["pipeline.load"]
    assert store.tensor_bytes(tmp_path / "a") < store.tensor_bytes(tmp_path / "dense")
    loaded = store.load(tmp_path / "a")
    assert torch.equal(store.output_of(model, IDS), store.output_of(loaded, IDS))
    if scheme is None:
        again = store.load(tmp_path / "a", trainable=True)
        assert {n: m.weight_mask.tolist() for n, m in masked_layers(again)} == {n: m.tolist() for n, m in masks.items()}
        assert again.training
        assert all(p.requires_grad for p in again.parameters())
    # A snapshot goes through another save unharmed: bitmasks stay bitmasks.
    second = store.save(loaded, tmp_path / "b", chain=[], probe=IDS)
    if scheme is not None:
        assert second["encodings"] == manifest["encodings"]


def test_plain_transformers_refuses_what_it_would_fill_with_random_weights(tmp_path):
    store.save(pruned(opt()), tmp_path / "a", chain=[], probe=IDS)
    with pytest.raises(ValueError, match="leanfit"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="quant_method"):
        OPTForCausalLM.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize("kind", ["dense", "w4", "experts"])
def test_save_pretrained_is_refused_where_transformers_would_fill_in_random_weights(tmp_path, kind):
    model = split_experts(mixtral()) if kind == "experts" else opt()
    if kind == "w4":
        quantized(model, kind)
    store.save(model, tmp_path / "a", chain=[], probe=IDS)
    opened = store.load(tmp_path / "a")
    if kind == "dense":
        opened.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        assert torch.equal(store.output_of(again, IDS), store.output_of(model, IDS))
    else:
        for one in (opened, copy.deepcopy(opened), pickle.loads(pickle.dumps(opened))):
            with pytest.raises(NotImplementedError, match="copy the artifact's directory instead"):
                one.save_pretrained(tmp_path / "again")
        assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("scheme", [None, "int8", "w8", "w4", "w3"], ids=str)
def test_convolutions_round_trip(tmp_path, scheme):
    model = efficientnet()
    x = {"pixel_values": torch.randn(3, 1, 16, 16)}
    if scheme:
        layers = [n for n in select(model, describe(model)).layers if scheme in ("int8", "w8") or n != "classifier"]
        quantized(model, scheme, layers)
    manifest = store.save(model, tmp_path / "a", chain=[], probe=x)
    assert manifest["format"] == ("leanfit" if scheme else "dense")
    assert torch.equal(store.output_of(store.load(tmp_path / "a"), x), store.output_of(model, x))


@pytest.fixture
def artifact(tmp_path):
    store.save(
        quantized(opt(), "int8"), tmp_path / "a", chain=[{"name": "int8"}], probe=IDS, extra={"record": {"steps": 3}}
    )
    return tmp_path / "a"


def edit(directory, **changes):
    path = directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "probe.safetensors"])
def test_truncated_altered_and_missing_files_are_named(artifact, name):
    path = artifact / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(ArtifactError, match=f"{name}: truncated"):
        store.load(artifact)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=f"{name}: altered"):
        store.load(artifact)
    path.unlink()
    with pytest.raises(ArtifactError, match=f"{name}: missing"):
        store.load(artifact)


def test_newer_schema_and_broken_manifests_give_one_line(artifact):
    edit(artifact, schema=99)
    with pytest.raises(ArtifactError, match="schema 99 is newer"):
        store.load(artifact)
    for text in ("", "{", "[]", "3", '{"schema": true}', '{"schema": 1}', "[" * 100_000):
        (artifact / "manifest.json").write_text(text)
        with pytest.raises(ArtifactError) as error:
            store.load(artifact)
        assert "\n" not in str(error.value)
    (artifact / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"manifest\.json is missing"):
        store.load(artifact)


@pytest.mark.parametrize(
    "model",
    [
        {"class": "os.system", "type": "opt", "attention": "sdpa"},
        {"class": "AutoModel", "type": "opt", "attention": "sdpa"},
        {"class": "pipeline", "type": "opt", "attention": "sdpa"},
        {"class": "PreTrainedTokenizerFast", "type": "opt", "attention": "sdpa"},
        {"class": ["OPTForCausalLM"], "type": "opt", "attention": "sdpa"},
        {"class": "OPTForCausalLM", "type": "opt", "attention": "someone/their-kernel"},
        {},
    ],
)
def test_a_manifest_names_only_models_of_transformers(artifact, model):
    edit(artifact, model=model)
    with pytest.raises(ArtifactError):
        store.load(artifact)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": [{"name": "../a/model.safetensors", "bytes": 1, "sha256": ""}]},
        {"files": []},
        {"files": [3]},
        {"layers": {"no.such.layer": {"scheme": "int8", "settings": {}, "sparse": False}}},
        {"layers": {"lm_head": {"scheme": "pickle", "settings": {}, "sparse": False}}},
        {"layers": {"lm_head": 3}},
        {"layers": {}},
        {"tied": {"lm_head.weight": "nothing"}},
        {"chain": None},
        {"encodings": {"model.decoder.layers.0.fc1.weight": {"shape": [1 << 40], "bits": 8, "packed": False}}},
    ],
)
def test_hostile_manifests_give_one_clear_error(artifact, changes):
    edit(artifact, **changes)
    with pytest.raises(ArtifactError) as error:
        store.load(artifact)
    assert "\n" not in str(error.value)


def test_an_older_artifact_survives_a_save_that_fails(artifact, monkeypatch):
    before = store.read_manifest(artifact)
    monkeypatch.setattr(store, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(ArtifactError, match="cannot be written: disk full"):
        store.save(opt(), artifact, chain=[], probe=IDS)
    assert store.read_manifest(artifact) == before
    store.load(artifact)
    assert [p.name for p in artifact.parent.iterdir()] == ["a"]


@contextmanager
def files_of_at_most(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_where_the_system_writes_no_more_the_artifact_is_named_and_why(artifact, tmp_path):
    with files_of_at_most(20_000):
        for write in (partial(store.save, opt(), chain=[], probe=IDS), partial(store.publish, artifact)):
            with pytest.raises(ArtifactError) as refused:
                write(directory=tmp_path / "b")
            assert str(refused.value) == f"{tmp_path / 'b'}: cannot be written: File too large"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.fixture
def sharded(tmp_path, monkeypatch):
    """A dense artifact of several shards, and its model."""
    monkeypatch.setattr(store, "SHARD_BYTES", 20_000)
    model = opt(False)
    return model, store.save(model, tmp_path / "a", chain=[], probe=IDS), tmp_path / "a"


def test_above_a_size_weights_are_sharded_as_transformers_does(sharded):
    model, manifest, directory = sharded
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 40_000 for path in shards)
    assert not (directory / "model.safetensors").exists()
    assert store.tensor_bytes(directory) == sum(path.stat().st_size for path in shards)
    assert {path.name for path in shards} < {entry["name"] for entry in manifest["files"]}
    want = store.output_of(model, IDS)
    assert torch.equal(store.output_of(store.load(directory), IDS), want)
    assert torch.equal(store.output_of(AutoModelForCausalLM.from_pretrained(directory), IDS), want)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in dict(model.state_dict()).values())
    assert receipt.examine(directory).ok


@pytest.mark.started
def test_quantized_shards_open_everywhere_too(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_BYTES", 10_000)
    model = quantized(opt(), "w4")
    store.save(model, tmp_path / "a", chain=[], probe=IDS)
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 2
    found = receipt.check(tmp_path / "a")
    assert found.ok, found.problems
    assert found.transformers_max_rel_diff is not None


def test_a_shard_that_is_missing_truncated_or_not_listed_is_named(sharded):
    _, manifest, directory = sharded
    path = sorted(directory.glob("model-*.safetensors"))[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(ArtifactError, match=rf"{path.name}: truncated"):
        store.load(directory)
    path.unlink()
    with pytest.raises(ArtifactError, match=rf"{path.name}: missing"):
        store.load(directory)
    edit(directory, files=[entry for entry in manifest["files"] if entry["name"] != path.name])
    with pytest.raises(ArtifactError, match="one of its shards is not among its files"):
        store.load(directory)


@pytest.mark.parametrize("scheme", [None, "int8", "w4"], ids=str)
@pytest.mark.parametrize("sparsity", [None, 0.75])
def test_an_artifact_opened_in_files_is_the_same_and_stays_as_it_was(tmp_path, scheme, sparsity):
    model = pruned(opt(), sparsity) if sparsity else opt()
    if scheme:
        quantized(model, scheme)
    store.save(model, tmp_path / "a", chain=[], probe=IDS)
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    inside, filed = (store.load(tmp_path / "a", trainable=True, offload_to=to) for to in (None, tmp_path))
    assert torch.equal(store.output_of(inside, IDS), store.output_of(filed, IDS))
    state = filed.state_dict()
    assert state.keys() == inside.state_dict().keys()
    assert {place_of(tensor) for tensor in state.values()} == {tmp_path}
    with torch.no_grad():
        for tensor in state.values():
            tensor.zero_()
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("scheme", [None, "int8", "w4"], ids=str)
def test_the_blueprint_of_a_quantized_artifact_has_its_layers_and_no_memory(tmp_path, scheme):
    model = quantized(opt(), scheme) if scheme else opt()
    store.save(model, tmp_path / "a", chain=[], probe=IDS)
    made = store.blueprint(tmp_path / "a", quantized=True)
    assert {name: type(module) for name, module in made.named_modules()} == {
        name: type(module) for name, module in model.named_modules()
    }
    assert {tensor.device.type for tensor in made.state_dict().values()} == {"meta"}


@pytest.mark.parametrize(("build", "tied"), [(opt, True), (lambda: opt(False), False)])
def test_the_blueprint_ties_what_the_artifact_ties(tmp_path, build, tied):
    model = build()
    store.save(model, tmp_path / "a", chain=[], probe=IDS)
    shapes, loaded = store.blueprint(tmp_path / "a"), store.load(tmp_path / "a")
    for opened in (shapes, loaded):
        assert (opened.lm_head.weight is opened.model.decoder.embed_tokens.weight) is tied
    assert describe(shapes).tied == describe(model).tied
    assert sum(p.numel() for p in shapes.parameters()) == sum(p.numel() for p in model.parameters())


def test_the_blueprint_of_what_is_not_whole_is_refused_as_the_artifact_is(tmp_path):
    store.save(opt(), tmp_path / "a", chain=[], probe=IDS)
    os.truncate(tmp_path / "a" / "model.safetensors", 100)
    with pytest.raises(ArtifactError, match=r"model\.safetensors: truncated, 100 bytes"):
        store.blueprint(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"model\.safetensors: missing"):
        store.blueprint(tmp_path / "a")


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_a_model_is_opened_in_no_more_memory_than_its_own(tmp_path, scheme):
    model = opt(width=128)
    store.save(model if scheme is None else quantized(model, scheme), tmp_path / "a", chain=[], probe=IDS)
    with measure_peak("cpu") as peak:
        loaded = store.load(tmp_path / "a")
    assert peak.bytes == storage_bytes([*loaded.parameters(), *loaded.buffers()])


def test_what_is_stored_of_batch_norms_is_there_once_while_a_model_is_opened(tmp_path):
    store.save(efficientnet(), tmp_path / "a", chain=[], probe={"pixel_values": torch.zeros(1, 1, 16, 16)})
    with measure_peak("cpu") as peak:
        loaded = store.load(tmp_path / "a")
    assert peak.bytes == storage_bytes([*loaded.parameters(), *loaded.buffers()])


@pytest.mark.parametrize("scheme", [None, "int8", "w4"], ids=str)
def test_the_receipt_is_the_same_with_weights_in_files(tmp_path, scheme):
    model = quantized(opt(), scheme) if scheme else opt()
    store.save(model, tmp_path / "a", chain=[], probe=IDS)
    assert receipt.examine(tmp_path / "a", tmp_path) == receipt.examine(tmp_path / "a")


def test_other_files_are_never_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years")
    with pytest.raises(ArtifactError, match="not an artifact"):
        store.save(opt(), tmp_path / "mine", chain=[], probe=IDS)
    assert (tmp_path / "mine/thesis.txt").read_text() == "years"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_every_file_is_as_readable_as_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        store.save(llama(), tmp_path / "a", chain=[], probe=IDS)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()}
    assert modes == dict.fromkeys(modes, mode)
    assert "model.safetensors" in modes


def test_annotations_and_publishing(artifact, tmp_path):
    store.annotate(artifact, {"quality": {"metric": "perplexity", "after": 3.0}})
    manifest = store.read_manifest(artifact)
    assert manifest["quality"]["after"] == 3.0
    assert manifest["record"] == {"steps": 3}
    assert manifest["chain"] == [{"name": "int8"}]
    with pytest.raises(ValueError, match="schema"):
        store.annotate(artifact, {"schema": 2})
    store.publish(artifact, tmp_path / "published")
    store.load(tmp_path / "published")
    assert {f["name"] for f in store.files(artifact)} >= {"manifest.json", "model.safetensors", "config.json"}


@pytest.fixture
def opener(tmp_path, monkeypatch):
    """The interpreter, and the file with the process of what opens artifacts in its place, and does not end."""
    real, stub, number = sys.executable, tmp_path / "python", tmp_path / "number"
    stub.write_text(f"#!/bin/sh\necho a warning >&2\necho $$ > {number}.new\nmv {number}.new {number}\nexec sleep 60\n")
    stub.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stub))
    return real, number


def started(file):
    deadline = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return int(file.read_text())


def lives(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.started
def test_what_opens_an_artifact_is_named_where_it_is_killed(opener, tmp_path):
    with ThreadPoolExecutor(1) as apart:
        found = apart.submit(receipt.check, tmp_path / "a")
        os.kill(started(opener[1]), signal.SIGKILL)
    (told,) = found.result().problems
    assert told.startswith(f"{tmp_path / 'a'}: the process that opened it was killed by SIGKILL")


@pytest.mark.started
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent is gone")
def test_what_opens_an_artifact_ends_with_the_program(opener):
    real, number = opener
    code = f"import sys; from pipeline.artifact import receipt; sys.executable = {sys.executable!r}; receipt.check('a')"
    program = subprocess.Popen([real, "-c", code], cwd=ROOT)
    child = started(number)
    program.kill()
    program.wait()
    deadline = time.monotonic() + 5
    while lives(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not lives(child)


@pytest.mark.started
def test_the_receipt_of_a_fresh_process(artifact, tmp_path):
    good = receipt.check(artifact)
    assert good.ok, good.problems
    assert good.max_abs_diff == 0
    assert good.transformers_max_rel_diff is not None
    assert good.transformers_max_rel_diff <= 1e-3
    shutil.copytree(artifact, tmp_path / "bad")
    path = tmp_path / "bad/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    bad = receipt.examine(tmp_path / "bad")
    assert not bad.ok
    assert "truncated" in bad.problems[0]


def test_the_receipt_finds_claims_that_were_altered(artifact):
    edit(artifact, quality={"before": 1.0, "after": 1.0})
    found = receipt.examine(artifact)
    assert not found.ok
    assert "it does not say what was written" in found.problems[0]


def test_the_receipt_finds_other_outputs(artifact):
    from safetensors.torch import load_file, save_file

    from pipeline.artifact import manifest as manifests

    stored = load_file(artifact / "probe.safetensors")
    stored["output"] = stored["output"] + 0.01
    save_file(stored, artifact / "probe.safetensors")
    manifests.write(artifact, {**manifests.read(artifact), "files": manifests.describe_files(artifact)})
    found = receipt.examine(artifact)
    assert not found.ok
    assert "differ by 0.01" in found.problems[0]


@pytest.mark.parametrize(("scheme", "settings"), [("int8", {}), ("fp8", {"activations": "dynamic"})])
def test_a_classifier_whose_images_have_activation_scales_of_their_own_is_of_no_public_format(
    tmp_path, scheme, settings
):
    """compressed-tensors takes one scale for all of a batch: the outputs would be others, by chance much or little."""
    model, batch = efficientnet(), {"pixel_values": torch.randn(8, 1, 16, 16)}
    quantize_layers(model, ["classifier"], scheme, **settings)
    manifest = store.save(model, tmp_path / "a", chain=[], probe=batch)
    assert (manifest["format"], manifest["opens_with"]) == ("leanfit", ["pipeline.load"])
    assert torch.equal(store.output_of(store.load(tmp_path / "a"), batch), store.output_of(model, batch))
    weights = quantize_layers(efficientnet(), ["classifier"], "fp8")
    assert store.save(weights, tmp_path / "b", chain=[], probe=batch)["format"] == "float-quantized"


VISION = {"num_channels": 1, "image_size": 16, "num_labels": 4}
WIDE = {**VISION, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CLASSIFIERS = {
    "EfficientNet": (efficientnet, {"weight_only": "leanfit", "fp8": "float-quantized"}),
    "ViT": (
        lambda: ViTForImageClassification(ViTConfig(**WIDE, intermediate_size=48)),
        {"weight_only": "pack-quantized", "fp8": "float-quantized"},
    ),
    "I-JEPA": (
        lambda: IJepaForImageClassification(IJepaConfig(**WIDE, intermediate_size=48)),
        {"weight_only": "leanfit", "fp8": "float-quantized"},
    ),
    "DINOv2": (
        lambda: Dinov2ForImageClassification(Dinov2Config(**WIDE)),
        {"weight_only": "leanfit", "fp8": "leanfit"},
    ),
}


@pytest.mark.parametrize(("build", "formats"), CLASSIFIERS.values(), ids=CLASSIFIERS)
def test_a_classifier_whose_linear_layers_are_quantized_opens_with_what_is_said(tmp_path, build, formats):
    torch.manual_seed(0)
    for scheme, form in formats.items():
        model, batch = build().eval(), {"pixel_values": torch.randn(2, 1, 16, 16)}
        layers = select(model, describe(model), (), (nn.Linear,)).layers
        quantize_layers(model, layers, scheme, **({"bits": 4} if scheme == "weight_only" else {}))
        assert store.save(model, tmp_path / scheme, chain=[], probe=batch)["format"] == form
        found = receipt.examine(tmp_path / scheme)
        assert found.ok, found.problems
        assert (found.transformers_max_rel_diff is None) == (form == "leanfit")


def test_blocks_of_a_vision_transformer_with_activation_scales_open_in_plain_transformers(tmp_path):
    """Their inputs are never flat; a classifier's head has one row for each image."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViTConfig(**sizes, image_size=16, patch_size=4, num_channels=1, num_labels=10)
    batch = {"pixel_values": torch.randn(8, 1, 16, 16)}
    model = ViTForImageClassification(config).eval()
    layers = select(model, describe(model)).layers
    whole = quantize_layers(copy.deepcopy(model), layers, "int8")
    assert store.save(whole, tmp_path / "whole", chain=[], probe=batch)["format"] == "leanfit"
    blocks = quantize_layers(model, [name for name in layers if name != "classifier"], "int8")
    manifest = store.save(blocks, tmp_path / "blocks", chain=[], probe=batch)
    assert manifest["format"] == "int-quantized"
    plain = ViTForImageClassification.from_pretrained(tmp_path / "blocks").eval()
    want = store.output_of(blocks, batch)
    assert (store.output_of(plain, batch) - want).abs().max() <= 1e-3 * want.abs().max()
