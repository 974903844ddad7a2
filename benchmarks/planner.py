"""Predicted peaks beside measured ones, over configs drawn by chance from all groups.

Each config runs in a process of its own, which writes its predictions (traced, and by the formula) before it trains:
then its model is opened, the stage that trains, the links of the chain, all that is written, and what was stored is
read back, evaluated, and goes on from a prompt, measured by the allocator's events as in every run. A config is its
number's: the same on every machine. Configs that the rules refuse are drawn anew; what could not be predicted is listed
as failed.

    python benchmarks/planner.py --configs 200 --out DIR      # goes on where DIR was left
    python benchmarks/planner.py --configs 200 --out DIR --report
    python benchmarks/planner.py --configs 60 --out DIR --devices 2   # ranks: ddp, fsdp, tp, deepspeed; 4: fsdp_tp too
    python benchmarks/planner.py --configs 12 --out DIR --compile     # fits of compiled blocks
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline import environment

environment.prepare()

from pipeline.composing import compose
from pipeline.errors import ConfigError

PHASES = ("load", "train", "compress", "save", "evaluate", "generate")
COMMON = [
    "trainer=smoke", "trainer.max_steps=4", "trainer.evaluate_every=0", "trainer.checkpoint_every=100", "device=cpu",
    "plan.calibrate=false",  # what is compared is the plan, not what this machine has learned
]  # fmt: skip
MARGINS = {"gpt": 0.01, "llama": 0.01, "efficientnet": 0.05}
"""What was set as the goal, whatever the precision."""


def drawn(number: int, devices: int, common: list[str]) -> list[str]:
    """The overrides of config `number`: the same everywhere, and such as the rules let run."""
    draw = random.Random(number)
    while True:
        words = [*common, *attempt(draw, devices)]
        try:
            compose(words)
        except ConfigError:
            continue
        return words


def attempt(draw: random.Random, devices: int) -> list[str]:
    """One config from all groups, valid or not; `parallelism` where there are several devices."""
    language = draw.random() < 0.8
    words = transformer(draw) if language else convolutions(draw)
    micro = draw.choice((1, 2, 4, 8))
    words += [f"trainer.micro_batch_size={micro}", f"trainer.batch_size={micro * draw.choice((1, 1, 2, 4)) * devices}"]
    words += [f"trainer.grad_clip={draw.choice(('1.0', '1.0', 'null'))}"]
    words += [f"precision={draw.choice(('32', '32', '16-mixed', 'bf16-mixed', 'bf16-true', '16-true', '64-true'))}"]
    optimizer = draw.choice(("adamw", "adamw", "sgd", "adafactor", "muon", "adamw8bit"))
    words += [f"optimizer={optimizer}"]
    if optimizer == "adamw":
        words += [f"optimizer.implementation={draw.choice(('auto', 'fused', 'foreach', 'plain'))}"]
    words += [f"memory.release_gradients={draw.choice(('true', 'false'))}"]
    words += [f"memory.activation_checkpointing={draw.choice(('none', 'none', 'selective', 'full'))}"]
    words += [f"memory.step_in_backward={draw.choice(('false', 'false', 'false', 'true'))}"]
    words += [f"memory.optimizer_offload={draw.choice(('none',) * 9 + ('disk',))}"]
    words += [f"memory.activation_offload={draw.choice(('none',) * 9 + ('disk',))}"]
    words += [f"calibration.samples={draw.choice((8, 8, 16, 32))}"]
    if language:
        words += [f"memory.loss_chunks={draw.choice((1, 1, 2, 4))}"]
        words += [f"adapter={draw.choice(('none', 'none', 'none', 'lora', 'dora'))}"]
    if devices > 1:
        words += [f"parallelism.devices={devices}", *ranks(draw, devices)]
    return [*words, *chain(draw, language)]


def ranks(draw: random.Random, devices: int) -> list[str]:
    """A choice of `parallelism` with some of its settings."""
    name = draw.choice(("ddp", "fsdp", "fsdp", "fsdp", "tp", "deepspeed", *(["fsdp_tp"] * 2 if devices == 4 else [])))
    words = [f"parallelism={name}"]
    if name == "ddp":
        words += [f"parallelism.bucket_view={draw.choice(('true', 'false'))}"]
        words += [f"parallelism.gradient_compression={draw.choice(('none', 'none', 'float16'))}"]
    if name == "deepspeed":
        words += [f"parallelism.stage={draw.choice((1, 2, 3))}"]
    if name in ("fsdp", "fsdp_tp"):
        words += [f"parallelism.reshard={draw.choice(('true', 'false'))}"]
        words += [f"parallelism.parameter_dtype={draw.choice(('null', 'null', 'bfloat16'))}"]
        words += [f"parallelism.reduce_dtype={draw.choice(('null', 'null', 'float32'))}"]
    if name == "fsdp":
        words += [f"parallelism.replicas={draw.choice((1, 1, 2))}"]
    if name in ("fsdp", "fsdp_tp", "tp"):
        words += [f"parallelism.checkpoint={draw.choice(('full', 'sharded'))}"]
    return words


def transformer(draw: random.Random) -> list[str]:
    model = draw.choice(("gpt", "llama"))
    heads = draw.choice((2, 4, 8))
    words = [
        f"model={model}", f"model.layers={draw.randint(1, 6)}", f"model.heads={heads}",
        f"model.width={draw.choice((64, 128, 192, 256))}", f"model.tie_embeddings={draw.choice(('true', 'false'))}",
        f"data.sequence_length={draw.choice((32, 64, 128, 200))}", "data.evaluation_tokens=2048",
    ]  # fmt: skip
    if model == "llama":
        words += [f"model.key_value_heads={draw.choice((1, 2, heads))}"]
    return words


def convolutions(draw: random.Random) -> list[str]:
    return [
        "model=efficientnet", "data=digits", f"data.image_size={draw.choice((8, 16, 24))}",
        f"model.width_coefficient={draw.choice((0.5, 1.0, 1.5))}",
        f"model.depth_coefficient={draw.choice((0.25, 0.5, 1.0))}",
    ]  # fmt: skip


def chain(draw: random.Random, language: bool) -> list[str]:
    """Half of all configs compress, some of them twice, with settings that change what is held."""
    quantizations = ["int8", "int8_weight_only", "int4", "int8_static", "nf4", "fp8", "int8_qat"]
    quantizations += ["int4_gptq", "int4_awq", "int8_smoothquant", "int4_qat", "mixed_bits"] if language else []
    prunings = ["magnitude", "structured", "distill", *(["wanda", "sparsegpt"] if language else [])]
    kind = draw.random()
    links = [draw.choice(prunings)] if kind < 0.15 else []
    links += [draw.choice(quantizations)] if kind < 0.1 or 0.15 < kind < 0.5 else []
    if not links:
        return []
    return [f"compression=[{','.join(links)}]", *(word for link in links for word in settings(draw, link))]


def settings(draw: random.Random, link: str) -> list[str]:
    """Some of a link's own settings."""
    key = f"compression.{link}"
    words: list[str] = []
    if link == "mixed_bits":
        words += [f"{key}.average_bits=4", f"{key}.samples=8"]
    if link in ("int4", "int4_gptq", "int4_awq", "mixed_bits"):
        words += [f"{key}.group_size={draw.choice(('32', '64', 'null'))}"]
        words += [f"{key}.symmetric={draw.choice(('true', 'true', 'false'))}"]
    if link == "int8_static":
        words += [f"{key}.observer={draw.choice(('minmax', 'percentile', 'mse'))}"]
    if link in ("magnitude", "wanda", "sparsegpt"):
        words += [f"{key}.pattern={draw.choice(('null', '2:4'))}"]
    return words


