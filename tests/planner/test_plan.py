"""Predicted peaks beside those that a real fit and a real evaluation of the same config hold."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pipeline.memory
from pipeline.app import main
from pipeline.composing import compose
from pipeline.errors import ConfigError
from pipeline.fitting import fit, micro_batch_size
from pipeline.layers.quantized import quantized_layers
from pipeline.memory.measure import measure_peak
from pipeline.planner import plan as planner
from pipeline.planner import workspaces
from pipeline.planner.live import Live
from pipeline.planner.needs import Needs
from pipeline.planner.plan import capacity, plan
from pipeline.planner.workspaces import WITH_BIAS, WORKSPACES, workspace
from pipeline.stage_input import prepared
from pipeline.tasks import lookup
from pipeline.walk import stages_of

ROOT = Path(__file__).parents[2]
GPT = ["model=gpt_nano", "trainer=smoke", "trainer.max_steps=4", "trainer.evaluate_every=0", "device=cpu"]
LLAMA = [*GPT, "model=llama", "model.layers=2", "model.width=64", "model.heads=4", "model.key_value_heads=2"]
CONFIGS = {
    "gpt": GPT,
    "llama": LLAMA,
    "bf16-mixed": [*GPT, "precision=bf16-mixed"],
    "16-mixed": [*GPT, "precision=16-mixed"],
    "bf16-true": [*LLAMA, "precision=bf16-true"],
    "64-true": [*GPT, "precision=64-true"],
    "full checkpointing": [*GPT, "memory.activation_checkpointing=full"],
    "selective checkpointing": [*LLAMA, "memory.activation_checkpointing=selective"],
    "lean": [*GPT, "memory=lean", "memory.loss_chunks=4", "trainer.micro_batch_size=2"],
    "step in backward": [*GPT, "memory.step_in_backward=true", "trainer.grad_clip=null"],
    "foreach": [*GPT, "optimizer.implementation=foreach"],
    "a single step": [*GPT, "trainer.max_steps=1"],
    "sgd": [*GPT, "optimizer=sgd"],
    "adafactor": [*LLAMA, "optimizer=adafactor"],
    "muon": [*GPT, "optimizer=muon"],
    "adamw8bit": [*GPT, "optimizer=adamw8bit"],
    "lora": [*LLAMA, "adapter=lora"],
    "dora": [*GPT, "adapter=dora"],
    "lora beside nf4": [*LLAMA, "adapter=lora", "compression=nf4"],
    "dora beside nf4, bf16-true": [*LLAMA, "adapter=dora", "compression=nf4", "precision=bf16-true"],
}


CNNS = {
    "efficientnet": ["model=efficientnet", "data=digits", *GPT[1:]],
    "efficientnet, bf16-mixed": ["model=efficientnet", "data=digits", *GPT[1:], "precision=bf16-mixed"],
}


def test_a_plan_from_python_takes_a_config_alone():
    config = compose([*GPT, "compression=int8"])
    alone, given = pipeline.memory.plan(config), plan(config, opened(config)[1])
    assert alone.phases.keys() == {"load", "train", "compress", "save", "evaluate"}
    assert {name: phase.bytes for name, phase in alone.phases.items()} == {
        name: phase.bytes for name, phase in given.phases.items()
    }


def test_a_plan_from_python_is_of_what_can_run():
    with pytest.raises(ConfigError, match="a plan is of job=run or job=compress"):
        pipeline.memory.plan(compose([*GPT, "job=fit", "budget=1GB"]))
    with pytest.raises(ConfigError, match=r"group_size=77"):
        pipeline.memory.plan(compose([*GPT, "compression=int4", "compression.int4.group_size=77"]))


def opened(config):
    tokenizer = config.model.tokenizer()
    return tokenizer, config.data.open(tokenizer)


def predicted_and_measured(words, directory):
    """(config, planned training, measured peak, the trained model)."""
    config = compose(words)
    tokenizer, data = opened(config)
    predicted = plan(config, data).phases["train"]
    line = stages_of(config)
    model, context = prepared(config, directory, data, tokenizer, line, line[0])
    task = lookup.get(config.data.task)
    return config, predicted, fit(config, line[0], model, task, data, context.architecture, directory).peak_bytes, model


@pytest.mark.parametrize("name", CNNS)
def test_training_of_convolutions_is_predicted_within_five_percent(name, tmp_path):
    _, predicted, measured, _ = predicted_and_measured(CNNS[name], tmp_path)
    assert predicted.bytes == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_of_transformers_is_predicted_within_one_percent(name, tmp_path):
    config, predicted, measured, model = predicted_and_measured(CONFIGS[name], tmp_path)
    assert predicted.bytes == pytest.approx(measured, rel=0.01)
    assert sum(predicted.kinds.values()) == predicted.bytes
    stored = [buffer.nbytes for layer in quantized_layers(model).values() for buffer in layer.buffers()]
    assert predicted.kinds["weights"] == sum(weight.nbytes for weight in model.parameters()) + sum(stored)
    if config.adapter.trains:
        trained = [weight.nbytes for weight in model.parameters() if weight.requires_grad]
        assert predicted.kinds["optimizer state"] == sum(2 * size + 4 for size in trained)  # Adam's moments, its count


@pytest.mark.parametrize("micro", ["null", "40"])
def test_a_batch_of_more_samples_than_there_are_is_planned_as_it_is_trained(micro, tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(256)) * 4)  # 25 windows to train on, which a batch repeats
    data = ["data=text", f"data.path={tmp_path}/text", "data.split=position", "data.sequence_length=32"]
    size = ["trainer.batch_size=80", f"trainer.micro_batch_size={micro}", "data.evaluation_fraction=0.2"]
    _, predicted, measured, _ = predicted_and_measured([*GPT, *data, *size], tmp_path)
    assert predicted.bytes == pytest.approx(measured, rel=0.01)


def test_evaluation_is_predicted_within_one_percent():
    config = compose(GPT)
    _, data = opened(config)
    predicted = plan(config, data).phases["evaluate"]
    model = config.model.build(data.spec)
    with measure_peak("cpu", [*model.parameters(), *model.buffers()]) as peak:
        lookup.get("causal_lm").evaluate(model, data, config.trainer.evaluation_batch_size, "cpu")
    assert predicted.bytes == pytest.approx(peak.bytes, rel=0.01)


ONE_AT_A_TIME = ["trainer.batch_size=1", "trainer.evaluation_batch_size=1"]
"""Products of 16 bits are tried where the processor has kernels for them: of so large weights each takes a second."""


def test_a_model_of_eight_billion_parameters_is_planned_without_its_memory():
    sizes = ["layers=32", "width=4096", "heads=32", "key_value_heads=8", "intermediate=14336"]
    words = [*GPT, "model=llama", *(f"model.{size}" for size in sizes), "precision=bf16-true", *ONE_AT_A_TIME]
    config = compose(words)
    _, data = opened(config)
    plan(config, data)  # tries this CPU's kernels, once for a process, and measures them: one cannot measure that
    with measure_peak("cpu") as peak:
        predicted = plan(config, data).phases["train"]
        mark = torch.ones(1000)
    assert peak.bytes >= mark.nbytes  # or nothing was measured
    assert predicted.kinds["weights"] > 10e9
    assert predicted.kinds["optimizer state"] >= 2 * predicted.kinds["weights"]
    assert peak.bytes < 100e6


def test_the_job_writes_the_plan_and_trains_nothing(tmp_path, monkeypatch, capsys, drawing):
    monkeypatch.chdir(tmp_path)
    with drawing():
        assert main([*GPT, "job=plan", "hydra.run.dir=planned"]) == 0
    written = json.loads((tmp_path / "planned" / "plan.json").read_text())
    result = json.loads((tmp_path / "planned" / "result.json").read_text())
    assert written["phases"]["train"]["bytes"] == result["memory"]["predicted"]["train"]
    assert not (tmp_path / "planned" / "checkpoints").exists()
    told = capsys.readouterr().out
    assert "optimizer state" in told
    assert "traced" in told
    assert "fits: " in told
    assert "plots/memory_train.png" in (tmp_path / "planned" / "report.md").read_text()
    assert (tmp_path / "planned" / "plots" / "memory_train.png").stat().st_size > 10_000


def test_the_course_of_a_phase_reaches_its_peak_and_ends_with_what_is_kept():
    config = compose(GPT)
    peak = plan(config).phases["train"]
    totals = [sum(held) for held in zip(*peak.course.kinds.values(), strict=True)]
    assert max(totals) == peak.bytes
    assert len(totals) <= 200
    assert totals[-1] >= sum(peak.kinds[kind] for kind in ("weights", "optimizer state"))
    moments = ["step 1", "forward", "backward", "optimizer step", "step is done"]
    assert [name for _, name in peak.course.moments] == moments


@pytest.mark.parametrize("words", [GPT, CNNS["efficientnet"]], ids=["gpt", "efficientnet"])
def test_a_trace_tells_logits_and_the_weights_that_autocast_casts_apart_as_the_formula_does(words):
    config = compose([*words, "precision=bf16-mixed", "memory.activation_checkpointing=full"])
    _, data = opened(config)
    computed, traced = (
        {kind: max(held) for kind, held in plan(config, data, level=level).phases["train"].course.kinds.items()}
        for level in ("formula", "trace")
    )
    micro, _ = micro_batch_size(config)
    if "model=gpt_nano" in words:
        logits = micro * data.spec.sequence_length * data.spec.vocabulary
        assert 2 * logits <= traced["logits and loss"] <= 16 * logits  # bfloat16, then float32, and its softmax
    else:
        assert traced["logits and loss"] < traced["activations"] / 20  # the features before the head belong to those
    weights = sum(p.numel() for p in config.model.build(data.spec).parameters())
    assert 0 < traced["autocast's weights"] <= 2 * weights
    for kind in ("activations", "logits and loss", "autocast's weights"):
        assert traced[kind] == pytest.approx(computed[kind], rel=0.02, abs=64)


def test_a_run_says_what_was_planned_beside_what_was_measured(tmp_path, monkeypatch, drawing):
    monkeypatch.chdir(tmp_path)
    with drawing():
        assert main([*GPT, "device.memory=1MB", "plan.enforce=false", "hydra.run.dir=run"]) == 0
    memory = json.loads((tmp_path / "run" / "result.json").read_text())["memory"]
    for phase in ("load", "train", "save", "evaluate"):
        assert memory["error"][phase] == memory["predicted"][phase] / memory["measured"][phase] - 1
        assert abs(memory["error"][phase]) < 0.01
    report = (tmp_path / "run" / "report.md").read_text()
    assert "plots/memory_train.png" in report
    assert "| save | " in report


def test_a_run_that_will_not_fit_stops_before_it_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*GPT, "device.memory=1MB", "hydra.run.dir=run"]) == 2
    said = capsys.readouterr().err
    assert "does not fit by" in said
    assert "plan.enforce=false" in said
    assert not (tmp_path / "run" / "stages").exists()


def test_a_machine_that_is_not_here_is_planned_for():
    config = compose([*GPT, "job=plan", "device=cuda", "device.memory=80GiB"])
    assert plan(config).capacity == 80 * 2**30


def test_a_run_does_without_what_cannot_be_planned(tmp_path, monkeypatch):
    monkeypatch.setattr(planner.formula, "on_disk", lambda *_: 1 / 0)
    config = compose(GPT)
    found = plan(config)
    assert found.open == {"what goes to disk": "cannot be planned: ZeroDivisionError: division by zero"}
    assert set(found.phases) == {"load", "train", "save", "evaluate"}


def test_what_only_shapes_tell_ends_a_plan_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["job=plan", "model=efficientnet", "data=digits", "optimizer=muon", "device=cpu"]) == 2
    assert "optimizer=muon" in capsys.readouterr().err


def test_processes_on_one_machine_share_its_memory():
    config, several = compose(GPT), compose([*GPT, "parallelism=ddp", "parallelism.devices=2"])
    assert capacity(several) == capacity(config) // 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("parallelism=ddp", "parallelism=ddp"),
        ("memory.optimizer_offload=disk", "offload"),
        ("device=mps", "mps"),
    ],
)
def test_what_is_not_traced_is_computed_and_says_why(override, said):
    config = compose([*GPT, "job=plan", override])
    found = plan(config)
    assert said in found.untraced["train"]
    assert found.phases["train"].source == "computed"
    assert found.phases["train"].margin == 0.1


@pytest.mark.parametrize(
    ("words", "small", "large"),
    [
        (["precision=bf16-mixed"], 0.01, 0.08),
        (["precision=16-true", "optimizer.eps=1e-4"], 0.01, 0.08),
        (["model=efficientnet", "data=digits", "precision=bf16-mixed"], 0.05, 0.35),
        ([], 0.01, 0.01),
    ],
    ids=["bf16-mixed", "16-true", "convolutions", "32 bits"],
)
def test_16_bits_widen_the_margin_only_where_operators_may_be_too_large_to_be_tried(words, small, large, monkeypatch):
    config = compose([*GPT, "job=plan", "plan.calibrate=false", *words])
    data = opened(config)[1]
    assert plan(config, data).phases["train"].margin == small
    monkeypatch.setattr("pipeline.planner.scratch.LARGEST", 1000)
    assert plan(config, data).phases["train"].margin == large


@pytest.mark.parametrize(("link", "margin"), [("mixed_bits", 0.05), ("int4", 0.01)])
def test_bits_that_are_chosen_by_what_is_measured_widen_the_margin_of_what_is_left(link, margin):
    config = compose(
        [*GPT, "job=plan", "plan.calibrate=false", f"compression={link}", f"compression.{link}.group_size=16"]
    )
    found = plan(config, opened(config)[1])
    assert {phase: found.phases[phase].margin for phase in ("evaluate", "generate")} == {
        "evaluate": margin,
        "generate": margin,
    }
    assert found.phases["compress"].margin == 0.01


def test_a_plan_has_the_phases_of_the_run_in_their_order_and_what_goes_to_disk():
    config = compose([*GPT, "trainer.evaluate_every=2", "compression=[magnitude,int8]"])
    found = plan(config)
    phases = ["load", "train", "validate", "train: magnitude", "compress", "save", "evaluate"]
    assert list(found.phases) == phases
    assert found.open == {}
    assert set(found.disk) == {"checkpoint", "artifact"}
    by_formula = plan(config, level="formula")
    assert by_formula.open == {}
    assert by_formula.disk == found.disk
    assert {name: phase.source for name, phase in by_formula.phases.items()} == dict.fromkeys(phases, "computed")
    expected = {name: phase.bytes for name, phase in found.phases.items()}
    assert {name: phase.bytes for name, phase in by_formula.phases.items()} == pytest.approx(expected, rel=0.1)


def test_links_that_no_formula_is_known_for_are_traced_at_either_level():
    words = [*GPT, "compression=[structured,int8]", "compression.structured.ffn=0.5"]
    found, whole = (plan(compose([*words, f"plan.level={level}"])) for level in ("formula", "trace"))
    assert found.open == {}
    assert (found.phases["train"].source, found.phases["compress"].source) == ("computed", "traced")
    assert found.phases["compress"].bytes == whole.phases["compress"].bytes
    assert found.untraced == {"train": "plan.level=formula was asked for"}


def test_the_verdict_names_what_is_not_planned():
    found = plan(compose([*GPT, "device.memory=80GiB"]))
    assert "not planned" not in found.verdict()
    found.open["compress"] = "links are not planned for device=mps"
    assert found.verdict().endswith("; not planned: compress")


def test_where_nothing_trains_no_checkpoint_goes_to_disk():
    config = compose([*GPT, "trainer.max_steps=0", "compression=int8"])
    assert set(plan(config).disk) == {"artifact"}


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["precision=bf16-mixed"],
        ["memory.loss_chunks=4", "optimizer=sgd"],
        ["memory=lean", "adapter=lora", "trainer.evaluation_batch_size=5"],
        ["model=efficientnet", "data=digits", "trainer.batch_size=4"],
    ],
)
def test_validation_in_the_middle_of_a_fit_is_as_planned(tmp_path, words):
    config = compose([*GPT, "trainer.batch_size=1", "trainer.evaluate_every=3", "plan.calibrate=false", *words])
    tokenizer, data = opened(config)
    predicted = plan(config, data).phases["validate"]
    line = stages_of(config)
    model, context = prepared(config, tmp_path, data, tokenizer, line, line[0])
    fitted = fit(config, line[0], model, lookup.get(config.data.task), data, context.architecture, tmp_path)
    assert predicted.bytes == pytest.approx(fitted.validating["bytes"], rel=0.01)
    assert predicted.kinds.get("gradients", 0) == 0
    assert fitted.peak_bytes is not None


@pytest.mark.parametrize(("every", "planned"), [(0, False), (4, True), (5, False)])
def test_validation_is_planned_where_the_fit_gets_that_far(every, planned):
    config = compose([*GPT, f"trainer.evaluate_every={every}"])
    assert ("validate" in plan(config, level="formula").phases) == planned
    assert (Needs(config).validation(config, "computed") is not None) == planned


@pytest.mark.parametrize("every", [0, 2])
@pytest.mark.parametrize("ranks", ["ddp", "fsdp", "tp", "deepspeed"])
def test_validation_on_ranks_is_computed(ranks, every):
    found = plan(compose([*GPT, f"parallelism={ranks}", "parallelism.devices=2", f"trainer.evaluate_every={every}"]))
    assert ("validate" in found.phases) == bool(every)
    assert found.open == {}
    if every:
        validate = found.phases["validate"]
        assert validate.source == "computed"
        assert validate.kinds["optimizer state"] == found.phases["train"].kinds["optimizer state"]


def test_a_model_that_cannot_be_traced_is_computed_and_says_so(monkeypatch):
    def refuse(*_):
        raise RuntimeError("values are asked for\nhere")

    monkeypatch.setattr(planner, "trace_training", refuse)
    config = compose(GPT)
    found = plan(config)
    assert found.untraced["train"] == "cannot be traced: RuntimeError: values are asked for"
    assert found.phases["train"].source == "computed"


def test_nothing_is_left_behind_by_a_trace():
    config = compose(GPT)
    plan(config)
    assert type(torch.ones(2)) is torch.Tensor


MEASURED = ROOT / "benchmarks/results/planner-nvidia-h200-2026-11-28.json"
"""What runs held on a GPU, recorded there."""
RECORDED = {
    "gpt": "model.layers=6 model.width=384 model.heads=6 data.sequence_length=512 trainer.batch_size=16 precision=32",
    "gpt, float64": (
        "model.layers=6 model.width=384 model.heads=6 data.sequence_length=512 trainer.batch_size=16 precision=64-true"
    ),
    "llama, checkpointing": (
        "model=llama model.layers=8 model.width=512 data.sequence_length=256 precision=bf16-mixed "
        "memory.activation_checkpointing=full"
    ),
    "efficientnet": "memory=lean trainer.batch_size=64",
}


@pytest.mark.parametrize("name", RECORDED)
def test_a_plan_for_a_gpu_that_is_not_here_is_within_five_percent_of_what_one_measured(name):
    runs = json.loads(MEASURED.read_text(encoding="utf-8"))["runs"]
    (run,) = (run for run in runs if run["command"].endswith(RECORDED[name]))
    config = compose([*run["command"].split()[2:], "job=plan", "device=cuda", "device.memory=140GiB"])
    found = plan(config)
    assert found.untraced == {}
    for phase in ("train", "evaluate"):
        assert found.phases[phase].bytes == pytest.approx(run["measured"][phase], rel=0.05)
        assert found.phases[phase].most >= run["measured"][phase]


def test_a_thread_takes_one_workspace_for_all_its_products_and_a_little_for_those_with_a_bias():
    with FakeTensorMode():
        x, layer = torch.ones(4, 8, requires_grad=True), torch.nn.Linear(8, 8)
        with Live(workspace=1000) as live:
            loss = (layer(layer(x)) @ x.t()).sum()
            forward = [block.bytes for block, _, _ in live.timeline.events if block.kind == WORKSPACES]
            loss.backward()
    both = [block.bytes for block, _, _ in live.timeline.events if block.kind == WORKSPACES]
    assert sorted(forward) == [1000, *sorted(WITH_BIAS)]
    assert sorted(both) == [1000, 1000, *sorted(WITH_BIAS)]


@pytest.mark.parametrize(("said", "expected"), [(None, 32 * 2**20), (":4096:2:16:8", 8_519_680), (":16:8", 131_072)])
def test_a_workspace_is_as_large_as_cublas_is_told(said, expected, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if said:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", said)
    monkeypatch.setattr(workspaces, "capability", lambda: (9, 0))
    assert workspace(compose([*GPT, "job=plan", "device=cuda"])) == expected
    assert workspace(compose(GPT)) == 0


def test_older_gpus_have_smaller_workspaces(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(workspaces, "capability", lambda: (8, 6))
    assert workspace(compose([*GPT, "job=plan", "device=cuda"])) == 8_519_680


@pytest.mark.parametrize("level", ["trace", "formula"])
def test_what_threads_of_a_fit_take_for_products_stays_for_validation_and_checkpoints(level, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    config = compose([*GPT, "trainer.evaluate_every=2", "job=plan", "device=cuda", "device.memory=80GB"])
    phases = plan(config, level=level).phases
    both = {name: phases[name].kinds[WORKSPACES] for name in ("train", "validate", "save")}
    assert set(both.values()) == {2 * workspace(config) + sum(WITH_BIAS)}
    assert phases["validate"].bytes == sum(phases["validate"].kinds.values())
    assert phases["evaluate"].kinds[WORKSPACES] == workspace(config) + sum(WITH_BIAS)


def test_no_layer_is_dropped_by_chance_on_tensors_without_values():
    with FakeTensorMode(), Live():
        assert not torch.rand([]) < 0.5
        assert (torch.ones(3) < 0.5).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "words",
    [
        ["precision=bf16-mixed"],
        ["precision=bf16-true", "data.sequence_length=512"],
        ["parallelism=fsdp", "parallelism.devices=1", "parallelism.offload=true"],
        ["memory.activation_offload=host", "memory.optimizer_offload=host"],
        ["compression=int8"],
    ],
)
def test_a_run_on_a_gpu_trains_within_the_margin_of_its_plan(words, tmp_path):
    common = ["trainer=smoke", "device=cuda", "plan.calibrate=false", f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run([sys.executable, ROOT / "run.py", *common, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    planned = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))["phases"]["train"]
    assert abs(result["memory"]["error"]["train"]) < planned["margin"]
    assert result["memory"]["reserved"]["train"] >= result["memory"]["measured"]["train"]
