"""report.md: what a reader finds in it, whole runs and broken ones."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.report.markdown import cell, code, headline, shortcomings, table, write_report
from pipeline.report.metrics_file import Row, format_rows
from pipeline.report.result import new_result


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "outputs" / "a run"
    for name in ("artifact", "checkpoints", ".hydra"):
        (directory / name).mkdir(parents=True)
    (directory / "recipe.lock.yaml").touch()
    (directory / ".hydra" / "config.yaml").touch()
    rows = [Row(step, "train", 5 - step / 50, 1e-3, 2e4, 10**8) for step in range(10, 101, 10)]
    (directory / "metrics.csv").write_text(format_rows(rows, header=True), encoding="utf-8")
    return directory


def sections(text: str) -> dict[str, str]:
    parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    return dict(zip(["", *parts[1::2]], parts[::2], strict=True))


def test_bits_that_were_chosen_by_layer_are_shown_by_layer(run_dir: Path, language: dict[str, Any]) -> None:
    language["stages"][0]["detail"] = {
        "bits": {"a.fc1": 2, "a.fc2": 8}, "sensitivity": {"a.fc1": {"2": 0.0012, "8": 1e-7}, "a.fc2": {"2": 0.5}}
    }  # fmt: skip
    found = sections(write_report(run_dir, language).read_text(encoding="utf-8"))["Bits by layer: int8"]
    assert "| layer | bits | nats at 2 bits | nats at 8 bits |" in found
    assert "| a.fc1 | 2 | 0.0012 |" in found
    assert "| a.fc2 | 8 | 0.50 |  |" in found


def test_a_reader_finds_everything(run_dir: Path, language: dict[str, Any]) -> None:
    found = sections(write_report(run_dir, language, "model:\n  name: gpt\n").read_text(encoding="utf-8"))
    assert list(found) == [
        "",
        "Before and after",
        "What did not improve",
        "Stages",
        "Peak memory",
        "The artifact",
        "Again",
        "Made with",
        "Config",
    ]
    assert "5.40 MB on disk (3.64x smaller), perplexity 8.934 (0.25% worse), 905 tokens/s (2.21x faster)." in found[""]
    assert "python run.py compression=int8 precision=16-mixed\n" in found[""]
    assert "| perplexity | 8.912 | 8.934 | 0.25% worse |" in found["Before and after"]
    assert "65,536 held-out tokens" in found["Before and after"]
    assert "| int8 | int8 | 400 ms | 8.934 | 5.40 MB |" in found["Stages"]
    assert "| train | 200 steps | 41 s | 8.912 | 19.6 MB | loss 5.610 to 2.190 |" in found["Stages"]
    assert "| train | - | 215 MB |  |" in found["Peak memory"]
    assert "same outputs" in found["The artifact"]
    assert "model = pipeline.load('outputs/a run/artifact')" in found["The artifact"]
    assert "AutoModelForCausalLM.from_pretrained('outputs/a run/artifact')" in found["The artifact"]
    assert "recipe='outputs/a run/recipe.lock.yaml'" in found["Again"]
    assert "resume='outputs/a run'" in found["Again"]
    assert "torch " in found["Made with"]
    assert "a processor, 2 cores" in found["Made with"]
    assert "name: gpt" in found["Config"]


def test_what_a_run_without_memory_went_on_with_is_told(run_dir: Path, language: dict[str, Any]) -> None:
    told = "Memory ran out with what was asked for. The run went on with `trainer.micro_batch_size=2`"
    assert "ran out" not in write_report(run_dir, language).read_text(encoding="utf-8")
    language["memory"]["adapted"] = ["trainer.micro_batch_size=2"]
    assert told in sections(write_report(run_dir, language).read_text(encoding="utf-8"))["Peak memory"]


@pytest.mark.parametrize(
    ("status", "steps", "told"),
    [
        ("ok", 200, "go on where it stopped, or for longer with a larger `trainer.max_steps`"),
        ("failed", None, "go on where it stopped:"),
        ("ok", 0, None),
        ("ok", None, None),
    ],
)
def test_a_run_that_cannot_be_resumed_is_not_told_to_be(
    status: str, steps: int | None, told: str | None, run_dir: Path, language: dict[str, Any]
) -> None:
    language["status"], language["train"]["steps"] = status, steps
    found = sections(write_report(run_dir, language).read_text(encoding="utf-8"))["Again"]
    assert told in found if told else "resume=" not in found


def test_every_plot_and_link_that_is_named_is_there(run_dir: Path, language: dict[str, Any]) -> None:
    text = write_report(run_dir, language).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert {"plots/before_after.png", "plots/loss.png", "metrics.csv"} <= set(links)
    for link in links:
        assert (run_dir / link).is_file(), link


def test_the_peak_of_a_links_own_fit_and_its_plot_are_shown(run_dir: Path, distilled: dict[str, Any]) -> None:
    course = {"kinds": {"weights": [1, 2, 1]}, "moments": []}
    phase = {"bytes": 2, "operator": "aten::mm", "course": course}
    phases = dict.fromkeys(("train", "train: distill", "compress"), phase)
    (run_dir / "plan.json").write_text(json.dumps({"capacity": None, "phases": phases}), encoding="utf-8")
    text = write_report(run_dir, distilled).read_text(encoding="utf-8")
    assert "| train: distill | 398 MB | 400 MB | -0.5% |" in sections(text)["Peak memory"]
    assert "train: int8" not in text
    assert "![live memory over a training step of distill, as planned](plots/memory_train_distill.png)" in text
    assert (run_dir / "plots" / "memory_train_distill.png").is_file()


def test_the_python_code_parses(run_dir: Path, language: dict[str, Any]) -> None:
    for block in re.findall(
        r"```python\n(.*?)```", write_report(run_dir, language).read_text(encoding="utf-8"), re.DOTALL
    ):
        compile(block, "report.md", "exec")


def test_only_what_transformers_opens_is_said_to_open_there(run_dir: Path, language: dict[str, Any]) -> None:
    language["artifact"]["format"] = "leanfit"
    assert "transformers" not in sections(write_report(run_dir, language).read_text(encoding="utf-8"))["The artifact"]


def test_what_did_not_improve_is_said_plainly(image: dict[str, Any]) -> None:
    assert shortcomings(image) == [
        "Not smaller on disk: 1.25x larger than before. No link of the chain claims to shrink the file.",
        "Not faster: 0.400x: slower.",
        "Quality: accuracy is 1.90 points worse (98.10% to 96.20%).",
    ]


def test_weights_in_a_pattern_that_run_as_dense_ones_are_confessed(language: dict[str, Any]) -> None:
    language["quality"]["after"] = 8.9
    detail = {"pattern": "2:4", "kernel": {"2:4 cusparselt": 20, "dense, no 2:4 kernels for convolutions": 4}}
    language["stages"][0].update(name="wanda", detail=detail)
    assert shortcomings(language) == [
        "wanda: 4 layers of 2:4 weights run as dense ones: no 2:4 kernels for convolutions."
    ]
    language["stages"][0].update(name="int8", detail={"kernel": {"int_mm, 2:4 as dense": 24}})
    assert shortcomings(language) == ["int8: 24 layers of 2:4 weights run as dense ones, by int_mm."]


def test_nothing_to_confess_no_section(run_dir: Path, language: dict[str, Any]) -> None:
    language["quality"]["after"] = 8.9
    assert shortcomings(language) == []
    assert "What did not improve" not in write_report(run_dir, language).read_text(encoding="utf-8")


def test_what_was_not_measured_is_not_passed_over() -> None:
    said = " ".join(shortcomings(new_result("run", [], {})))
    for topic in ("size", "speed", "quality", "receipt"):
        assert topic in said


def test_a_model_that_learned_nothing_is_called_that(language: dict[str, Any], image: dict[str, Any]) -> None:
    language["quality"].update(after=28.3)
    assert any("no better than one that learned nothing" in said for said in shortcomings(language))
    image["quality"].update(after=0.1)
    assert any("no better than one that learned nothing" in said for said in shortcomings(image))


def test_a_failure_and_a_broken_gate_stand_in_the_headline(language: dict[str, Any]) -> None:
    language.update(status="gate", error={"type": "ReceiptError", "message": "gate.min_ratio=4: 3.64"})
    assert "**Not accepted:** gate.min\\_ratio=4: 3.64" in headline(language)
    language.update(status="failed")
    assert headline(language).startswith("**The run failed:**")


def test_a_chain_is_told_in_order(run_dir: Path, language: dict[str, Any]) -> None:
    first = {
        **language["stages"][0],
        "name": "wanda",
        "method": "wanda",
        "detail": {"sparsity": 0.5, "note": "a | b\n`c`"},
    }
    first["train"] = {"loss_first": 2.5, "loss_last": 2.25}
    language["stages"].insert(0, first)
    assert "**gpt after wanda, then int8:**" in headline(language)
    # Of an artifact the group `model` says nothing.
    assert headline({**language, "job": "compress"}).startswith("**The artifact after wanda, then int8:**")
    lines = [
        line
        for line in write_report(run_dir, language).read_text(encoding="utf-8").splitlines()
        if line.startswith("| wanda")
    ]
    assert len(lines) == 1
    assert "| loss 2.500 to 2.250 |" in lines[0]
    assert len(re.findall(r"(?<!\\)\|", lines[0])) == 7
    assert "\n- note: a \\| b \\`c\\`\n" in (run_dir / "report.md").read_text(encoding="utf-8")


def test_long_details_are_counted_not_listed(run_dir: Path, language: dict[str, Any]) -> None:
    names = [f"layer{n}" for n in range(24)]
    language["stages"][0]["detail"] = {
        "names": names,
        "bits": dict.fromkeys(names, 8),
        "mixed": {name: n for n, name in enumerate(names)},
        "few": ["a", "b"],
    }
    text = write_report(run_dir, language).read_text(encoding="utf-8")
    many = "24 entries in result.json"
    facts = [f"- names: {many}", "- bits: 8 in all 24", f"- mixed: {many}", "- few: a, b"]
    assert "\n".join(["What int8 says of itself:", "", *facts, ""]) in text


def test_facts_are_said_in_words(run_dir: Path, language: dict[str, Any]) -> None:
    language["stages"][0]["detail"] = {"left_in_float": {"lm_head": "tied"}, "sparsity": 0.009847958, "none": []}
    text = write_report(run_dir, language).read_text(encoding="utf-8")
    assert "\n- left in float: lm\\_head: tied\n- sparsity: 0.009848\n- none: none\n" in text


def test_facts_within_facts_are_said_in_full_where_they_are_short(run_dir: Path, language: dict[str, Any]) -> None:
    kinds = {"ffn": (128, 64), "heads": (4, 2), "hidden": (64, 32), "blocks": (4, 3)}
    language["stages"][0]["detail"] = {
        "sizes": {kind: {"before": old, "after": new} for kind, (old, new) in kinds.items()},
        "losses": {"task": 0.5, "logits": 0.25, "hidden": 0.1, "attention": 0.1, "sequence": 0.05},
        "kept": {"blocks": [0, 1, 3], "hidden": "0-31", "ffn": [f"{n}-{60 + n}" for n in range(24)]},
    }
    text = write_report(run_dir, language).read_text(encoding="utf-8")
    assert "\n- sizes: ffn 128 to 64, heads 4 to 2, hidden 64 to 32, blocks 4 to 3\n" in text
    assert "\n- losses: task: 0.5000, logits: 0.2500, hidden: 0.1000, attention: 0.1000, sequence: 0.05000\n" in text
    assert "\n- kept: blocks: (0, 1, 3), hidden: 0-31, ffn: 24 entries in result.json\n" in text


@given(st.text())
def test_no_text_breaks_out_of_a_cell_or_of_code(text: str) -> None:
    (line,) = table([text], [])[:1]
    assert "\n" not in line
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 2
    assert "\n" not in code(text)
    assert "<" not in cell(text).replace("\\<", "")


def test_the_command_can_be_pasted(run_dir: Path, language: dict[str, Any]) -> None:
    language["overrides"] = ["compression=[wanda,int8]", "artifact=a b's", "optimizer.lr=1e-3"]
    text = write_report(run_dir, language).read_text(encoding="utf-8")
    (typed,) = re.findall(r"```bash\n(.*?)\n```", text)
    assert shlex.split(typed) == ["python", "run.py", *language["overrides"]]


def test_a_config_with_a_fence_stays_inside(run_dir: Path, language: dict[str, Any]) -> None:
    text = write_report(run_dir, language, "prompt: '```\n# Not a heading'\n").read_text(encoding="utf-8")
    assert text.rstrip().endswith("`" * 10)


@pytest.mark.parametrize("result", [{}, {"stages": "x", "choices": 3, "overrides": None, "size": []}, {"status": "ok"}])
def test_a_damaged_result_still_gives_a_report(tmp_path: Path, result: dict[str, Any]) -> None:
    assert write_report(tmp_path, result).read_text(encoding="utf-8").startswith("# Report")


def test_a_plot_that_fails_costs_a_line_not_the_report(
    run_dir: Path, language: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_dir / "metrics.csv").write_text("other,columns\n", encoding="utf-8")
    text = write_report(run_dir, language).read_text(encoding="utf-8")
    assert "A plot could not be drawn" in text
    assert "## Made with" in text


damage = st.none() | st.booleans() | st.floats() | st.text(max_size=30) | st.lists(st.integers(), max_size=2)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.data())
def test_headline_and_confession_take_any_values(language: dict[str, Any], data: st.DataObject) -> None:
    result = {**language}
    for section in ("quality", "size", "speed", "artifact", "choices"):
        result[section] = {key: data.draw(damage | st.just(value)) for key, value in language[section].items()}
    assert "\n" not in headline(result)
    assert all("\n" not in said for said in shortcomings(result))
