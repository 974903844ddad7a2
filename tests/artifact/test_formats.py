"""Quantized mixtures in a public format: what plain transformers makes of them, and which have none."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline.artifact import formats, receipt, store
from pipeline.compression.magnitude import prune_magnitude
from pipeline.layers import public_names
from pipeline.layers.experts import linear_experts
from pipeline.layers.packing import unpack_int32
from pipeline.layers.quantized import quantized_layers
from pipeline.layers.schemes import quantize_layers
from pipeline.layers.select import select, split_experts
from pipeline.memory.measure import measure_peak, storage_bytes
from pipeline.models.architecture import describe
from tests.layers.test_experts import deepseek, gpt_oss, hunyuan, llama4, minimax, nemotron, phimoe, qwen
from tests.tiny import mixtral

# compressed-tensors' and accelerate's loaders warn about their own dependencies
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
IDS = {"input_ids": torch.arange(60).view(3, 20) * 7 % 64}
SCHEMES = {
    "w4": ("weight_only", {"bits": 4, "group_size": 8}),
    "w3": ("weight_only", {"bits": 3, "group_size": 8}),
    "w8": ("weight_only", {"bits": 8}),
    "fp8": ("fp8", {}),
    "int8": ("int8", {}),
    "fp8 activations": ("fp8", {"activations": "dynamic"}),
    "zero points": ("weight_only", {"bits": 4, "group_size": 8, "symmetric": False}),
    "nf4": ("nf4", {"block_size": 16, "double_quant": False}),
}
FORMATS = {"w4": "pack-quantized", "w3": "pack-quantized", "w8": "pack-quantized", "fp8": "float-quantized"}
FAMILIES = [mixtral, deepseek, phimoe, nemotron, hunyuan, qwen, minimax]
PLAIN = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM

assert "pipeline" not in sys.modules
for directory in map(Path, sys.argv[1:]):
    model, told = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    absent = [*told["missing_keys"], *told["unexpected_keys"], *told["mismatched_keys"]]
    with torch.inference_mode():
        logits = model.eval()(torch.arange(60).view(3, 20) * 7 % 64).logits
    torch.save((absent, logits), directory.with_suffix(".logits"))
"""


def quantized(model, scheme, ignore=()):
    kind, settings = SCHEMES[scheme]
    model = split_experts(model, ignore)
    return quantize_layers(model, select(model, describe(model), ignore).layers, kind, **settings)


