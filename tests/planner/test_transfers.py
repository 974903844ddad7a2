"""What is held while a model is opened, and an artifact or a checkpoint is written: predicted, and as real ones do."""

import gc

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from pipeline.artifact import store
from pipeline.chain import Fit, Stage
from pipeline.composing import compose
from pipeline.compression.magnitude import prune_magnitude
from pipeline.fitting import fit
from pipeline.layers.schemes import quantize_layers
from pipeline.layers.select import select
from pipeline.memory.measure import measure_peak
from pipeline.models.architecture import describe
from pipeline.planner.fakes import faked, tracing
from pipeline.planner.plan import plan
from pipeline.planner.transfers import reading, trace_opening, traced_saving
from pipeline.stage_input import base_model, shapes
from pipeline.tasks import lookup

GPT = ["model=gpt_nano", "trainer=smoke", "trainer.max_steps=3", "device=cpu", "data.evaluation_tokens=2048"]
LLAMA = [
    *GPT, "model=llama", "model.layers=2", "model.width=64", "model.heads=4", "model.tie_embeddings=true",
    "precision=64-true",
]  # fmt: skip
IMAGES = ["model=efficientnet", "data=digits", *GPT[1:-1], "precision=bf16-true"]


def opened(words):
    config = compose(words)
    return config, config.data.open(config.model.tokenizer())


@pytest.mark.parametrize("words", [GPT, LLAMA, IMAGES, [*GPT, "model.tie_embeddings=false", "precision=bf16-true"]])
def test_a_fresh_model_is_built_in_what_was_predicted(words):
    config, data = opened(words)
    with measure_peak("cpu") as peak:
        base_model(config, data)
    assert trace_opening(config, data).bytes == pytest.approx(peak.bytes, rel=0.01)


def test_a_pretrained_model_an_artifact_and_a_checkpoint_are_opened_in_what_was_predicted(tmp_path):
    config, data = opened(GPT)
    model = base_model(config, data)
    model.save_pretrained(tmp_path / "hf")
    config.model.tokenizer().save_pretrained(tmp_path / "hf")
    store.save(model, tmp_path / "artifact", chain=[], probe=lookup.get("causal_lm").probe(data))
    stage = Stage(0, "train", "train", fit=Fit(2, 1e-3))
    fit(config, stage, model, lookup.get("causal_lm"), data, describe(model), tmp_path)
    cases = {
        "pretrained": ["model=hf", f"model.pretrained={tmp_path / 'hf'}"],
        "artifact": ["job=compress", f"artifact={tmp_path / 'artifact'}", "compression=int8_qat"],
        "checkpoint": ["job=compress", f"artifact={tmp_path / 'checkpoints/last.ckpt'}", "compression=int8"],
    }
    for name, words in cases.items():
        config, data = opened([*GPT, *words])
        gc.collect()
        with measure_peak("cpu") as peak:
            base_model(config, data)
        assert trace_opening(config, data).bytes == pytest.approx(peak.bytes, rel=0.05), name


@pytest.mark.parametrize("precision", ["32", "bf16-true"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "gpt2", "experts"])
def test_files_stay_mapped_while_a_pretrained_model_is_opened_beside_them(tmp_path, kind, precision):
    """As long as one tensor is a part of them, or transformers is at it; copies come beside them."""
    config, data = opened(GPT)
    vocabulary = data.spec.vocabulary
    sizes = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": None}
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, **sizes))
    elif kind == "experts":
        sizes |= {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_local_experts": 8}
        model = MixtralForCausalLM(MixtralConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))
    else:
        model = base_model(config, data)
    model.to(torch.bfloat16 if kind == "bfloat16" else torch.float32).save_pretrained(tmp_path)
    config.model.tokenizer().save_pretrained(tmp_path)
    config, data = opened([*GPT, "model=hf", f"model.pretrained={tmp_path}", f"precision={precision}"])
    gc.collect()
    with measure_peak("cpu") as peak:
        base_model(config, data)
    assert trace_opening(config, data).bytes == pytest.approx(peak.bytes, rel=0.02)


def compressed(model, how):
    layers = select(model, describe(model)).layers
    if how.startswith("pruned"):
        model = prune_magnitude(model, layers, 0.75)
    return quantize_layers(model, layers, "weight_only", bits=4, group_size=32) if how.endswith("int4") else model


