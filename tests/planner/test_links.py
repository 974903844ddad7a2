"""Predicted peaks of links beside those that real ones hold, and that the evaluation of their artifact does."""

import gc
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.artifact import store
from pipeline.composing import compose
from pipeline.compression.magnitude import prune_magnitude
from pipeline.fitting import fit
from pipeline.layers import kernels
from pipeline.layers.nf4 import _pairs
from pipeline.memory.measure import measure_peak
from pipeline.models.architecture import describe
from pipeline.models.byte_tokenizer import byte_tokenizer
from pipeline.planner import formula
from pipeline.planner.links import declare_links, trace_links
from pipeline.planner.plan import plan
from pipeline.stage_input import base_model, context_of, stage_input, trains
from pipeline.tasks import lookup
from pipeline.walk import changing_stages, stages_of, teacher_tensors
from tests.layers.test_experts import minimax, qwen

GPT = ["model=gpt_nano", "trainer=smoke", "trainer.max_steps=16", "device=cpu", "data.evaluation_tokens=4096"]
CASES = {
    "hessians and masks, then packed integers": [*GPT, "compression=[sparsegpt,int4]"],
    "a smaller student beside its teacher": [*GPT, "compression=[distill,int8]"],
    "a student with masks": [*GPT, "compression=[magnitude,distill]"],
    "trained rounding": [*GPT, "compression=int4_qat"],
    "a smaller model by gradients": [*GPT, "compression=structured"],
    "masks that grow": [*GPT, "compression=wanda", "compression.wanda.schedule=cubic"],
    "llama": [
        *GPT, "model=llama", "model.layers=2", "model.width=64", "model.heads=4", "model.key_value_heads=2",
        "compression=int4_awq",
    ],
    "one layer, scales that its activation does not let through": [
        *GPT, "model.layers=1", "model.width=256", "compression=int4_awq"
    ],
    "samples of trials in several batches": [*GPT, "data.sequence_length=32", "compression=int4_awq"],
    "hidden states that are replaced one by one": [
        *GPT, "model=llama", "model.layers=2", "model.width=128", "model.heads=4", "compression=int8_static"
    ],
    "convolutions": ["model=efficientnet", "data=digits", *GPT[1:-1], "compression=int8_static"],
    "convolutions that learn": ["model=efficientnet", "data=digits", *GPT[1:-1], "compression=[magnitude,distill]"],
}  # fmt: skip


def opened(config):
    tokenizer = config.model.tokenizer()
    return tokenizer, config.data.open(tokenizer)


def measured(config, directory):
    """({link: peak of compressing}, {link: peak of its fit}, that of evaluating the artifact), as in a run."""
    tokenizer, data = opened(config)
    task, line = lookup.get(config.data.task), changing_stages(stages_of(config))
    model = stage_input(config, directory, data, line, line[0])

    def saved(model, place):
        store.save(model, place, chain=[], probe=task.probe(data))

    saved(model, directory / "stages" / line[0].directory)
    compressing, fits = {}, {}
    for stage in line[1:]:
        method = stage.method
        model = method.entering(model)
        context = context_of(config, stage, model, data, tokenizer, directory)
        with measure_peak("cpu", [*model.parameters(), *model.buffers()]) as preparing:
            model = method.prepare(model, context)
        context = replace(context, architecture=describe(model))
        if stage.fit is not None:
            fits[stage.name] = fit(
                config, stage, model, task, data, context.architecture, directory, callbacks=method.callbacks(context),
                loss=method.loss(context), beside=partial(teacher_tensors, context.teacher),
            ).peak_bytes  # fmt: skip
        gc.collect()
        with measure_peak("cpu", [*model.parameters(), *model.buffers()]) as finalizing:
            model = method.finalize(model, context)
        compressing[stage.name] = max(preparing.bytes, finalizing.bytes)
    saved(model.eval(), directory / "artifact")
    after = store.load(directory / "artifact", offload_to=None if trains(line) else directory)
    with (
        measure_peak("cpu", [*after.parameters(), *after.buffers()]) as evaluating,
        config.precision.evaluation_context("cpu"),
    ):
        task.evaluate(after, data, config.trainer.evaluation_batch_size, "cpu")
    return compressing, fits, evaluating.bytes


def assert_stored(predicted, directory):
    """Weights that are masked and quantized may take less: rounding makes more of them zero."""
    stored = store.tensor_bytes(directory / "artifact")
    assert stored <= predicted <= 1.05 * stored


