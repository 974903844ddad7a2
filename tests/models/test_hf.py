"""Pretrained directories: real ones made here with transformers, and those that must be refused in one line."""

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    MixtralConfig,
    MixtralForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from pipeline.data.base import DataSpec
from pipeline.errors import ConfigError, LeanfitError
from pipeline.layers import offload
from pipeline.layers.offload import place_of
from pipeline.memory.measure import measure_peak
from pipeline.models.gpt import GPT
from pipeline.models.hf import HuggingFace

SPEC = DataSpec(vocabulary=256, sequence_length=16)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a dense artifact is made of: weights, config and byte tokenizer."""
    path = tmp_path_factory.mktemp("pretrained")
    settings = GPT(name="gpt", layers=1, heads=2, width=16, dropout=0.0, activation="gelu", tie_embeddings=True)
    torch.manual_seed(0)
    settings.build(SPEC).save_pretrained(path)
    settings.tokenizer().save_pretrained(path)
    (path / "manifest.json").write_text("{}", encoding="utf-8")
    return path


def hf(path: Path | str) -> HuggingFace:
    return HuggingFace(name="hf", pretrained=str(path))


def copy(directory: Path, to: Path, **config: object) -> Path:
    for file in directory.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    changed = {**json.loads((to / "config.json").read_text(encoding="utf-8")), **config}
    (to / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    return to


def test_a_directory_gives_its_weights_and_its_tokenizer(directory: Path) -> None:
    assert hf(directory).problems() == []
    model = hf(directory).build(SPEC)
    saved = load_file(directory / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in saved.items())
    assert model.training
    assert hf(directory).tokenizer()("é\n")["input_ids"] == list("é\n".encode())


def test_half_precision_files_open_in_float32(directory: Path, tmp_path: Path) -> None:
    path = copy(directory, tmp_path, dtype="bfloat16")
    weights = {k: v.bfloat16() for k, v in load_file(directory / "model.safetensors").items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    model = hf(path).build(SPEC)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_on_meta_only_shapes_are_made(directory: Path, tmp_path: Path) -> None:
    path = copy(directory, tmp_path)
    (path / "model.safetensors").unlink()
    with torch.device("meta"):
        model = hf(path).build(SPEC)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_more_tokens_than_positions_is_refused(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.sequence_length=17 is more than the 16 positions of .*at most 16"):
        hf(directory).build(DataSpec(vocabulary=256, sequence_length=17))


def test_a_tokenizer_larger_than_the_embedding_is_refused(directory: Path) -> None:
    with pytest.raises(ConfigError, match="256 tokens, its tokenizer 300"):
        hf(directory).build(DataSpec(vocabulary=300, sequence_length=16))


def test_missing_weights_are_not_filled_with_random_numbers(directory: Path, tmp_path: Path) -> None:
    path = copy(directory, tmp_path)
    weights = load_file(path / "model.safetensors")
    del weights["model.decoder.layers.0.fc1.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 of the model's weights.*fc1\.weight"):
        hf(path).build(SPEC)


def test_truncated_weights_are_one_clear_line(directory: Path, tmp_path: Path) -> None:
    path = copy(directory, tmp_path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="cannot be opened") as caught:
        hf(path).build(SPEC)
    assert len(caught.value.problems) == 1
    assert "\n" not in str(caught.value)


def test_no_tokenizer_is_refused(directory: Path, tmp_path: Path) -> None:
    path = copy(directory, tmp_path)
    for file in path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match="no tokenizer that can be opened"):
        hf(path).tokenizer()


@pytest.mark.parametrize("said", ["/nowhere/at/all", "./nowhere", "../nowhere", "~/no/where", "a/b/c", "with space"])
def test_a_path_that_does_not_exist_is_named(said: str) -> None:
    assert hf(said).problems() == [
        f"model.pretrained={said} does not exist; give a directory with a config.json, or a hub id such as org/name"
    ]


@pytest.mark.parametrize("said", ["gpt2", "facebook/opt-125m"])
def test_a_hub_id_is_left_to_the_hub(said: str) -> None:
    assert hf(said).problems() == []


def test_directories_that_are_no_causal_language_model_are_refused(directory: Path, tmp_path: Path) -> None:
    assert "holds no config.json" in hf(tmp_path).problems()[0]
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert "cannot be read" in hf(tmp_path).problems()[0]
    assert "is a file" in hf(tmp_path / "config.json").problems()[0]
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=256)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    assert "holds a BertForMaskedLM, not a causal language model" in hf(tmp_path).problems()[0]
    with pytest.raises(ConfigError, match="BertForMaskedLM"):
        hf(tmp_path).build(SPEC)


def test_a_quantized_directory_is_refused(directory: Path, tmp_path: Path) -> None:
    path = copy(directory, tmp_path, quantization_config={"quant_method": "compressed-tensors"})
    assert "is quantized already" in hf(path).problems()[0]


def test_a_model_that_divides_its_weights_as_it_runs_is_refused_until_its_config_says_otherwise(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = RwkvConfig(vocab_size=256, hidden_size=16, num_hidden_layers=4, context_length=64, rescale_every=2)
    model, ids = RwkvForCausalLM(config), torch.arange(32)[None]
    model.save_pretrained(tmp_path)
    (told,) = hf(tmp_path).problems()
    assert "divides its weights in place as it runs (rescale_every=2)" in told
    with pytest.raises(ConfigError, match="rescale_every=2"):
        hf(tmp_path).build(SPEC)
    model.config.rescale_every = 0
    model.save_pretrained(tmp_path)
    assert hf(tmp_path).problems() == []
    found = hf(tmp_path).build(SPEC).eval()(ids).logits
    model.config.rescale_every = 2
    torch.testing.assert_close(found, model.eval()(ids).logits, rtol=0, atol=1e-3)


def test_an_artifact_that_transformers_cannot_open_is_told_as_such(directory: Path, tmp_path: Path) -> None:
    path = copy(directory, tmp_path, quantization_config={"format": "leanfit", "open_with": "pipeline.load(DIRECTORY)"})
    (told,) = hf(path).problems()
    assert "stored compactly" in told
    assert "job=compress artifact=DIR" in told
    assert "quantized already" not in told


def test_no_name_is_not_the_current_directory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory)
    assert HuggingFace(name="hf", pretrained="").problems()[0].startswith("model.pretrained is empty")


def test_checking_the_settings_imports_no_torch(directory: Path) -> None:
    code = (
        "import sys\n"
        "from pipeline.models.hf import HuggingFace\n"
        f"print(HuggingFace(name='hf', pretrained={str(directory)!r}).problems(), 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["[]", "False"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two untied blocks in bfloat16, in several shards."""
    path = tmp_path_factory.mktemp("shards")
    settings = GPT(name="gpt", layers=2, heads=2, width=16, dropout=0.0, activation="gelu", tie_embeddings=False)
    torch.manual_seed(0)
    model = settings.build(SPEC).bfloat16()
    model.generation_config.max_length = 77
    model.save_pretrained(path, max_shard_size="8KB")
    settings.tokenizer().save_pretrained(path)
    return path


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("where", ["directory", "shards"])
def test_weights_in_files_are_those_in_memory_in_any_precision(
    request: pytest.FixtureRequest, where: str, tmp_path: Path, dtype: torch.dtype
) -> None:
    path = request.getfixturevalue(where)
    built, filed = hf(path).build(SPEC).to(dtype), hf(path).build_offloaded(SPEC, dtype, tmp_path)
    assert type(filed) is type(built)
    assert filed.training
    assert {place_of(parameter) for parameter in filed.parameters()} == {tmp_path}
    assert {n: p.dtype for n, p in filed.named_parameters()} == {n: p.dtype for n, p in built.named_parameters()}
    assert all(torch.equal(p, filed.get_parameter(name)) for name, p in built.named_parameters())
    tied = built.lm_head.weight is built.get_input_embeddings().weight
    assert (filed.lm_head.weight is filed.get_input_embeddings().weight) == tied
    assert filed.generation_config.to_dict() == built.generation_config.to_dict()
    ids = torch.arange(16).view(1, 16)
    assert torch.equal(filed.eval()(ids).logits, built.eval()(ids).logits)
    assert list(tmp_path.iterdir()) == []