@pytest.mark.parametrize("how", ["float", "pruned", "int4", "pruned, int4"])
@pytest.mark.parametrize("words", [GPT, LLAMA])
def test_an_artifact_is_written_and_read_back_in_what_was_predicted(tmp_path, how, words):
    config, data = opened(
        [*words, *(["compression=magnitude", "compression.magnitude.sparsity=0.75"] * how.startswith("pruned"))]
    )
    task = lookup.get("causal_lm")
    model = compressed(base_model(config, data), how).eval()
    with measure_peak("cpu", [*model.parameters(), *model.buffers()]) as writing:
        store.save(model, tmp_path / "a", chain=[], probe=task.probe(data))
    with measure_peak("cpu") as opening:
        store.load(tmp_path / "a")
    twin = compressed(base_model(config, data), how).eval().to("meta")
    twin.tie_weights()
    with tracing(config):
        faked(twin)
        saved, read = traced_saving(config, twin, task, data), reading(config, twin)
    assert saved.bytes == pytest.approx(writing.bytes, rel=0.02)
    assert read.bytes == pytest.approx(opening.bytes, rel=0.02)


@pytest.mark.parametrize(
    "words",
    [
        ["memory.release_gradients=false"], ["memory.release_gradients=true"], ["adapter=lora"],
        ["memory.optimizer_offload=disk"], ["memory.activation_offload=disk", "memory.release_gradients=false"],
    ],
)  # fmt: skip
def test_a_checkpoint_is_written_in_what_was_predicted(tmp_path, words):
    config, data = opened([*GPT, *words])
    model, stage = base_model(config, data), Stage(0, "train", "train", fit=Fit(3, 1e-3))
    model = config.adapter.attach(model, describe(model), 0) if config.adapter.trains else model
    found = fit(config, stage, model, lookup.get("causal_lm"), data, describe(model), tmp_path)
    kept = plan(config, data).phases["train"].kept
    assert sum(kept.values()) == pytest.approx(found.saving_bytes, rel=0.02)
    assert ("gradients" in kept) is ("memory.release_gradients=true" not in words)


def test_what_lies_in_files_takes_no_memory_to_open(tmp_path):
    config, data = opened(GPT)
    store.save(base_model(config, data), tmp_path / "a", chain=[], probe=lookup.get("causal_lm").probe(data))
    config, data = opened([*GPT, "job=compress", f"artifact={tmp_path / 'a'}", "compression=int8"])
    assert trace_opening(config, data) is None
    with measure_peak("cpu") as peak:
        base_model(config, data, tmp_path)
    largest = max(weight.numel() * 4 for weight in shapes(config, data).parameters())
    assert peak.bytes <= largest  # which is made before its values are there


def test_where_a_links_own_fit_is_not_planned_what_is_saved_is_not_either():
    config, data = opened(
        [*GPT, "memory.optimizer_offload=disk", "compression=distill", "compression.distill.sequence_weight=0.5"]
    )
    found = plan(config, data)
    assert "save" not in found.phases
    assert found.open["save"] == "what a fit keeps for its checkpoint is not known"
    assert "load" in found.phases


@pytest.mark.parametrize(("link", "pattern"), [("magnitude", "null"), ("sparsegpt", "2:4")])
def test_what_was_pruned_is_opened_as_is_traced_by_the_formula_too(link, pattern):
    config, data = opened([*GPT, f"compression=[{link}]", f"compression.{link}.pattern={pattern}"])
    computed, traced = (plan(config, data, level=level).phases["load"] for level in ("formula", "trace"))
    assert "masks" in computed.kinds
    assert computed.bytes == pytest.approx(traced.bytes, rel=0.01)


def test_a_run_that_goes_on_after_a_link_opens_what_that_has_left():
    config, data = opened([*GPT, "compression=[magnitude,int8_qat]", "compression.int8_qat.steps=1"])
    pruned = plan(*opened([*GPT, "compression=magnitude"]), level="formula").phases["load"]
    for level in ("formula", "trace"):
        fresh, resumed = (plan(config, data, level=level, done=done).phases["load"] for done in (0, 2))
        assert resumed.bytes == pytest.approx(pruned.bytes, rel=0.01)
        assert fresh.bytes < 0.9 * resumed.bytes
