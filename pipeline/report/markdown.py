"""report.md: a run for a reader. Headline, before and after, stages, memory, what did not improve, how to go on."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.report.result import write_text
from pipeline.report.table import (
    amount,
    artifact_path,
    command,
    comparison,
    composer,
    held_out,
    link_fits,
    links_of,
    much_skipped,
    pick,
    quotient,
    receipt,
    relative,
    setting,
    word,
)
from pipeline.report.units import (
    format_bytes,
    format_count,
    format_error,
    format_quality,
    format_seconds,
    quality_change,
    shorten,
    significant,
    times,
    worsening,
)

AUTO_CLASSES = {"tokens/s": "AutoModelForCausalLM", "samples/s": "AutoModelForImageClassification"}
OPEN_FORMATS = frozenset({"dense", "int-quantized", "pack-quantized"})
"""Artifact formats that plain transformers opens."""
SHORT = 120
"""Characters that a fact of more than three parts may take, to be said in full."""


def cell(value: Any) -> str:
    """`value` inside a Markdown table: one line, no bar or markup that would end the cell."""
    text = " ".join(str(value).split())
    for sign in "\\|`*_<>[]":
        text = text.replace(sign, f"\\{sign}")
    return text


def code(text: str) -> str:
    """`text` as inline code, whatever backticks it holds."""
    text = " ".join(text.split())
    fence = "`"
    while fence in text:
        fence += "`"
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """A Markdown table; columns in `right` are aligned right."""
    rule = ["---:" if position in right else "---" for position in range(len(header))]
    lines = [list(map(cell, header)), rule, *(list(map(cell, row)) for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def chain_text(result: Mapping[str, Any]) -> str:
    """'wanda, then int8', or an empty text for no compression."""
    names = [word(stage, "name") for stage in links_of(result)]
    return ", then ".join(name for name in names if name)


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""


def headline(result: Mapping[str, Any]) -> str:
    """The run in one sentence."""
    status = word(result, "status")
    # What an artifact holds is not what the group `model` says.
    opened = word(result, "job") == "compress"
    model, chain = "The artifact" if opened else pick(result, "choices", "model"), chain_text(result)
    subject = f"{model or 'The model'}{' after ' if chain else ''}{chain}"
    if status == "failed":
        return f"**The run failed:** {cell(word(result, 'error', 'message') or 'no message was left')}"
    metric, direction = word(result, "quality", "metric"), word(result, "quality", "direction")
    before, after = amount(result, "quality", "before"), amount(result, "quality", "after")
    facts = []
    size_before, size_after = amount(result, "size", "bytes_before"), amount(result, "size", "bytes_after")
    if size_after is not None:
        ratio = amount(result, "size", "ratio") or quotient(size_before, size_after)
        change = times(ratio, "smaller", "larger", "the same size as before")
        facts.append(f"{format_bytes(size_after)} on disk" + _in_brackets(change))
    if after is not None:
        change = quality_change(metric, direction, before, after)
        facts.append(f"{cell(metric)} {format_quality(metric, after)}" + _in_brackets(change))
    speed = amount(result, "speed", "after")
    if speed is not None:
        ratio = amount(result, "speed", "ratio") or quotient(speed, amount(result, "speed", "before"))
        change = times(ratio, "faster", "slower", "the same speed as before")
        facts.append(f"{format_count(speed)} {word(result, 'speed', 'unit')}" + _in_brackets(change))
    sentence = f"**{cell(subject)}:** {', '.join(facts)}." if facts else f"**{cell(subject)}.**"
    if status == "gate":
        sentence += f"\n\n**Not accepted:** {cell(word(result, 'error', 'message') or 'no message was left')}"
    return sentence


def shortcomings(result: Mapping[str, Any]) -> list[str]:
    """What did not improve, or is not known, said plainly."""
    said = []
    compressed = bool(chain_text(result))
    size = amount(result, "size", "ratio")
    if size is not None and size < 1.005:
        change = times(size, "smaller", "larger than before", "the same size as before")
        claim = " No link of the chain claims to shrink the file." if word(result, "size", "claim") == "none" else ""
        said.append(f"Not smaller on disk: {change}.{claim if compressed else ''}")
    elif size is None:
        said.append("The size before and after was not compared.")
    speed = amount(result, "speed", "ratio")
    if speed is not None and speed < 1.005:
        slower = times(speed, "faster", "slower", "the same speed as before")
        said.append(f"Not faster: {slower}.")
    elif speed is None:
        said.append("The speed before and after was not compared.")
    said += _run_densely(result)
    said += [f"{line[0].upper()}{line[1:]}." for line in much_skipped(result)]
    direction, metric = word(result, "quality", "direction"), word(result, "quality", "metric")
    before, after = amount(result, "quality", "before"), amount(result, "quality", "after")
    if before is not None and after is not None and worsening(direction, before, after) > 0:
        change = quality_change(metric, direction, before, after)
        said.append(
            f"Quality: {metric} is {change} ({format_quality(metric, before)} to {format_quality(metric, after)})."
        )
    elif before is None or after is None:
        said.append("The quality before and after was not compared.")
    baseline = amount(result, "quality", "baseline")
    if after is not None and baseline is not None and worsening(direction, baseline, after) >= 0:
        said.append(
            f"The model is no better than one that learned nothing "
            f"({format_quality(metric, after)} against {format_quality(metric, baseline)})."
        )
    if pick(result, "artifact", "reload", "ok") is not True:
        said.append("There is no receipt: the artifact was not reloaded with equal outputs in a fresh process.")
    return said


def _run_densely(result: Mapping[str, Any]) -> list[str]:
    """Layers pruned to a pattern of which the kernel that runs them makes no use."""
    lines: list[str] = []
    for stage in links_of(result):
        kernels = pick(stage, "detail", "kernel")
        for kernel, count in kernels.items() if isinstance(kernels, dict) else ():
            pattern = word(stage, "detail", "pattern") or "2:4"
            dense = f"{word(stage, 'name')}: {count} layers of {pattern} weights run as dense ones"
            if kernel.startswith("dense, "):
                lines.append(f"{dense}: {kernel.removeprefix('dense, ')}.")
            elif kernel.endswith(", 2:4 as dense"):
                lines.append(f"{dense}, by {kernel.removesuffix(', 2:4 as dense')}.")
    return lines


def _stage_rows(result: Mapping[str, Any]) -> list[list[str]]:
    metric = word(result, "quality", "metric")
    rows = [
        [
            "train",
            f"{format_count(amount(result, 'train', 'steps') or 0)} steps",
            format_seconds(amount(result, "train", "seconds")),
            format_quality(metric, amount(result, "quality", "before")),
            format_bytes(amount(result, "size", "bytes_before")),
            _fit_detail(pick(result, "train")),
        ]
    ]
    for stage in links_of(result):
        rows.append(
            [
                word(stage, "name"),
                word(stage, "method"),
                format_seconds(amount(stage, "seconds")),
                format_quality(metric, amount(stage, "quality_after")),
                format_bytes(amount(stage, "bytes_after")),
                _fit_detail(pick(stage, "train")),
            ]
        )
    return rows


def _facts_by_stage(result: Mapping[str, Any]) -> list[str]:
    """What each stage says of itself, a line a fact."""
    lines: list[str] = []
    for stage in links_of(result):
        detail = pick(stage, "detail")
        if isinstance(detail, dict) and detail:
            facts = [f"- {cell(key.replace('_', ' '))}: {cell(_in_words(value))}" for key, value in detail.items()]
            lines += ["", f"What {cell(word(stage, 'name'))} says of itself:", "", *facts]
    return lines


def _bits_by_layer(result: Mapping[str, Any]) -> list[str]:
    """For each stage that chose bits by layer: what each layer got, and what each number of bits would cost it."""
    lines: list[str] = []
    for stage in links_of(result):
        chosen, measured = pick(stage, "detail", "bits"), pick(stage, "detail", "sensitivity")
        if not isinstance(chosen, dict) or not isinstance(measured, dict):
            continue
        costs = {name: cost for name, cost in measured.items() if isinstance(cost, dict)}
        offered = list(dict.fromkeys(bits for cost in costs.values() for bits in cost))
        rows = [
            [name, str(chosen.get(name, "")), *(_divergence(amount(cost, bits)) for bits in offered)]
            for name, cost in costs.items()
        ]
        header = ["layer", "bits", *(f"nats at {bits} bits" for bits in offered)]
        title = f"Bits by layer: {cell(word(stage, 'name'))}"
        lines += _section(title, table(header, rows, right=range(1, len(header))) if rows else [])
    return lines


def _divergence(value: float | None) -> str:
    return "" if value is None else significant(value, 2)


def _fit_detail(train: Any) -> str:
    first, last = amount(train, "loss_first"), amount(train, "loss_last")
    trained = amount(train, "trainable_parameters")
    facts = [] if first is None or last is None else [f"loss {significant(first, 4)} to {significant(last, 4)}"]
    facts += [] if trained is None else [f"{format_count(trained)} parameters trained"]
    skipped = amount(train, "skipped_steps")
    facts += [f"{skipped:.0f} steps skipped, whose gradients overflowed"] if skipped else []
    return ", ".join(facts)


def _in_words(value: Any) -> str:
    """A fact of a stage in a few words: what is said of many layers is counted; result.json holds it whole."""
    if isinstance(value, Mapping):
        if _is_change(value):
            return f"{_in_words(value['before'])} to {_in_words(value['after'])}"
        distinct = {json.dumps(item, default=str, sort_keys=True) for item in value.values()}
        if len(value) > 3 and len(distinct) == 1:
            return f"{_in_words(next(iter(value.values())))} in all {len(value)}"
        return _listed([f"{key}{' ' if _is_change(item) else ': '}{_inner(item)}" for key, item in value.items()])
    if isinstance(value, (list, tuple)):
        return _listed(list(map(_inner, value)))
    if isinstance(value, float):
        return significant(value, 4)
    return shorten(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str), 200)


def _is_change(value: Any) -> bool:
    return isinstance(value, Mapping) and value.keys() == {"before", "after"}


def _inner(value: Any) -> str:
    """A fact within another: in parentheses where its own commas would be read as the other's."""
    words = _in_words(value)
    return f"({words})" if isinstance(value, (Mapping, list, tuple)) and ", " in words else words


