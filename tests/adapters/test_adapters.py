"""Adapters as a user chooses them: what is refused, what trains, what is left on disk."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import pipeline
from pipeline.adapters.dora import Dora
from pipeline.adapters.lora import Lora
from pipeline.adapters.none import NoAdapter
from pipeline.app import main
from pipeline.composing import compose
from pipeline.layers.lora import LoraLinear
from pipeline.layers.nf4 import NF4Linear
from pipeline.layers.quantized import quantized_layers
from pipeline.models.architecture import describe
from pipeline.report.result import read_result, schema_problems
from pipeline.stage_input import base_model

ROOT = Path(__file__).resolve().parents[2]
TINY = ["model=gpt_nano", "trainer=smoke", "data.evaluation_tokens=1024", "device=cpu"]
QLORA = ["adapter=lora", "compression=nf4"]


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lora(cls=Lora, **changes):
    values = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": None, "rslora": False}
    return cls(name=cls.__name__.lower(), **{**values, **changes})


def llama(tied=False):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )  # fmt: skip


def leanfit(*overrides: str, into: str = "run"):
    directory = Path.cwd() / into
    assert main([*TINY, *overrides, f"hydra.run.dir={directory}"]) == 0
    result = read_result(directory / "result.json")
    assert schema_problems(result) == []
    return directory, result


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "artifact" / "model.safetensors")


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("cls", [Lora, Dora])
def test_by_default_every_linear_layer_of_the_blocks_is_adapted(cls):
    model = llama()
    lora(cls).attach(model, describe(model), seed=0)
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLinear)]
    assert len(adapted) == 2 * 7
    assert all(".layers." in name for name in adapted)
    assert type(model.lm_head) is nn.Linear
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)


def test_targets_are_names_or_patterns():
    found = lora(targets=("q_proj", "*.1.mlp.*")).layers(llama(), describe(llama()))
    assert sorted(name.removeprefix("model.layers.") for name in found) == [
        "0.self_attn.q_proj", "1.mlp.down_proj", "1.mlp.gate_proj", "1.mlp.up_proj", "1.self_attn.q_proj",
    ]  # fmt: skip


def test_alpha_is_over_the_rank_or_its_root():
    assert lora(rank=16, alpha=32.0).scaling == 2
    assert lora(rank=16, alpha=32.0, rslora=True).scaling == 8


def test_a_merged_model_is_the_one_that_was_trained():
    for cls in (Lora, Dora):
        model, ids = llama().eval(), torch.randint(0, 64, (2, 8))
        adapter = lora(cls)
        adapter.attach(model, describe(model), seed=0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.02 * torch.randn_like(parameter)
        before = model(input_ids=ids).logits
        merged = adapter.merge(model)
        assert merged.state_dict().keys() == llama().state_dict().keys()
        torch.testing.assert_close(merged(input_ids=ids).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rank": 33}, r"adapter\.rank=33 is above the size of .*q_proj \(32\); choose at most 32"),
        ({"targets": ("q_prok",)}, r"adapter\.targets=q_prok: no linear layer .*did you mean 'q_proj'"),
        ({"targets": ("embed_tokens",)}, r"adapter\.targets=embed_tokens: no linear layer"),
        ({"targets": ("lm_head",)}, r"lm_head shares its weight with another layer"),
    ],
)
def test_what_does_not_fit_the_model_is_found_on_meta(changes, told):
    with torch.device("meta"):
        model = llama(tied=True)
    problems = lora(**changes).preflight(model, describe(model))
    assert len(problems) == 1
    assert re.search(told, problems[0])
    assert lora().preflight(model, describe(model)) == []


def test_a_model_without_linear_layers_is_a_problem():
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    assert "no linear layer to adapt" in lora().preflight(model, describe(model))[0]
    assert NoAdapter(name="none").preflight(model, describe(model)) == []


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["trainer.max_steps=0"], "trainer.max_steps=0 leaves nothing to train it"),
        (["adapter.rank=0"], "adapter.rank=0 must be at least 1"),
        (["adapter.alpha=0"], "adapter.alpha=0 must be greater than 0"),
        (["adapter.dropout=1.0"], "adapter.dropout=1.0 must be less than 1"),
        (["adapter.targets=[]"], "adapter.targets=[] adapts nothing"),
        (["adapter.targets=q_proj"], "adapter.targets=q_proj must be"),
        (["adapter.rnk=4"], "did you mean 'rank'"),
        (["adapter.rank=65"], "adapter.rank=65 is above the size of"),
        (["adapter.targets=[nothing]"], "no linear layer of the model is called so"),
    ],
)
def test_bad_settings_end_with_exit_code_2(overrides, told, capsys):
    assert main([*TINY, "adapter=lora", *overrides]) == 2
    assert told in capsys.readouterr().err


def test_an_artifact_that_is_compressed_takes_no_adapter(tmp_path, capsys):
    (tmp_path / "manifest.json").write_text("{}")
    assert main(["job=compress", f"artifact={tmp_path}", "adapter=lora", "compression=int8"]) == 2
    assert "adapter=lora trains with job=run" in capsys.readouterr().err


def test_choices_decode():
    assert compose(["adapter=dora", "adapter.rank=2"]).adapter == lora(Dora, rank=2, alpha=16.0)
    assert not compose([]).adapter.trains


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["lora", "dora"])
def test_a_run_trains_adapters_alone_and_leaves_a_plain_model(choice):
    base, _ = leanfit("trainer.max_steps=0", into="base")
    before = base / "artifact"
    source = ["model=hf", f"model.pretrained={before}", "trainer.max_steps=8"]
    directory, result = leanfit(*source, f"adapter={choice}")
    assert result["artifact"]["format"] == "dense"
    assert result["train"]["trainable_parameters"] == 8 * 2 * (4 * 2 * 64 + 2 * (64 + 256)) + (
        2 * (4 * 64 + 64 + 256) if choice == "dora" else 0
    )
    assert result["train"]["loss_last"] < result["train"]["loss_first"]
    old, new = weights(base), weights(directory)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert old.keys() == new.keys()
    assert changed == {name for name in old if name.endswith("weight") and ("_proj" in name or ".fc" in name)}
    AutoModelForCausalLM.from_pretrained(directory / "artifact")


@pytest.mark.slow
def test_what_follows_an_adapter_sees_a_plain_model():
    _, result = leanfit("adapter=dora", "compression=[magnitude,nf4]")
    assert [stage["detail"]["layers"] for stage in result["stages"]] == [12, 12]
    assert "adapters" not in result["stages"][1]["detail"]


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["lora", "dora"])
def test_qlora_trains_beside_nf4_and_stores_both(choice):
    directory, result = leanfit(
        f"adapter={choice}", "compression=nf4", "adapter.targets=[q_proj,v_proj]", "keep_stages=true"
    )
    detail = result["stages"][0]["detail"]
    assert (detail["layers"], detail["adapters"]["layers"]) == (12, 4)
    assert detail["adapters"]["parameters"] == result["train"]["trainable_parameters"]
    assert result["artifact"]["reload"] == {"ok": True, "max_abs_diff": 0.0}
    assert result["quality"]["after"] == pytest.approx(result["quality"]["before"], rel=1e-6)
    assert result["size"]["ratio"] > 2
    errors = result["memory"]["error"].items()
    planned = {phase: error for phase, error in errors if phase not in ("validate", "generate")}
    assert planned == pytest.approx(dict.fromkeys(planned, 0), abs=0.01)
    model = pipeline.load(directory / "artifact")
    kinds = [layer.scheme for layer in quantized_layers(model).values()]
    assert (kinds.count("nf4"), kinds.count("nf4_adapted")) == (8, 4)
    state = torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(value.is_floating_point() for value in state.values())
    assert not [name for name in state if "packed" in name or "scale" in name]
    dense = pipeline.load(directory / "stages" / "00-train")
    ids = torch.randint(0, 64, (2, 16))
    torch.testing.assert_close(dense(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    # The codes are those of the base model, untouched by what was trained.
    config = compose(TINY)
    base = base_model(config, config.data.open(config.model.tokenizer()))
    for name, layer in quantized_layers(model).items():
        fresh = NF4Linear.from_float(base.get_submodule(name), block_size=64, double_quant=True)
        assert torch.equal(fresh.weight_packed, layer.weight_packed)


@pytest.mark.slow
def test_qlora_goes_on_from_its_first_stage():
    whole, _ = leanfit(*QLORA, into="whole")
    directory = Path.cwd() / "run"
    assert main([*TINY, *QLORA, "gate.min_ratio=99", f"hydra.run.dir={directory}"]) == 3
    shutil.rmtree(directory / "stages" / "01-nf4")
    assert (directory / "stages" / "00-train-adapters" / "manifest.json").is_file()
    assert main([f"resume={directory}", "gate.min_ratio=1.5"]) == 0
    assert same(weights(whole), weights(directory))


@pytest.mark.slow
@pytest.mark.parametrize("extra", [["adapter=dora", "adapter.dropout=0.1"], [*QLORA, "precision=bf16-mixed"]])
def test_a_run_killed_in_the_middle_resumes_to_the_same_bits(extra, tmp_path):
    settings = [*extra, "trainer.max_steps=40", "trainer.checkpoint_every=3"]
    whole, _ = leanfit(*settings, into="whole")
    broken = tmp_path / "broken"
    command = [sys.executable, str(ROOT / "run.py"), *TINY, *settings, f"hydra.run.dir={broken}"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    )
    last = broken / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 300
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert last.exists()
    assert not (broken / "artifact").exists(), "the run was over before it could be killed"
    assert main([f"resume={broken}"]) == 0
    assert same(weights(whole), weights(broken))


@pytest.mark.slow
def test_a_checkpoint_of_adapters_is_compressed_with_the_settings_of_its_run(capsys):
    directory, _ = leanfit("adapter=lora")
    checkpoint = f"artifact={directory / 'checkpoints' / 'last.ckpt'}"
    arguments = [*TINY, "job=compress", checkpoint, "compression=int8", "hydra.run.dir=again"]
    assert main([*arguments, "adapter=none"]) == 2
    assert "of its run" in capsys.readouterr().err
    assert main(arguments) == 0
    dense = pipeline.load(directory / "artifact")
    again = pipeline.load("again/artifact")
    ids = torch.randint(0, 64, (2, 16))
    one, other = dense(input_ids=ids).logits, again(input_ids=ids).logits
    assert (one - other).norm() / one.norm() < 0.05


@pytest.mark.slow
def test_an_image_classifiers_head_is_adapted():
    arguments = ["model=efficientnet", "data=digits", "trainer=smoke", "device=cpu", "hydra.run.dir=run"]
    assert main([*arguments, "adapter=lora", "adapter.rank=4", "adapter.targets=[classifier]"]) == 0
    result = read_result("run/result.json")
    assert 0 < result["train"]["trainable_parameters"] < 10_000


@pytest.mark.slow
def test_two_processes_train_adapters_as_one_does():
    pinned = ["trainer.micro_batch_size=4", "precision=64-true", "optimizer.schedule=constant", *QLORA]
    _, one = leanfit(*pinned, into="one")
    _, two = leanfit(*pinned, "parallelism=ddp", into="two")
    assert two["quality"]["after"] == pytest.approx(one["quality"]["after"], rel=1e-9)
