"""Whole runs, as a user types them: what is left on disk, what is printed, how they end."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import pipeline
from pipeline.app import main
from pipeline.artifact.receipt import Receipt
from pipeline.composing import compose
from pipeline.data.base import DataSpec
from pipeline.errors import ConfigError
from pipeline.layers.masks import HoldMasks
from pipeline.models.gpt import GPT
from pipeline.proof import demand
from pipeline.report.result import new_result, read_result, schema_problems

ROOT = Path(__file__).resolve().parent.parent
TINY = ["model=gpt_nano", "trainer=smoke", "data.evaluation_tokens=2048", "device=cpu"]


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def leanfit(*overrides: str, into: str = "run") -> tuple[int, Path]:
    """Exit code and run directory of a command line, run in this process."""
    directory = Path.cwd() / into
    return main([*overrides, f"hydra.run.dir={directory}"]), directory


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "artifact" / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, drawing: Callable[[], AbstractContextManager[object]]) -> Path:
    """The run directory of a finished int8 run in 16-mixed."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    before = Path.cwd()
    os.chdir(directory.parent)
    try:
        with drawing():
            assert main([*TINY, "compression=int8", "precision=16-mixed", f"hydra.run.dir={directory}"]) == 0
    finally:
        os.chdir(before)
    return directory


def test_a_run_leaves_everything_the_interface_names(finished: Path) -> None:
    for name in (
        ".hydra/config.yaml", ".hydra/overrides.yaml", "recipe.lock.yaml", "result.json", "report.md", "metrics.csv",
        "plan.json",
        "checkpoints/last.ckpt", "plots/loss.png", "plots/before_after.png", "run.log",
        "artifact/model.safetensors", "artifact/config.json", "artifact/manifest.json", "artifact/tokenizer.json",
    ):  # fmt: skip
        assert (finished / name).is_file(), name
    assert not (finished / "stages").exists()


def test_the_result_keeps_the_schema_and_says_what_ran(finished: Path) -> None:
    result = read_result(finished / "result.json")
    assert schema_problems(result) == []
    assert result["status"] == "ok"
    assert result["precision"] == {"requested": "16-mixed", "used": "16-mixed"}
    assert result["parallelism"] == {"strategy": "single", "devices": 1, "nodes": 1}
    assert result["train"]["steps"] == 8
    assert result["artifact"]["reload"] == {"ok": True, "max_abs_diff": 0.0}
    assert [stage["name"] for stage in result["stages"]] == ["int8"]
    assert result["size"]["claim"] == "smaller"
    assert result["size"]["bytes_after"] == (finished / "artifact/model.safetensors").stat().st_size
    assert result["size"]["bytes_before"] > 2 * result["size"]["bytes_after"]
    assert abs(result["quality"]["after"] / result["quality"]["before"] - 1) < 0.01
    assert result["quality"]["n"] == 16 * 127
    assert result["memory"]["measured"]["train"] > 16 * result["size"]["parameters_before"]