def _listed(words: Sequence[str]) -> str:
    """All of a few or of short ones; of others the number, and where they are."""
    text = ", ".join(words)
    return (text or "none") if len(words) <= 3 or len(text) <= SHORT else f"{len(words)} entries in result.json"


def _memory_rows(result: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for phase in ("load", "train", "validate", "compress", "save", "evaluate", "generate"):
        predicted, measured = amount(result, "memory", "predicted", phase), amount(result, "memory", "measured", phase)
        if predicted is not None or measured is not None:
            rows.append(_memory_row(phase, predicted, measured))
        held = amount(result, "memory", "reserved", phase)
        if held is not None:
            taken = amount(result, "memory", "reserved_predicted", phase)
            rows.append(_memory_row(f"{phase}, reserved by CUDA's pool", taken, held))
        if phase == "train":
            rows += [_memory_row(f"train: {name}", *peak) for name, peak in link_fits(result)]
    return rows


def _memory_row(name: str, predicted: float | None, measured: float | None) -> list[str]:
    return [name, format_bytes(predicted), format_bytes(measured), format_error(quotient(predicted, measured))]


def _adapted(result: Mapping[str, Any]) -> list[str]:
    """What a run that was out of memory went on with, which the command that was typed does not say."""
    changes = pick(result, "memory", "adapted")
    if not isinstance(changes, list) or not changes:
        return []
    with_these = code(" ".join(map(str, changes)))
    return ["", f"Memory ran out with what was asked for. The run went on with {with_these}, which computes the same."]


def _section(title: str, body: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *body] if body else []


def _machine(result: Mapping[str, Any]) -> list[str]:
    device = " · ".join(filter(None, (word(result, "device", "kind"), word(result, "device", "name"))))
    used, requested = word(result, "precision", "used"), word(result, "precision", "requested")
    lines = [f"Device: {cell(device)}."] if device else []
    if used:
        asked = f" (asked for as {cell(requested)})" if requested not in ("", used) else ""
        lines.append(f"Precision: {cell(used)}{asked}.")
    strategy = word(result, "parallelism", "strategy")
    if strategy:
        devices, nodes = amount(result, "parallelism", "devices"), amount(result, "parallelism", "nodes")
        lines.append(f"Parallelism: {cell(strategy)}, devices: {devices or 1:.0f}, nodes: {nodes or 1:.0f}.")
    versions = pick(result, "versions")
    if isinstance(versions, Mapping):
        lines.append(
            "Versions: " + ", ".join(f"{cell(name)} {cell(version)}" for name, version in versions.items()) + "."
        )
    return [f"- {line}" for line in lines]


def _open_in_python(result: Mapping[str, Any], artifact: Path) -> list[str]:
    where = repr(relative(artifact))
    lines = [
        "```python",
        "import pipeline",
        "",
        f"model = pipeline.load({where})  # a torch.nn.Module in eval mode",
        "```",
    ]
    auto = AUTO_CLASSES.get(word(result, "speed", "unit"))
    if word(result, "artifact", "format") in OPEN_FORMATS and auto:
        lines += ["", "or with transformers alone:", "", "```python", f"from transformers import {auto}", ""]
        lines += [f"model = {auto}.from_pretrained({where})", "```"]
    return lines


def _again(run_dir: Path, result: Mapping[str, Any]) -> list[str]:
    """How to repeat, share and resume the run, as far as what they need is there.

    Only a stage 0 that has trained grows with `trainer.max_steps`: a run without one is not resumed once it is over.
    """
    lines = []
    lock = run_dir / "recipe.lock.yaml"
    if lock.exists():
        again = f"{composer()} {setting('recipe', relative(lock))}"
        lines.append(f"- repeat it, here or elsewhere (one file holds it all): {code(again)}")
    trained, over = amount(result, "train", "steps"), word(result, "status") == "ok"
    if (trained or not over) and ((run_dir / "checkpoints").exists() or (run_dir / "stages").exists()):
        longer = ", or for longer with a larger `trainer.max_steps`" if trained else ""
        resume = f"{composer()} {setting('resume', relative(run_dir))}"
        lines.append(f"- go on where it stopped{longer}: {code(resume)}")
    if (run_dir / ".hydra" / "config.yaml").exists():
        lines.append("- every setting of it: [.hydra/config.yaml](.hydra/config.yaml)")
    if (run_dir / "metrics.csv").exists():
        lines.append("- loss, rate, throughput and memory over steps: [metrics.csv](metrics.csv)")
    return lines


def _explanation(result: Mapping[str, Any]) -> list[str]:
    """What before and after mean, and on how much was measured."""
    said = ["Before is the trained model; after is the artifact, read back from disk; both are measured alike."]
    n = amount(result, "quality", "n")
    if n is not None:
        said.append(f"Quality is over {n:,.0f} held-out {held_out(result)}.")
    baseline, metric = amount(result, "quality", "baseline"), word(result, "quality", "metric")
    if baseline is not None:
        said.append(f"A model that learned nothing has {cell(metric)} {format_quality(metric, baseline)}.")
    return ["", " ".join(said)]


def _plots(run_dir: Path, result: Mapping[str, Any]) -> Iterator[str]:
    """Draw the plots and name them; one that cannot be drawn costs a line in the log, never the report."""
    from pipeline.report import plots
    from pipeline.report.timeline import draw_timelines

    try:
        if plots.before_after(result, run_dir / "plots" / "before_after.png"):
            yield "![size, quality and speed before and after](plots/before_after.png)"
        baseline = amount(result, "quality", "baseline")
        # A perplexity is the exponential of a loss; another metric has no place on the loss's axis.
        nats = math.log(baseline) if baseline and word(result, "quality", "metric") == "perplexity" else None
        if plots.loss_curve(run_dir / "metrics.csv", run_dir / "plots" / "loss.png", baseline=nats):
            yield "![loss over steps](plots/loss.png)"
        for phase, plot in draw_timelines(run_dir / "plan.json", run_dir / "plots").items():
            kind, _, link = phase.partition(": ")
            if kind == "train":
                step = f"a training step of {cell(link)}" if link else "a training step"
                yield f"![live memory over {step}, as planned](plots/{plot.name})"
    except Exception as error:
        logging.getLogger(__name__).warning("a plot could not be drawn: %s: %s", type(error).__name__, error)
        yield f"A plot could not be drawn: {cell(error)}"


def write_report(run_dir: str | Path, result: Mapping[str, Any], config_yaml: str | None = None) -> Path:
    """Write `report.md` and its plots into `run_dir`; `config_yaml`, where given, is shown at the end."""
    run_dir = Path(run_dir)
    overrides = pick(result, "overrides")
    typed = command(overrides if isinstance(overrides, list) else [])
    lines = ["# Report", "", headline(result), "", "```bash", typed, "```"]
    rows = [[row.label, row.before, row.after, row.change] for row in comparison(result)]
    if rows:
        before_after = table(["", "before", "after", "change"], rows, right=(1, 2))
        lines += _section("Before and after", [*before_after, *_explanation(result)])
    for plot in _plots(run_dir, result):
        lines += ["", plot]
    lines += _section("What did not improve", [f"- {cell(text)}" for text in shortcomings(result)])
    header = ["stage", "method", "time", word(result, "quality", "metric") or "quality", "bytes", "training"]
    stages = table(header, _stage_rows(result), right=(2, 3, 4))
    lines += _section("Stages", [*stages, *_facts_by_stage(result)])
    lines += _bits_by_layer(result)
    memory = _memory_rows(result)
    header = ["phase", "planned", "measured", "plan off by"]
    peaks = table(header, memory, right=(1, 2, 3)) if memory else []
    lines += _section("Peak memory", [*peaks, *_adapted(result)])
    artifact = artifact_path(result, run_dir)
    if artifact is not None:
        proof = receipt(result)
        body = [f"{code(relative(artifact))}, format {cell(word(result, 'artifact', 'format') or 'unknown')}."]
        body += ["", f"Receipt: {cell(proof)}."] if proof else []
        lines += _section("The artifact", [*body, "", *_open_in_python(result, artifact)])
    lines += _section("Again", _again(run_dir, result))
    lines += _section("Made with", _machine(result))
    if config_yaml is not None:
        fence = "```" if "```" not in config_yaml else "`" * 10
        lines += _section("Config", [f"{fence}yaml", config_yaml.rstrip(), fence])
    report = run_dir / "report.md"
    write_text(report, "\n".join(lines) + "\n")
    return report