def opened_by_plain_transformers(*directories):
    """(absent tensors, logits) of each, from a process that knows transformers alone."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", PLAIN, *map(str, directories)]
    subprocess.run(command, cwd=directories[0].parent, env=environment, check=True, capture_output=True)
    return [torch.load(directory.with_suffix(".logits")) for directory in directories]


@pytest.mark.started
@pytest.mark.slow
def test_plain_transformers_opens_a_quantized_mixture_of_each_family(tmp_path):
    models = {
        f"{build.__name__}-{scheme}": (scheme, quantized(build(), scheme)) for build in FAMILIES for scheme in FORMATS
    }
    for name, (scheme, model) in models.items():
        manifest = store.save(model, tmp_path / name, chain=[], probe=IDS)
        assert (manifest["format"], manifest["opens_with"]) == (
            FORMATS[scheme],
            ["pipeline.load", "transformers>=5.22"],
        )
    found = opened_by_plain_transformers(*(tmp_path / name for name in models))
    for (name, (_, model)), (absent, logits) in zip(models.items(), found, strict=True):
        assert absent == [], name
        ours = store.output_of(model, IDS)
        assert (logits - ours).abs().max() <= 1e-5 * ours.abs().max(), name


@pytest.mark.parametrize("scheme", FORMATS)
@pytest.mark.parametrize("build", FAMILIES)
def test_a_mixture_in_a_public_format_comes_back_as_it_was(tmp_path, build, scheme):
    model = quantized(build(), scheme)
    store.save(model, tmp_path / "a", chain=[], probe=IDS)
    loaded = store.load(tmp_path / "a")
    assert torch.equal(store.output_of(loaded, IDS), store.output_of(model, IDS))
    assert {n: type(m) for n, m in loaded.named_modules()} == {n: type(m) for n, m in model.named_modules()}
    again, state = loaded.state_dict(), model.state_dict()
    assert {n: (t.dtype, t.shape) for n, t in again.items()} == {n: (t.dtype, t.shape) for n, t in state.items()}
    assert all(torch.equal(again[n].float(), t.float()) for n, t in state.items())
    shapes = store.blueprint(tmp_path / "a", quantized=True).state_dict()
    assert {n: (t.dtype, t.shape) for n, t in shapes.items()} == {n: (t.dtype, t.shape) for n, t in state.items()}


@pytest.mark.parametrize("scheme", ["w4", "fp8"])
def test_a_mixture_is_opened_in_no_more_memory_than_its_own(tmp_path, scheme):
    store.save(quantized(mixtral(), scheme), tmp_path / "a", chain=[], probe=IDS)
    with measure_peak("cpu") as peak:
        loaded = store.load(tmp_path / "a")
    assert peak.bytes == storage_bytes([*loaded.parameters(), *loaded.buffers()])


@pytest.mark.parametrize("build", FAMILIES)
def test_layers_are_called_as_in_what_transformers_writes_of_the_float_model(tmp_path, build):
    build().save_pretrained(tmp_path / "float")
    store.save(quantized(build(), "w4"), tmp_path / "a", chain=[], probe=IDS)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    weights = {name.replace(".weight_packed", ".weight") for name in tensors}
    assert {name for name in weights if not name.endswith((".weight_scale", ".weight_shape"))} == set(
        load_file(tmp_path / "float" / "model.safetensors")
    )


def test_rows_of_the_gate_and_of_the_way_up_are_layers_of_their_own(tmp_path):
    model = quantized(mixtral(), "w4")
    store.save(model, tmp_path / "a", chain=[], probe=IDS)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    layer = quantized_layers(model)["model.layers.1.mlp.experts.3.gate_up_proj"]
    for name, rows in (("w1", slice(0, 48)), ("w3", slice(48, 96))):
        stored = {leaf: tensors[f"model.layers.1.block_sparse_moe.experts.3.{name}.{leaf}"] for leaf in
                  ("weight_packed", "weight_scale", "weight_shape")}  # fmt: skip
        assert stored["weight_shape"].tolist() == [48, 32]
        integers = unpack_int32(stored["weight_packed"], 4, 32)
        weight = integers.unflatten(1, (4, 8)) * stored["weight_scale"].unsqueeze(-1)
        assert torch.equal(weight.flatten(1), layer.dequantized()[rows])


def test_the_config_spares_what_chooses_among_experts_by_its_public_name(tmp_path):
    for build, spared in (
        (mixtral, ["lm_head", "model.layers.0.block_sparse_moe.gate", "model.layers.1.block_sparse_moe.gate"]),
        (hunyuan, ["model.layers.0.mlp.gate.wg", "model.layers.1.mlp.gate.wg", "lm_head"]),
    ):
        store.save(quantized(build(), "w4"), tmp_path / build.__name__, chain=[], probe=IDS)
        config = json.loads((tmp_path / build.__name__ / "config.json").read_text())["quantization_config"]
        assert config["ignore"] == spared
        assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"]]


def test_the_file_is_no_larger_than_under_the_names_of_the_model_but_for_names_and_shapes(tmp_path):
    model = quantized(mixtral(), "w4")
    store.save(model, tmp_path / "a", chain=[], probe=IDS)
    data = sum(tensor.nbytes for tensor in load_file(tmp_path / "a" / "model.safetensors").values())
    shapes_more = 16 * 2 * 5  # two integers for each expert of two blocks
    assert data == sum(tensor.nbytes for tensor in store.plain_tensors(model)[0].values()) + shapes_more


def test_parts_of_an_expert_may_lie_in_different_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_BYTES", 500)
    model = quantized(mixtral(), "w4")
    store.save(model, tmp_path / "a", chain=[], probe=IDS)
    places = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())["weight_map"]
    first = "model.layers.0.block_sparse_moe.experts.0"
    assert places[f"{first}.w1.weight_packed"] != places[f"{first}.w3.weight_packed"]
    assert torch.equal(store.output_of(store.load(tmp_path / "a"), IDS), store.output_of(model, IDS))
    plain = store.output_of(AutoModelForCausalLM.from_pretrained(tmp_path / "a"), IDS)
    torch.testing.assert_close(plain, store.output_of(model, IDS))


@dataclass(frozen=True)
class Case:
    """What is not written in a public format."""

    build: object = mixtral
    scheme: str = "w4"
    ignore: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32


PRIVATE = {
    "integer activations": Case(scheme="int8"),
    "float activations of 8 bits": Case(scheme="fp8 activations"),
    "zero points": Case(scheme="zero points"),
    "NF4": Case(scheme="nf4"),
    "a layer in float": Case(ignore=("*.experts.3.down_proj",)),
    "a mixture in float": Case(ignore=("model.layers.0.mlp.experts",)),
    "gate and up in turn": Case(gpt_oss),
    "Llama 4": Case(llama4),
    "a dtype that torch has no product for": Case(dtype=torch.float64),
}


@pytest.mark.parametrize("case", PRIVATE.values(), ids=PRIVATE)
def test_what_transformers_would_not_open_is_of_no_public_format_and_refused(tmp_path, case):
    model = quantized(case.build().to(case.dtype), case.scheme, case.ignore)
    manifest = store.save(model, tmp_path / "a", chain=[], probe=IDS)
    assert (manifest["format"], manifest["opens_with"], manifest["names"]) == ("leanfit", ["pipeline.load"], {})
    assert torch.equal(store.output_of(store.load(tmp_path / "a"), IDS), store.output_of(model, IDS))
    with pytest.raises(ValueError, match="leanfit"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a")


def test_layers_of_several_kinds_are_of_no_public_format_beside_experts(tmp_path):
    model = split_experts(mixtral())
    for name in select(model, describe(model)).layers:
        bits = 8 if "self_attn" in name else 4
        quantize_layers(model, [name], "weight_only", bits=bits, group_size=8)
    assert store.save(model, tmp_path / "a", chain=[], probe=IDS)["format"] == "leanfit"


def test_experts_with_biases_are_of_no_public_format():
    model = split_experts(mixtral())
    for name in linear_experts(model):
        for layer in model.get_submodule(name).modules():
            if isinstance(layer, nn.Linear):
                layer.bias = nn.Parameter(torch.ones(layer.out_features))
    assert formats.format_of(quantized(model, "w4"), {}) == ("leanfit", {})


def test_pruned_experts_are_of_no_public_format(tmp_path):
    model = split_experts(mixtral())
    layers = select(model, describe(model)).layers
    quantize_layers(prune_magnitude(model, layers, 0.75), layers, "weight_only", bits=4, group_size=8)
    assert store.save(model, tmp_path / "a", chain=[], probe=IDS)["format"] == "leanfit"


@pytest.mark.parametrize(("installed", "form"), [("5.21.0", "leanfit"), ("5.22.0", "pack-quantized")])
def test_a_transformers_that_does_not_open_all_of_them_writes_none(tmp_path, monkeypatch, installed, form):
    monkeypatch.setattr(public_names, "version", {"transformers": installed}.__getitem__)
    assert store.save(quantized(mixtral(), "w4"), tmp_path / "a", chain=[], probe=IDS)["format"] == form


@pytest.mark.parametrize("scheme", ["w4", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_receipt_compares_a_mixture_with_plain_transformers(tmp_path, scheme, dtype):
    """In float32, however narrow the scales are."""
    store.save(quantized(mixtral().to(dtype), scheme), tmp_path / "a", chain=[], probe=IDS)
    found = receipt.examine(tmp_path / "a")
    assert (found.ok, found.max_abs_diff) == (True, 0)
    assert found.transformers_max_rel_diff < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_receipt_of_a_mixture_in_files_does_not_hold_its_float_weights(tmp_path, dtype):
    model = mixtral(hidden_size=64, intermediate_size=256, num_hidden_layers=6, num_local_experts=8)
    stack = model.model.layers[0].mlp.experts.gate_up_proj.nbytes
    store.save(quantized(model.to(dtype), "w4"), tmp_path / "a", chain=[], probe=IDS)
    with measure_peak("cpu") as peak:
        found = receipt.examine(tmp_path / "a", tmp_path)
    assert found.transformers_max_rel_diff < 1e-6
    mapped = store.tensor_bytes(tmp_path / "a")
    assert peak.bytes < mapped + 3 * stack, (peak.bytes, mapped, stack)  # of 9: one and what it is put together from
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_receipt_finds_experts_that_plain_transformers_reads_otherwise(tmp_path):
    """As where a file has one expert's layers in the place of another's."""
    store.save(quantized(mixtral(), "w4"), tmp_path / "a", chain=[], probe=IDS)
    manifest = store.read_manifest(tmp_path / "a")
    names = manifest["names"]
    one, other = (f"model.layers.0.mlp.experts.{expert}.down_proj" for expert in (0, 1))
    names[one], names[other] = names[other], names[one]
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    swapped = swap(
        tensors, "model.layers.0.block_sparse_moe.experts.0.w2", "model.layers.0.block_sparse_moe.experts.1.w2"
    )
    save_again(tmp_path / "a", swapped, manifest)
    found = receipt.examine(tmp_path / "a")
    assert found.max_abs_diff == 0
    assert "plain transformers differs" in found.problems[0]


def swap(tensors, one, other):
    return {
        name.replace(one, other) if name.startswith(f"{one}.") else name.replace(other, one): tensor
        for name, tensor in tensors.items()
    }


def save_again(directory: Path, tensors, manifest):
    from safetensors.torch import save_file

    from pipeline.artifact import manifest as manifests

    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    manifests.write(directory, {**manifest, "files": manifests.describe_files(directory)})