def one(number: int, out: Path, devices: int, compile: bool) -> None:
    """Predict, write, run, measure, write."""
    import torch

    from pipeline.artifact import store
    from pipeline.memory.measure import measure_peak
    from pipeline.planner.generation import Prompt
    from pipeline.planner.plan import plan
    from pipeline.recipes import lock_text
    from pipeline.report.progress import Progress
    from pipeline.report.result import new_result
    from pipeline.schema import values_of
    from pipeline.tasks import lookup
    from pipeline.tasks.causal_lm import PROMPT_TOKENS
    from pipeline.walk import Run, begin, changing_stages, enter_peak, evaluate, preflight, stages_of, walk

    words = drawn(number, devices, [*COMMON, *(["trainer.compile=true"] if compile else [])])
    config = compose(words)
    tokenizer = config.model.tokenizer()
    data, task = config.data.open(tokenizer), lookup.get(config.data.task)
    found: dict[str, Any] = {"number": number, "words": words, "trace": {}, "formula": {}}
    line = stages_of(config)
    try:
        preflight(config, data, tokenizer, out, changing_stages(line))
    except ConfigError as error:  # what only shapes tell: no config that runs
        write(out, number, {**found, "refused": error.problems[0]})
        return
    asked_to_plan = compose([*words, "job=plan"])  # whose plan has generation in it
    for level in ("trace", "formula"):
        started = time.process_time()
        planned = plan(asked_to_plan, data, level=level)
        found[level] = {name: phase.bytes for name, phase in planned.phases.items()}
        found[f"{level}_open"] = planned.open
        found[f"{level}_seconds"] = time.process_time() - started
    write(out, number, found)
    with tempfile.TemporaryDirectory() as place:
        lock = Path(place, "recipe.lock.yaml")  # where ranks read their config
        lock.write_text(lock_text(values_of(config), config.choices, None), encoding="utf-8")
        run = Run(
            config, Path(place), task, data, tokenizer, [], Progress({}, "silent", task.unit), new_result("run", [], {})
        )
        walk(run, line, begin(run, line))
        last = run.snapshot(changing_stages(line)[-1])
        with measure_peak(run.device) as opening:
            after = store.load(last)
        enter_peak(run.result, "load", opening)
        with measure_peak(run.device, [*after.parameters(), *after.buffers()]) as peak:
            evaluate(run, after)
        enter_peak(run.result, "evaluate", peak)
        if hasattr(task, "generate"):
            with (
                measure_peak(run.device, [*after.parameters(), *after.buffers()]) as peak,
                config.precision.evaluation_context(run.device),
                torch.inference_mode(),
            ):
                task.generate(after, Prompt(PROMPT_TOKENS), "", config.generate.max_new_tokens, 0.0, 0)
            enter_peak(run.result, "generate", peak)
        found["measured"] = run.result["memory"]["measured"]
        found["parameters"] = sum(weight.numel() for weight in after.parameters())
    write(out, number, found)