def test_an_artifact_opens_in_python_and_with_transformers(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(finished / "artifact")("def f(x):", return_tensors="pt").input_ids
    with torch.no_grad():
        ours = pipeline.load(finished / "artifact")(input_ids=tokens).logits
        theirs = AutoModelForCausalLM.from_pretrained(finished / "artifact").eval()(input_ids=tokens).logits
    assert (ours - theirs).abs().max() <= 1e-3 * ours.abs().max()


def test_the_lock_file_repeats_the_run_bit_for_bit(finished: Path) -> None:
    code, again = leanfit(f"recipe={finished}/recipe.lock.yaml", into="again")
    assert code == 0
    assert same(weights(finished), weights(again))


def test_verify_passes_and_fails_with_three(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert leanfit("job=verify", f"artifact={finished}/artifact", into="good")[0] == 0
    altered = tmp_path / "altered"
    subprocess.run(["cp", "-r", finished / "artifact", altered], check=True)
    data = bytearray((altered / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (altered / "model.safetensors").write_bytes(data)
    assert leanfit("job=verify", f"artifact={altered}", into="bad")[0] == 3
    (altered / "model.safetensors").write_bytes(data[:-100])
    assert leanfit("job=evaluate", f"artifact={altered}", into="worse")[0] == 1
    assert "truncated" in capsys.readouterr().err


def test_evaluate_gives_the_quality_that_the_run_gave(finished: Path) -> None:
    code, directory = leanfit("job=evaluate", f"artifact={finished}/artifact")
    assert code == 0
    then, now = read_result(finished / "result.json"), read_result(directory / "result.json")
    assert schema_problems(now) == []
    assert now["quality"]["after"] == pytest.approx(then["quality"]["after"], rel=1e-5)
    assert now["quality"]["n"] == then["quality"]["n"]


def test_generate_prints_the_prompt_and_goes_on(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "def f(x, y=1):  # ${a}"
    code, _ = leanfit("job=generate", f"artifact={finished}/artifact", f"prompt={prompt}", "generate.max_new_tokens=5")
    assert code == 0
    assert capsys.readouterr().out.startswith(prompt)


def test_a_prompt_file_is_taken_byte_for_byte(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = finished.parent / "prompt.txt"
    file.write_bytes(b"a = 1\r\nb = 2\r\n")
    code, _ = leanfit(
        "job=generate", f"artifact={finished}/artifact", f"prompt_file={file}", "generate.max_new_tokens=1"
    )
    assert code == 0
    assert capsys.readouterr().out.startswith("a = 1\r\nb = 2\r\n")


def test_an_artifact_made_earlier_is_compressed_further(tmp_path: Path) -> None:
    _, dense = leanfit(*TINY, into="dense")
    code, directory = leanfit("job=compress", f"artifact={dense}/artifact", "compression=int4", "device=cpu")
    assert code == 0
    result = read_result(directory / "result.json")
    assert result["train"] is None or result["train"]["steps"] in (None, 0)
    assert result["size"]["bytes_after"] < result["size"]["bytes_before"]
    assert result["quality"]["before"] == pytest.approx(
        read_result(dense / "result.json")["quality"]["after"], rel=1e-5
    )
    # what is compressed already is refused before anything is written
    assert leanfit("job=compress", f"artifact={directory}/artifact", "compression=int8", into="twice")[0] == 2
    # a checkpoint serves as well
    checkpoint = dense / "checkpoints" / "last.ckpt"
    assert leanfit(*TINY, "job=compress", f"artifact={checkpoint}", "compression=int8", into="from_checkpoint")[0] == 0


@pytest.mark.parametrize("job", [["job=evaluate"], ["job=compress", "compression=magnitude"]])
@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("data.sequence_length=512", "data.sequence_length=512 is more than the 128 positions of artifact="),
        ("data=digits", "data=digits is for image classification, artifact="),
    ],
)
def test_data_that_an_artifact_cannot_take_is_refused(
    job: list[str], data: str, said: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert leanfit(*job, f"artifact={finished}/artifact", data, "device=cpu", into="refused")[0] == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


def test_a_checkpoint_is_compressed_with_the_settings_of_its_run(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = finished / "checkpoints" / "last.ckpt"
    few = ["data.evaluation_tokens=1024", "device=cpu", "compression=int4"]
    code, directory = leanfit("job=compress", f"artifact={last}", *few)
    assert code == 0
    taken = f"{finished / 'recipe.lock.yaml'}: model; data, with data.evaluation_tokens as given; adapter"
    assert f"artifact={last}: settings of its run are taken from {taken}" in capsys.readouterr().out
    lock = yaml.safe_load((directory / "recipe.lock.yaml").read_text(encoding="utf-8"))
    assert (lock["model"]["width"], lock["data"]["evaluation_tokens"]) == (64, 1024)
    (tmp_path / "moved.ckpt").write_bytes(last.read_bytes())
    for given, said in (
        ([f"artifact={last}", "model.layers=3"], "16 tensors missing (model.decoder.layers.2.self_attn.k_proj.weight)"),
        ([f"artifact={last}", "model.layers=3"], "to have those of its run"),
        ([f"artifact={tmp_path}/moved.ckpt"], "data.sequence_length of the run that wrote it"),
    ):
        assert leanfit("job=compress", *few, *given, into="refused")[0] == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
        assert len(line) < 500


def test_a_chain_prunes_then_quantizes_and_keeps_the_zeros() -> None:
    code, directory = leanfit(*TINY, "compression=[magnitude,int8]", "keep_stages=true")
    assert code == 0
    result = read_result(directory / "result.json")
    assert [stage["name"] for stage in result["stages"]] == ["magnitude", "int8"]
    assert result["stages"][0]["train"]["steps"] == 2  # a quarter of the run's
    assert result["stages"][1]["train"] is None
    assert result["stages"][0]["bytes_after"] > result["stages"][1]["bytes_after"]
    assert result["size"]["nonzero_after"] < 0.75 * result["size"]["parameters_after"]
    model = pipeline.load(directory / "artifact")
    layer = model.get_submodule("model.decoder.layers.0.fc1")
    assert (layer.weight == 0).float().mean() >= 0.5  # type: ignore[union-attr]
    assert sorted(path.name for path in (directory / "stages").iterdir()) == ["00-train", "01-magnitude", "02-int8"]


@pytest.mark.parametrize("precision", ["32", "64-true", "16-true", "bf16-true", "bf16-mixed"])
def test_every_precision_runs_and_says_so(precision: str) -> None:
    eps = ["optimizer.eps=1e-4"] if precision == "16-true" else []
    code, directory = leanfit(*TINY, f"precision={precision}", "compression=int8", *eps)
    result = read_result(directory / "result.json")
    assert code == 0, result["error"]
    assert result["precision"]["used"] == {"32": "32-true"}.get(precision, precision)
    assert result["train"]["loss_last"] < result["train"]["loss_first"]


def test_gates_end_with_three_and_leave_the_artifact() -> None:
    code, directory = leanfit(*TINY, "compression=int8", "gate.min_ratio=10")
    result = read_result(directory / "result.json")
    assert (code, result["status"]) == (3, "gate")
    assert "gate.min_ratio=10" in result["error"]["message"]
    assert (directory / "artifact" / "manifest.json").is_file()
    assert leanfit(*TINY, "compression=int8", "gate.max_quality_drop=0.5", into="kept")[0] == 0


@pytest.mark.parametrize("after", [0.0, 0.1])
def test_an_accuracy_that_did_not_fall_from_zero_keeps_every_gate(after: float) -> None:
    config = compose(["gate.max_quality_drop=0", "gate.max_quality_points=0"])
    result = new_result("run", [], {})
    result["quality"].update(metric="accuracy", direction="higher", before=0.0, after=after)
    demand(config, result, Receipt(ok=True, max_abs_diff=0.0, problems=[]))


def test_a_broken_gate_can_be_judged_again_without_training_again() -> None:
    code, directory = leanfit(*TINY, "compression=int8", "gate.min_ratio=10")
    trained = (directory / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    assert code == 3
    assert main([f"resume={directory}", "gate.min_ratio=2"]) == 0
    assert read_result(directory / "result.json")["status"] == "ok"
    assert (directory / "checkpoints" / "last.ckpt").stat().st_mtime_ns == trained


def test_a_run_cut_off_at_its_receipt_is_finished_by_resume() -> None:
    _, directory = leanfit(*TINY, "compression=int8", "keep_stages=true")
    whole = read_result(directory / "result.json")
    (directory / "result.json").unlink()
    before = weights(directory)
    assert main([f"resume={directory}"]) == 0
    told = read_result(directory / "result.json")
    assert told["artifact"]["reload"]["ok"] is True
    assert same(before, weights(directory))
    assert told["memory"]["measured"] == whole["memory"]["measured"]  # what came before was opened and saved, too


@pytest.mark.parametrize("cut", [1, 2])
def test_a_fit_that_was_over_when_its_run_was_cut_off_is_recorded_as_it_was(
    cut: int, capsys: pytest.CaptureFixture[str]
) -> None:
    fits = 0

    def cut_off(*_: Any) -> None:
        nonlocal fits
        fits += 1
        if fits == cut:
            raise RuntimeError("cut off")

    settings = [*TINY, "compression=magnitude", "compression.magnitude.steps=3", "trainer.max_steps=5"]
    settings += ["precision=16-mixed", "precision.initial_scale=1e30"]  # of which each step overflows
    _, whole = leanfit(*settings, into="whole")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pipeline.fitting.forget", cut_off)  # after the last step's checkpoint, before the snapshot
        code, broken = leanfit(*settings, into="broken")
    assert code == 1
    assert main([f"resume={broken}"]) == 0
    told, expected = (read_result(directory / "result.json") for directory in (broken, whole))
    kept = ("steps", "skipped_steps", "samples", "tokens", "loss_first", "loss_last")
    for found, wanted in zip((told, *told["stages"]), (expected, *expected["stages"]), strict=True):
        assert [found["train"][key] for key in kept] == [wanted["train"][key] for key in kept]
    assert told["train"]["steps"] == told["train"]["skipped_steps"] == 5
    assert told["memory"]["measured"]["train"] == expected["memory"]["measured"]["train"]
    memory = told["stages"][0]["memory"]
    assert memory == expected["stages"][0]["memory"]
    assert memory["train_predicted"] == pytest.approx(memory["train"], rel=0.02)
    assert told["memory"]["measured"]["save"] is None
    assert "peak memory of saving is not known" in capsys.readouterr().out
    assert main([f"resume={broken}"]) == 2
    assert "nothing to resume" in capsys.readouterr().err


def test_a_run_whose_steps_all_overflowed_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*TINY, "trainer.max_steps=3", "precision=16-mixed"]
    code, directory = leanfit(*settings, "precision.initial_scale=1e30", into="over")
    assert code == 0
    said = "3 of 3 steps changed nothing, since gradients overflowed"
    assert f"training: {said}" in capsys.readouterr().out
    assert f"- Training: {said}" in (directory / "report.md").read_text()
    assert read_result(directory / "result.json")["train"]["skipped_steps"] == 3
    _, directory = leanfit(*settings, into="under")
    assert read_result(directory / "result.json")["train"]["skipped_steps"] == 0
    assert "overflowed" not in (directory / "report.md").read_text()


@pytest.mark.parametrize(("where", "ends"), [("train", 2), ("compress", 1)])
def test_a_config_error_after_something_ran_is_a_failed_run(
    where: str, ends: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged(*_: Any) -> Any:
        raise ConfigError(["compression.int8.teacher=x cannot be opened", "it is gone"])

    monkeypatch.setattr(f"pipeline.walk.{where}", damaged)
    code, directory = leanfit(*TINY, "compression=int8", "trainer.max_steps=2")
    assert code == ends
    assert "compression.int8.teacher=x cannot be opened" in capsys.readouterr().err
    assert (directory / "checkpoints" / "last.ckpt").is_file() == (ends == 1)
    assert (directory / "result.json").is_file() == (ends == 1)
    if ends == 1:
        result = read_result(directory / "result.json")
        assert schema_problems(result) == []
        assert result["status"] == "failed"
        assert result["error"]["message"] == "compression.int8.teacher=x cannot be opened; it is gone"
        assert result["train"]["steps"] == 2


def test_a_loss_that_is_no_number_ends_the_run_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, directory = leanfit(*TINY, "optimizer.lr=1e30", "trainer.grad_clip=null", "trainer.max_steps=50")
    told = capsys.readouterr().err
    assert code == 1
    assert "training diverged: the loss of stage 'train' is nan at step" in told
    assert read_result(directory / "result.json")["status"] == "failed"


def test_a_link_after_which_the_quality_is_no_number_is_named(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compression=int8_qat", "compression.int8_qat.lr=1e10", "compression.int8_qat.steps=1"]
    assert leanfit(*TINY, "job=compress", f"artifact={finished / 'checkpoints' / 'last.ckpt'}", *words)[0] == 1
    assert "perplexity after stage 'int8_qat' is nan" in capsys.readouterr().err


def test_a_weight_that_is_no_number_is_named(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=False)
    name = "model.model.decoder.layers.1.final_layer_norm.weight"  # no layer that a method works on
    checkpoint["state_dict"][name][3] = float("nan")
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    code, _ = leanfit(*TINY, "job=compress", f"artifact={tmp_path}/damaged.ckpt", "compression=int8")
    told = capsys.readouterr().err
    assert code == 1
    assert "perplexity is nan" in told
    assert f"{name.removeprefix('model.')} holds NaN or infinity" in told


@pytest.mark.parametrize("precision", ["32", "16-mixed"])
def test_a_weight_that_is_no_number_is_named_where_it_is_to_be_trained(
    precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = GPT(name="gpt", layers=2, heads=2, width=16, dropout=0.0, activation="gelu", tie_embeddings=True)
    model = settings.build(DataSpec(vocabulary=256, sequence_length=64))
    name = "model.decoder.layers.1.fc2.weight"
    with torch.no_grad():
        model.get_parameter(name)[3, 2] = float("nan")
    model.save_pretrained(tmp_path / "damaged")
    settings.tokenizer().save_pretrained(tmp_path / "damaged")
    words = ["model=hf", f"model.pretrained={tmp_path}/damaged", "data.sequence_length=64", f"precision={precision}"]
    code, directory = leanfit(*words, *TINY[1:], "trainer.micro_batch_size=4", "trainer.max_steps=2")
    told = capsys.readouterr().err
    assert code == 1
    assert f"the loss of stage 'train' is nan from the start: {name} holds NaN or infinity" in told
    assert "learning rate" not in told
    assert not (directory / "checkpoints" / "last.ckpt").exists()


def test_an_artifact_is_evaluated_on_its_own_data_unless_other_data_is_asked_for(
    finished: Path, tmp_path: Path
) -> None:
    short = leanfit("job=evaluate", f"artifact={finished}/artifact", "data.evaluation_tokens=1024", into="short")[1]
    assert read_result(short / "result.json")["quality"]["n"] == 8 * 127
    assert read_result(short / "result.json")["quality"]["before"] is None  # that was measured on more tokens
    text = tmp_path / "words.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 2000)
    other = ["data=text", f"data.path={text}", "data.split=position", "data.evaluation_tokens=1024"]
    code, directory = leanfit("job=evaluate", f"artifact={finished}/artifact", *other, into="other")
    assert code == 0
    assert read_result(directory / "result.json")["quality"]["before"] is None


def test_an_artifact_that_does_not_say_its_data_is_evaluated_on_data_that_is_chosen(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = shutil.copytree(finished / "artifact", tmp_path / "artifact")
    manifest = json.loads((artifact / "manifest.json").read_text())
    del manifest["data"], manifest["fingerprint"]  # as `store.save` leaves it
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    assert leanfit("job=evaluate", f"artifact={artifact}")[0] == 1
    assert "its manifest does not say what data it was made with; choose data=CHOICE" in capsys.readouterr().err
    assert leanfit("job=evaluate", f"artifact={artifact}", "data=pystdlib", "data.evaluation_tokens=1024")[0] == 0


def test_a_group_size_that_does_not_divide_is_found_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    code, directory = leanfit(*TINY, "compression=int4", "compression.int4.group_size=48")
    assert code == 2
    told = capsys.readouterr().err.strip()
    assert "compression.int4.group_size=48" in told
    assert told.endswith("(command line)")  # as every mistake says where it was made
    assert not (directory / "checkpoints").exists()


@pytest.mark.parametrize(
    ("chain", "settings", "told"),
    [
        (
            "[structured,int4]",
            ["structured.ffn=0.3", "structured.round_to=8"],
            "compression.int4.group_size=64 does not divide the inputs of model.decoder.layers.0.fc2 (184)",
        ),
        ("[structured,mixed_bits]", ["structured.hidden=0.5", "mixed_bits.group_size=64"], "group_size=64 does not"),
        ("[structured,magnitude]", ["structured.ffn=0.29", "structured.round_to=2", "magnitude.pattern=2:4",
                                    "magnitude.sparsity=null"], "magnitude.pattern=2:4: 4 does not divide"),
        ("[distill,int4]", ["int4.ignore=[layers.1.fc2,decoder.layers.1]"], "compression.int4.ignore="),
        ("[structured,distill]", ["structured.hidden=0.5", "distill.hidden_weight=1"], "width 32 cannot be compared"),
    ],
)  # fmt: skip
def test_a_link_is_checked_on_what_the_links_before_it_leave(
    chain: str, settings: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [f"compression.{setting}" for setting in settings]
    code, directory = leanfit(*TINY, f"compression={chain}", *changes, "trainer.max_steps=1000000")
    said = capsys.readouterr().err
    assert code == 2, said
    assert told in said
    assert not (directory / "checkpoints").exists()


def test_training_goes_on_for_longer_in_place() -> None:
    # a schedule that does not depend on how long the run is
    steady = [*TINY, "optimizer.schedule=constant", "optimizer.warmup_steps=0"]
    _, directory = leanfit(*steady)
    _, longer = leanfit(*steady, "trainer.max_steps=12", into="longer")
    assert main([f"resume={directory}", "trainer.max_steps=12"]) == 0
    assert same(weights(directory), weights(longer))
    lock = (directory / "recipe.lock.yaml").read_bytes()
    assert main([f"resume={directory}"]) == 2  # nothing left to do
    assert main([f"resume={directory}", "trainer.max_steps=4"]) == 2
    assert main([f"resume={directory}", "model.width=128"]) == 2
    assert (directory / "recipe.lock.yaml").read_bytes() == lock


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["model.dropout=0.1", "precision=16-mixed", "trainer.micro_batch_size=4"]])
def test_a_run_killed_in_the_middle_resumes_to_the_same_bits(extra: list[str], tmp_path: Path) -> None:
    settings = [*TINY, *extra, "compression=[magnitude,int8]", "trainer.max_steps=40", "trainer.checkpoint_every=3"]
    _, whole = leanfit(*settings, into="whole")
    broken = tmp_path / "broken"
    command = [sys.executable, str(ROOT / "run.py"), *settings, f"hydra.run.dir={broken}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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
    steps = [line.split(",")[:2] for line in (broken / "metrics.csv").read_text().splitlines()]
    assert len(steps) == len({tuple(step) for step in steps})


def test_the_time_of_a_link_counts_what_it_took_before_it_was_interrupted() -> None:
    def cut_off(self: HoldMasks, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == 3:
            raise RuntimeError("cut off")

    settings = [*TINY, "compression=magnitude", "compression.magnitude.steps=4", "trainer.max_steps=1"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(HoldMasks, "on_train_batch_end", cut_off)
        code, directory = leanfit(*settings, "trainer.checkpoint_every=2")
    assert code == 1
    place = directory / "checkpoints" / "01-magnitude" / "last.ckpt"
    checkpoint = torch.load(place, weights_only=False)
    (kept,) = (state for key, state in checkpoint["callbacks"].items() if key.startswith("SaveLast"))
    assert 0 < kept["seconds"] < 600
    kept["seconds"] = 5000.0
    checkpoint["callbacks"]["MetricsCsv[magnitude]"]["seconds"] = 4000.0
    torch.save(checkpoint, place)
    assert main([f"resume={directory}"]) == 0
    (stage,) = read_result(directory / "result.json")["stages"]
    assert 5000 < stage["seconds"] < 5600
    assert 4000 < stage["train"]["seconds"] < 4600


def test_a_run_in_the_directory_of_another_does_not_go_on_from_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, directory = leanfit(*TINY)
    assert code == 0
    lock = (directory / "recipe.lock.yaml").read_text()
    assert leanfit(*TINY, "trainer.seed=7", "device.memory=1MB")[0] == 2
    assert (directory / "recipe.lock.yaml").read_text() == lock  # what was refused changed nothing
    assert (directory / "checkpoints" / "last.ckpt").is_file()

    def fit(*_: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            sys.exit(1)  # as Lightning does

    with monkeypatch.context() as patched:  # cut off before its own first checkpoint
        patched.setattr("pipeline.walk.run_fit", fit)
        assert leanfit(*TINY, "trainer.seed=7")[0] == 130
    assert read_result(directory / "result.json")["error"]["type"] == "KeyboardInterrupt"
    capsys.readouterr()
    assert main([f"resume={directory}"]) == 2
    assert "nothing to resume" in capsys.readouterr().err


def test_of_two_runs_in_one_directory_the_later_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    later, records = [], []

    def record() -> dict[str, str]:
        return {file.name: file.read_text() for file in Path("run/.hydra").iterdir()}

    def train(*_: object) -> None:
        records.append(record())
        words = [*TINY, "trainer.seed=7", "hydra.run.dir=run"]
        script = f"import sys; from pipeline.app import main; sys.exit(main({words!r}))"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        later.append(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment))
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.walk.run_fit", train)
    assert leanfit(*TINY)[0] == 130
    assert later[0].returncode == 2
    assert "another run is at work in this directory" in later[0].stderr
    assert records == [record()], "what the later one was asked for stands in the earlier one's place"
    assert leanfit("job=plan", *TINY)[0] == 0  # now it has ended


@pytest.mark.parametrize("changed", ["of one length, say? " * 200, "of another length " * 300])
def test_resume_refuses_data_that_have_changed(
    changed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_text("of one length, say: " * 200)
    data = ["data=text", f"data.path={text}", "data.split=position", "data.sequence_length=32"]
    assert leanfit(*TINY, *data, "data.evaluation_tokens=64", "trainer.max_steps=2")[0] == 0
    text.write_text(changed)
    capsys.readouterr()
    assert main(["resume=run", "trainer.max_steps=4"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: data=text: what it reads has changed since the run that is resumed began")


def test_resume_refuses_what_holds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"resume={tmp_path}/nowhere"]) == 2
    assert "nothing to resume" in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_find_the_choices_of_a_further_folder(tmp_path: Path) -> None:
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text("# Mine\ndefaults: [gpt_nano, _self_]\n")
    assert leanfit("--config-dir=conf", *TINY, "model=mine", "parallelism=ddp", "parallelism.devices=2")[0] == 0
    assert main(["job=plan", *TINY, "model=mine", "hydra.run.dir=plan"]) == 2  # which is not handed on to another run


@pytest.mark.slow
def test_two_processes_train_as_one_does() -> None:
    pinned = ["trainer.micro_batch_size=4", "precision=64-true", "optimizer.schedule=constant"]
    _, one = leanfit(*TINY, *pinned, into="one")
    code, two = leanfit(*TINY, *pinned, "parallelism=ddp", "compression=int8", into="two")
    assert code == 0
    result = read_result(two / "result.json")
    assert result["parallelism"] == {"strategy": "ddp", "devices": 2, "nodes": 1}
    assert result["quality"]["before"] == pytest.approx(read_result(one / "result.json")["quality"]["before"], rel=1e-9)


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_run_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = leanfit(*TINY, "parallelism=ddp", "optimizer.lr=1e30", "trainer.grad_clip=null", "trainer.max_steps=50")
    told = capsys.readouterr().err
    assert code == 1
    assert re.search(r"rank \d: LeanfitError: training diverged", told)
    assert "Traceback" not in told


@pytest.mark.slow
def test_a_sweep_runs_every_job_and_ends_in_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    sweep = Path.cwd() / "sweep"
    code = main(["-m", *TINY, "compression=none,int4", "compression.int4.group_size=64,48", f"hydra.sweep.dir={sweep}"])
    rows = json.loads((sweep / "results.json").read_text())
    output = capsys.readouterr().out
    assert code == 1
    assert len(rows) == 4
    assert [row["status"] for row in rows].count("failed") == 1  # int4 with groups of 48
    assert [row["speed_ratio"] for row in rows[:2]] == [1, 1]  # what nothing has compressed is no faster than itself
    assert (sweep / "results.csv").is_file()
    assert (sweep / "pareto.png").stat().st_size > 5000
    assert max(map(len, output.splitlines())) <= 100


@pytest.mark.slow
def test_an_image_classifier_is_trained_and_compressed() -> None:
    code, directory = leanfit(
        "model=efficientnet", "data=digits", "compression=int8", "trainer.max_steps=80", "device=cpu"
    )
    result: dict[str, Any] = read_result(directory / "result.json")
    assert code == 0, result["error"]
    assert schema_problems(result) == []
    assert result["quality"]["metric"] == "accuracy"
    assert result["quality"]["after"] > 5 * result["quality"]["baseline"]
    assert result["speed"]["unit"] == "samples/s"
    assert main(["job=evaluate", f"artifact={directory}/artifact", f"hydra.run.dir={directory}2"]) == 0


@pytest.mark.slow
@pytest.mark.started
def test_what_is_printed_is_clean_in_a_pipe(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "run.py"), *TINY, "compression=int8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 110
    assert re.search(r"next +python run.py job=generate artifact=\S+ prompt='def '", done.stdout)