def test_experts_that_lie_apart_in_files_are_put_together_block_by_block(tmp_path: Path) -> None:
    """transformers stacks them, in memory: of a mixture that is nearly all of it."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=256, num_key_value_heads=2, num_local_experts=8, **sizes)
    built = MixtralForCausalLM(config)
    built.save_pretrained(tmp_path / "model")
    assert any(".experts.7." in name for name in load_file(tmp_path / "model" / "model.safetensors"))
    (tmp_path / "files").mkdir()
    with measure_peak("cpu") as peak, mock.patch.object(offload, "_written", wraps=offload._written) as written:
        filed = hf(tmp_path / "model").build_offloaded(SPEC, torch.float32, tmp_path / "files")
    whole = sum(parameter.nbytes for parameter in filed.parameters())
    assert {place_of(parameter) for parameter in filed.parameters()} == {tmp_path / "files"}
    assert all(torch.equal(weight, filed.get_parameter(name)) for name, weight in built.named_parameters())
    assert peak.bytes is not None
    assert peak.bytes < whole / 3
    assert sum(call.args[0].nbytes for call in written.mock_calls) == pytest.approx(whole, rel=0.01)  # on disk once


def test_writing_to_the_model_leaves_the_checkpoint_as_it_was(shards: Path, tmp_path: Path) -> None:
    before = contents(shards)
    assert len([name for name in before if name.endswith(".safetensors")]) > 2
    for model in (hf(shards).build_offloaded(SPEC, torch.bfloat16, tmp_path), hf(shards).build(SPEC)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert contents(shards) == before


def test_a_missing_shard_is_one_line_before_anything_is_opened(shards: Path, tmp_path: Path) -> None:
    path = copy(shards, tmp_path)
    file = sorted(path.glob("*.safetensors"))[1]
    file.unlink()
    assert hf(path).problems() == [
        f"model.pretrained={path} is incomplete: {file.name} is missing; copy or download it again"
    ]


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_shard_cut_short_is_one_line_before_anything_is_opened(shards: Path, tmp_path: Path, left: int) -> None:
    path = copy(shards, tmp_path)
    file = sorted(path.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:left])
    (told,) = hf(path).problems()
    assert file.name in told
    assert "truncated" in told or "no safetensors file" in told
    assert "\n" not in told
    with pytest.raises(ConfigError, match="cannot be opened") as caught:
        hf(path).build_offloaded(SPEC, torch.float32, tmp_path)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {"a": "../a.safetensors"}}', '{"weight_map": {"a": 3}}', "[" * 100_000]
)
def test_an_index_that_names_no_files_beside_it_is_refused(shards: Path, tmp_path: Path, text: str) -> None:
    path = copy(shards, tmp_path)
    (path / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    (told,) = hf(path).problems()
    assert told.startswith(f"model.pretrained={path} cannot be opened")
    assert "\n" not in told


def test_weights_that_a_shard_lacks_are_not_made_up(shards: Path, tmp_path: Path) -> None:
    path = copy(shards, tmp_path)
    file = sorted(path.glob("*.safetensors"))[0]
    weights = load_file(file)
    lost = sorted(weights)[0]
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"lacks 1 of the model's weights, such as {lost}"):
        hf(path).build_offloaded(SPEC, torch.float32, tmp_path)


def test_no_room_for_the_weights_is_said(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(LeanfitError, match="nowhere") as caught:
        hf(shards).build_offloaded(SPEC, torch.float32, tmp_path / "nowhere")
    assert not isinstance(caught.value, ConfigError)