def write(out: Path, number: int, found: dict[str, Any]) -> None:
    with (out / f"{number}.json").open("w") as file:
        json.dump(found, file)
        file.flush()
        os.fsync(file.fileno())


def report(results: list[dict[str, Any]], out: Path) -> None:
    """Errors by level, phase and kind of model; then what failed, and the plot."""
    points: dict[str, list[tuple[int, int]]] = {}
    print(f"{'level':8} {'phase':9} {'models':13} {'n':>4} {'median':>8} {'worst':>8} {'under':>8} {'over':>8}")
    for level in ("trace", "formula"):
        for phase in PHASES:
            for models in (("gpt", "llama"), ("efficientnet",)):
                errors = []
                for found in results:
                    measured, predicted = (found.get("measured") or {}).get(phase), found[level].get(phase)
                    if measured and predicted and kind_of(found) in models:
                        errors.append(predicted / measured - 1)
                        points.setdefault(level, []).append((predicted, measured))
                if errors:
                    print(
                        f"{level:8} {phase:9} {'+'.join(models):13} {len(errors):4} "
                        f"{100 * statistics.median(map(abs, errors)):7.2f}% {100 * max(map(abs, errors)):7.2f}% "
                        f"{100 * min(errors):+7.2f}% {100 * max(errors):+7.2f}%"
                    )
    for found in results:
        print_failures(found)
    planned = [found for found in results if "formula_seconds" in found]
    print(
        f"{len(results)} configs, {sum('refused' in found for found in results)} of them refused once shapes were known"
    )
    seconds = {level: [found[f"{level}_seconds"] for found in planned] for level in ("trace", "formula")}
    print("processor seconds a plan:", {level: round(statistics.median(took), 2) for level, took in seconds.items()})
    plot(points, out / "planner.png")