def test_what_an_earlier_pruner_leaves_is_saved_with_all_that_it_has_kept(tmp_path):
    """A later one that prunes more has not begun then."""
    pruning = ["compression=[magnitude,wanda]", "compression.magnitude.sparsity=0.2", "compression.wanda.sparsity=0.8"]
    config = compose([*GPT, *pruning])
    tokenizer, data = opened(config)
    model = base_model(config, data)
    model = prune_magnitude(
        model, config.chain["magnitude"].layers(model, context_of(config, stages_of(config)[1], model)), 0.2
    )
    with measure_peak("cpu", [*model.parameters(), *model.buffers()]) as writing:
        store.save(model.eval(), tmp_path / "a", chain=[], probe=lookup.get("causal_lm").probe(data))
    for links in (trace_links, declare_links):
        assert links(config, data, tokenizer).save.bytes == pytest.approx(writing.bytes, rel=0.01)


def test_links_of_an_artifact_whose_weights_lie_in_files_are_predicted_within_two_percent(tmp_path):
    config = compose([*GPT, "precision=bf16-true"])
    tokenizer, data = opened(config)
    masked = prune_magnitude(
        config.precision.convert(config.model.build(data.spec)), ["model.decoder.layers.0.fc1"], 0.5
    )
    store.save(masked, tmp_path / "given", chain=[], probe=lookup.get("causal_lm").probe(data))
    config = compose([*GPT, "job=compress", f"artifact={tmp_path / 'given'}", "compression=int4_gptq"])
    predicted = trace_links(config, data, tokenizer)
    compressing, _, evaluating = measured(config, tmp_path)
    assert predicted.compress["int4_gptq"].bytes == pytest.approx(compressing["int4_gptq"], rel=0.02)
    assert "weights" not in predicted.compress["int4_gptq"].kinds
    assert predicted.evaluate.bytes == pytest.approx(evaluating, rel=0.02)
    assert_stored(predicted.stored, tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_links_and_what_they_leave_are_predicted_within_two_percent(name, tmp_path):
    config = compose(CASES[name])
    tokenizer, data = opened(config)
    predicted = trace_links(config, data, tokenizer)
    compressing, fits, evaluating = measured(config, tmp_path)
    assert predicted.open == {}
    assert {link: peak.bytes for link, peak in predicted.compress.items()} == pytest.approx(compressing, rel=0.02)
    assert {link: peak.bytes for link, peak in predicted.train.items()} == pytest.approx(fits, rel=0.02)
    assert predicted.evaluate.bytes == pytest.approx(evaluating, rel=0.02)
    assert_stored(predicted.stored, tmp_path)
    phases = predicted.phases()
    assert phases["compress"].bytes == max(peak.bytes for peak in predicted.compress.values())
    assert {*phases} == {"compress", "save", "evaluate", *(f"train: {link}" for link in fits)}


@pytest.mark.parametrize("build", [qwen, minimax])
@pytest.mark.parametrize("method", ["int4_awq", "int8_smoothquant"])
def test_what_moving_scales_in_a_mixture_holds_is_predicted_within_two_percent(build, method, tmp_path):
    """A norm before a router and experts takes them; one whose output is the residual too does not, and a plan, which
    tries nothing on values, has to know."""
    sizes = dict.fromkeys(
        ("hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 64
    )
    made = build(vocab_size=256, **sizes)
    for name, parameter in made.named_parameters():
        if "layernorm" in name:  # scales help where some channels matter more, and a plan supposes that they do
            parameter.data[::9] *= 8
    made.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    config = compose([
        "model=hf", f"model.pretrained={tmp_path}/model", "data.sequence_length=16", *GPT[1:], f"compression={method}",
        "data.evaluation_tokens=1024", "calibration.samples=32",
        *(["compression.int4_awq.group_size=16"] if method == "int4_awq" else []),
    ])  # fmt: skip
    tokenizer, data = opened(config)
    predicted = trace_links(config, data, tokenizer)
    compressing, _, _ = measured(config, tmp_path)
    assert predicted.compress[method].bytes == pytest.approx(compressing[method], rel=0.02)
    assert predicted.stored == store.tensor_bytes(tmp_path / "artifact")


@pytest.mark.parametrize(
    "settings",
    [
        ["compression=[wanda,int8]", "memory.optimizer_offload=disk"],
        ["compression=int8_qat", "memory.activation_offload=disk"],
        ["compression=structured", "memory.optimizer_offload=disk", "precision=bf16-mixed"],
        ["compression=distill", "memory.activation_offload=disk", "compression.distill.hidden_weight=1"],
        ["compression=[magnitude,distill]", "memory.optimizer_offload=disk", "compression.distill.attention_weight=1"],
    ],
)
def test_fits_of_links_that_are_not_traced_are_computed_within_two_percent(settings, tmp_path):
    config = compose([*GPT, *settings])
    tokenizer, data = opened(config)
    predicted = trace_links(config, data, tokenizer, untraced="offload is not traced")
    _, fits, _ = measured(config, tmp_path)
    assert {link: peak.bytes for link, peak in predicted.train.items()} == pytest.approx(fits, rel=0.02)
    assert predicted.untraced == {f"train: {link}": "offload is not traced" for link in fits}
    assert predicted.open == {}
    assert all(peak.kept for peak in predicted.train.values())


DECLARED = CASES | {
    "no values": [*GPT, "compression=nf4"],
    "beside adapters": [*GPT, "adapter=lora", "compression=nf4"],
    "a kernel's integers": [*GPT, "compression=int8_weight_only", "precision=bf16-true"],
    "float8": [*GPT, "compression=fp8"],
    "smoothed": [*GPT, "compression=int8_smoothquant"],
    "logits from disk": [*GPT, "compression=[wanda,distill]", "compression.distill.cache_logits=true"],
    "all that a student is shown at once": [
        *GPT,
        "compression=distill",
        "compression.distill.hidden_weight=1",
        "compression.distill.attention_weight=1",
    ],
}


@pytest.mark.parametrize("name", DECLARED)
def test_what_a_chain_leaves_is_the_same_by_formula_and_by_tracing(name):
    config = compose([*DECLARED[name], "job=plan"])
    tokenizer, data = opened(config)
    computed, traced = declare_links(config, data, tokenizer), trace_links(config, data, tokenizer)
    assert {*computed.open} <= {f"compress: {link}" for link in config.chain}
    assert computed.stored == traced.stored
    for phase in ("save", "evaluate", "generate"):
        found, expected = getattr(computed, phase), getattr(traced, phase)
        assert (found is None) == (expected is None)
        assert found is None or found.bytes == pytest.approx(expected.bytes, rel=0.01), phase
    assert {link: peak.bytes for link, peak in computed.train.items()} == pytest.approx(
        {link: peak.bytes for link, peak in traced.train.items()}, rel=0.02
    )


def test_what_values_decide_is_not_computed():
    config = compose([*GPT, "job=plan", "compression=mixed_bits"])
    found = declare_links(config, *reversed(opened(config)))
    assert found.open == dict.fromkeys(
        ("save", "evaluate", "generate"), "what mixed_bits leaves is known by its values alone"
    )
    assert {*found.phases()} == {"compress"}


def shaped_by_values(method, model, context):
    next(model.parameters()).nonzero()
    return model


def no_formula(*_):
    raise ValueError("none is known")


def test_a_loss_that_asks_no_teacher_is_computed_too(monkeypatch):
    config = compose([*GPT, "compression=wanda"])
    tokenizer, data = opened(config)
    (plain,) = declare_links(config, data, tokenizer).train.values()

    def loss(method, context):
        return lambda model, batch, task_loss: task_loss(batch) + model.lm_head.weight.exp().sum()

    monkeypatch.setattr(type(config.chain["wanda"]), "loss", loss)
    (own,) = declare_links(config, data, tokenizer).train.values()
    (traced,) = trace_links(config, data, tokenizer).train.values()
    assert own.bytes == pytest.approx(traced.bytes, rel=0.01)
    assert own.bytes > plain.bytes


def test_a_loss_that_runs_its_model_twice_is_not_computed():
    config = compose([*GPT, "compression=distill", "compression.distill.sequence_weight=1"])
    found = trace_links(config, *reversed(opened(config)), untraced="not today")
    assert found.train == {}
    said = "not today; cannot be computed: LeanfitError: the model runs more than once for a loss"
    assert found.open == {"train: distill": said}


def test_the_fit_of_a_link_that_cannot_be_prepared_without_values_is_open_and_computed_where_it_can_be(monkeypatch):
    config = compose([*GPT, "compression=[magnitude,distill]"])
    tokenizer, data = opened(config)
    monkeypatch.setattr(type(config.chain["distill"]), "prepare", shaped_by_values)
    found = trace_links(config, data, tokenizer)
    assert {*found.train} == {"magnitude", "distill"}
    assert found.untraced["train: distill"] == "a link before it, or it, cannot be traced"
    monkeypatch.setattr(formula, "training", no_formula)
    found = trace_links(config, data, tokenizer)
    assert found.open == {"train: distill": "compress: distill comes before it"}


def test_what_cannot_be_traced_is_open_with_all_that_comes_after(monkeypatch):
    config = compose([*GPT, "compression=[wanda,int8]"])
    tokenizer, data = opened(config)
    monkeypatch.setattr(type(config.chain["wanda"]), "finalize", shaped_by_values)
    found = trace_links(config, data, tokenizer, untraced="not today")
    assert found.untraced["train: wanda"] == "not today"
    assert "compress: wanda comes before" in found.untraced["evaluate"]
    assert found.computed == {"wanda", "int8"}
    assert {*found.phases()} == {"train: wanda", "compress", "save", "evaluate"}
    monkeypatch.setattr(type(config.chain["wanda"]), "memory", lambda *_: None)
    found = trace_links(config, data, tokenizer, untraced="not today")
    assert "nonzero" in found.open["compress: wanda"]
    assert {*found.phases()} == {"train: wanda", "save", "evaluate"}


def test_a_link_of_eight_billion_weights_is_planned_without_their_memory():
    sizes = ["layers=32", "width=4096", "heads=32", "key_value_heads=8", "intermediate=14336"]
    llama = [*GPT, "model=llama", *(f"model.{size}" for size in sizes), "precision=bf16-true", "trainer.max_steps=0"]
    # Products of 16 bits are tried where the processor has kernels for them: of so large matrices each takes a second.
    config = compose([*llama, "compression=int4", "trainer.evaluation_batch_size=1"])
    tokenizer, data = opened(config)
    trace_links(config, data, tokenizer)  # tries this CPU's kernels, once for a process: that measures, too
    with measure_peak("cpu") as peak:
        found = trace_links(config, data, tokenizer)
        mark = torch.ones(1000)
    assert peak.bytes >= mark.nbytes  # or nothing was measured
    assert found.compress["int4"].kinds["weights"] > 10e9
    assert found.evaluate.bytes < 0.5 * found.compress["int4"].bytes
    assert peak.bytes < 100e6


def test_what_is_found_once_for_a_process_is_not_found_by_a_plan():
    def forget():
        for constant in (kernels._cpu_kernel, kernels.works, kernels._signed_limits, _pairs):
            constant.cache_clear()

    forget()
    fitting = kernels.choose(torch.device("cpu"), torch.float32, 1)
    forget()
    for method in ("int8", "nf4"):
        config = compose([*GPT, f"compression={method}"])
        tokenizer, data = opened(config)
        assert trace_links(config, data, tokenizer).open == {}
    assert kernels.choose(torch.device("cpu"), torch.float32, 1) == fitting
    assert type(_pairs(torch.device("cpu"))) is torch.Tensor
    assert type(kernels._signed_limits(2)) is torch.Tensor


def test_a_link_beside_which_adapters_were_trained_holds_its_packed_model_and_no_more():
    config = compose([*GPT, "adapter=lora", "compression=nf4"])
    tokenizer, data = opened(config)
    traced, declared = (way(config, data, tokenizer).compress["nf4"] for way in (trace_links, declare_links))
    assert declared.bytes == pytest.approx(traced.bytes, rel=0.01)
    floats = sum(weight.nbytes for weight in base_model(config, data).parameters())
    assert traced.bytes < 0.5 * floats


LEFT = """
import sys
from unittest.mock import Mock
from pipeline.composing import compose
from pipeline.planner.plan import plan
for device in (["device=cpu"], ["device=cuda", "device.memory=80GiB"]):
    config = compose(["job=plan", "model=gpt_nano", "model.layers=1", *device, "compression=[magnitude,int8]"])
    found = plan(config, config.data.open(config.model.tokenizer()))
    assert found.phases["compress"].source == "traced", found.open
for name, module in sorted(sys.modules.items()):
    for key, value in vars(module).items() if name.startswith("pipeline.") else ():
        if isinstance(value, Mock) or "<locals>" in getattr(value, "__qualname__", "") and value.__module__ in PLACES:
            print(name, key)
"""


@pytest.mark.parametrize("level", ["trace", "formula"])
@pytest.mark.parametrize("chain", [[], ["compression=int8"]], ids=["dense", "int8"])
def test_weights_in_files_are_memory_where_a_gpu_or_a_generation_reads_them(chain, level, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    words = [
        "model=hf", f"model.pretrained={tmp_path}", "trainer.max_steps=0", "job=plan", "plan.calibrate=false",
        "data.sequence_length=32", "data.evaluation_tokens=1024", *chain,
    ]  # fmt: skip
    kinds = {}
    for device in (["device=cpu"], ["device=cuda", "device.memory=80GiB"]):
        config = compose([*words, *device])
        phases = plan(config, config.data.open(config.model.tokenizer()), level=level).phases
        kinds |= {(config.device.kind(), name): phases[name].kinds for name in ("evaluate", "generate")}
    assert kinds["cpu", "evaluate"].get("weights", 0) == 0
    read = {kinds[key]["weights"] for key in kinds if key != ("cpu", "evaluate")}
    assert len(read) == 1
    assert read.pop() > 0


def test_no_module_that_a_plan_imports_first_keeps_what_stood_in_for_a_function():
    # In a process that has imported nothing before: quantized layers of models in files stayed in memory for it.
    code = LEFT.replace("PLACES", "('pipeline.planner.unreal', 'pipeline.planner.gpu')")
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == ""