def print_failures(found: dict[str, Any]) -> None:
    """What was not predicted or did not run, and predictions beyond their margin."""
    named = " ".join(word for word in found["words"] if word not in COMMON)
    if "refused" in found:
        return
    if "measured" not in found:
        print(f"FAILED #{found['number']}: {found.get('error', 'did not end')}: {named}")
        return
    for phase, measured in found["measured"].items():
        if not measured:
            continue
        predicted = found["trace"].get(phase)
        if predicted is None:
            print(f"OPEN   #{found['number']} {phase}: {found['trace_open'].get(phase)}: {named}")
        elif abs(predicted / measured - 1) > MARGINS[kind_of(found)]:
            print(f"BEYOND #{found['number']} {phase} {100 * (predicted / measured - 1):+.2f}% of {measured}: {named}")


def kind_of(found: dict[str, Any]) -> str:
    return next(word for word in found["words"] if word.startswith("model=")).partition("=")[2]


def plot(points: dict[str, list[tuple[int, int]]], out: Path) -> None:
    """Predicted against measured, on logarithmic axes, with the lines of 10% off."""
    from pipeline.report.plots import BLUE, GREY, ORANGE, plain, save, sheet

    figure = sheet(6, 5)
    axes = figure.subplots()
    plain(axes)
    for (level, pairs), colour in zip(points.items(), (BLUE, ORANGE), strict=False):
        axes.plot(
            [m / 1e6 for _, m in pairs], [p / 1e6 for p, _ in pairs], "o" if level == "trace" else "x",
            color=colour, markersize=4, alpha=0.7, linestyle="none", label=f"{level}, {len(pairs)} phases",
        )  # fmt: skip
    if not points:
        return
    ends = [
        min(m for pairs in points.values() for _, m in pairs) / 1e6,
        max(m for p in points.values() for _, m in p) / 1e6,
    ]
    for factor in (0.9, 1.0, 1.1):
        axes.plot(
            ends, [factor * end for end in ends], color=GREY, linewidth=0.8, linestyle="-" if factor == 1 else ":"
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("measured peak (MB)")
    axes.set_ylabel("predicted peak (MB); dotted: 10% off")
    axes.legend(frameon=False)
    save(figure, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1, choices=(1, 2, 4), help="processes that train together")
    parser.add_argument("--compile", action="store_true", help="fits of compiled blocks")
    parser.add_argument("--report", action="store_true", help="print what is there, run nothing")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.one is not None:
        one(arguments.one, arguments.out, arguments.devices, arguments.compile)
        return
    numbers = range(arguments.first, arguments.first + arguments.configs)
    waiting = [number for number in numbers if not (arguments.out / f"{number}.json").exists()]
    running: dict[int, subprocess.Popen[str]] = {}
    while (waiting or running) and not arguments.report:
        while waiting and len(running) < arguments.jobs:
            number = waiting.pop(0)
            command = [sys.executable, __file__, "--out", str(arguments.out), "--one", str(number)]
            command += ["--devices", str(arguments.devices), *(["--compile"] if arguments.compile else [])]
            child = {**environment.child(), "OMP_NUM_THREADS": "1"}
            running[number] = subprocess.Popen(command, env=child, stderr=subprocess.PIPE, text=True)
        for number, process in list(running.items()):
            if process.poll() is not None:
                said = process.stderr.read() if process.stderr else ""
                if process.returncode:
                    file = arguments.out / f"{number}.json"
                    words = {"number": number, "words": drawn(number, arguments.devices), "trace": {}, "formula": {}}
                    found = json.loads(file.read_text()) if file.exists() else words
                    write(arguments.out, number, {**found, "error": (said.strip().splitlines() or ["?"])[-1][:200]})
                del running[number]
        time.sleep(0.2)
    results = [json.loads(file.read_text()) for n in numbers if (file := arguments.out / f"{n}.json").exists()]
    report(results, arguments.out)


if __name__ == "__main__":
    main()
