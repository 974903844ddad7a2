"""Every method after training, on one model: quality, seconds and memory, beside its peers' where they are given.

The model is any Hugging Face causal-LM directory (`--model`), one trained here, or an artifact of `model=efficientnet
data=digits`. Calibration, and what methods that train are shown, is drawn by three seeds; all engines get the same
rows, and all are evaluated, and trained, by the same code (peers/protocol.py): a language model in windows of its
length that do not overlap. Engines take turns draw by draw, so that other load meets them alike; a ratio is of one draw
each. Memory is by how much the process's resident set rose at its highest, in processes of their own where the
allocator gives back what is freed.

    python benchmarks/compression.py --model outputs/.../artifact
    python benchmarks/peers/setup.py ~/peers && python benchmarks/compression.py --peers ~/peers --out table
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline import environment

environment.prepare()  # as the program does, before torch is there

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2)
GROUP = {"group_size": 64}
Row = tuple[str, str, dict[str, Any]]
"""(label, method, settings)."""


def quantized(method: str, bits: int, **more: Any) -> Row:
    return f"{method} {bits} bits", method, {"bits": bits, **GROUP, **more}


def structured(label: str, **shares: Any) -> list[Row]:
    """By the norms of weights, and by how much the loss would change, to first order: both sides have both."""
    usual = {"ffn": None, "heads": None, "channels": None, "round_to": 1, **shares}
    return [(f"structured {label} {by}", "structured", {**usual, "importance": by}) for by in ("magnitude", "taylor")]


ROWS: list[Row] = [
    ("float32", "none", {}),
    ("int8", "int8", {}),
    ("int8_weight_only", "int8_weight_only", {}),
    ("int8_smoothquant", "int8_smoothquant", {"alpha": 0.5}),
    *(quantized(method, bits) for bits in (4, 3, 2) for method in ("int4", "int4_gptq", "int4_awq")),
    ("int8_qat", "int8_qat", {}),
    *(quantized("int4_qat", bits) for bits in (4, 2)),
    ("mixed_bits 3 on average", "mixed_bits", {"average_bits": 3.0, **GROUP}),
    ("nf4", "nf4", {}),
    *((f"{method} 50%", method, {"sparsity": 0.5}) for method in ("magnitude", "wanda", "sparsegpt")),
    *((f"{method} 2:4", method, {"sparsity": 0.5, "pattern": "2:4"}) for method in ("magnitude", "wanda", "sparsegpt")),
    *structured("ffn", ffn=0.5),
]
IMAGE_ROWS: list[Row] = [("float32", "none", {}), *structured("channels", channels=0.5)]
PEERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "llm-compressor": (
        "llmcompressor", "llmcompressor_side.py",
        ("none", "int8", "int8_smoothquant", "int4", "int4_gptq", "int4_awq", "wanda", "sparsegpt"),
    ),
    "torchao": (
        "torchao", "torchao_side.py", ("none", "int8", "int8_weight_only", "int4", "int8_qat", "int4_qat")
    ),
    "torch-pruning": ("torch-pruning", "torch_pruning_side.py", ("none", "structured")),
}  # fmt: skip
"""Engine -> its environment, its script, the methods that it has too."""
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Environment under which glibc gives back at once what is freed: else tens of MB stay resident, by chance."""
COLORS = {"leanfit": "#1f77b4", "llm-compressor": "#ff7f0e", "torchao": "#2ca02c", "torch-pruning": "#d62728"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face directory; default: one is trained (minutes)")
    parser.add_argument("--choice", default="gpt", help="the model choice that is trained: gpt or llama")
    parser.add_argument("--steps", type=int, default=1600, help="how long it is trained")
    parser.add_argument("--peers", type=Path, help="where peers/setup.py put their environments")
    parser.add_argument("--engines", nargs="*", choices=PEERS, help="default: all whose environment is there")
    parser.add_argument("--only", nargs="*", help="labels of rows, or beginnings of them")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows, or images")
    parser.add_argument("--tokens", type=int, default=65536, help="held-out tokens")
    parser.add_argument("--fit", type=int, nargs=2, default=(60, 12), help="steps of training, and rows of each")
    parser.add_argument("--lr", type=float, default=2.5e-4, help="its learning rate at the start")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/compression"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    model = arguments.model or trained(arguments.choice, arguments.steps, arguments.out / f"{arguments.choice}_trained")
    images = "EfficientNet" in (model / "config.json").read_text()
    task = prepared(model, images, arguments.samples, arguments.tokens, arguments.fit, arguments.out)
    task["fit"] = {"steps": arguments.fit[0], "batch_size": arguments.fit[1], "lr": arguments.lr}
    rows = []
    for label, method, settings in IMAGE_ROWS if images else ROWS:
        if arguments.only and not any(label.startswith(start) for start in arguments.only):
            continue
        engines = {"leanfit": [sys.executable, str(HERE / "peers" / "ours.py")]}
        for engine, (place, script, methods) in PEERS.items() if arguments.peers else ():
            python = arguments.peers / place / "bin" / "python"
            wanted = not arguments.engines or engine in arguments.engines
            if method in methods and wanted and python.exists():
                engines[engine] = [str(python), str(HERE / "peers" / script)]
        own = {**task, "method": method, "settings": settings, "recover": method == "structured"}
        for found in measure(engines, own, arguments.out):
            rows.append({"row": label, **found})
            print(line(rows[-1]), flush=True)
        write(rows, arguments.out)
    print(f"\n{arguments.out}/table.csv, {arguments.out}/table.png")


def trained(choice: str, steps: int, directory: Path) -> Path:
    """The artifact of a dense model trained for `steps`, as it was if it is there."""
    if not (directory / "artifact").is_dir():
        settings = [f"model={choice}", f"trainer.max_steps={steps}", "optimizer.lr=1e-3", "trainer.evaluate_every=0"]
        command = [sys.executable, str(HERE.parent / "run.py"), *settings, f"hydra.run.dir={directory}"]
        subprocess.run(command, check=True)
    return directory / "artifact"


def prepared(model: Path, images: bool, samples: int, tokens: int, fit: tuple[int, int], out: Path) -> dict[str, Any]:
    """Evaluation rows, and by draw calibration rows and those to train on, as files that every engine reads."""
    import numpy as np
    import torch

    from pipeline.calibration.settings import Calibration
    from pipeline.composing import compose
    from pipeline.data.calibration import calibration_batches
    from pipeline.data.loader import collate

    choices = ["model=efficientnet", "data=digits"] if images else ["model=hf", f"model.pretrained='{model}'"]
    config = compose([*choices, *([] if images else [f"data.evaluation_tokens={tokens}"])])
    tokenizer = None if images else config.model.tokenizer()
    data: Any = config.data.open(tokenizer)
    names = ("pixel_values", "labels") if images else ("input_ids",)

    def rows(dataset: Any, indices: Any) -> dict[str, torch.Tensor]:
        found = collate([dataset[int(index)] for index in indices])
        return {name: found[name] for name in names}

    torch.save(rows(data.evaluation, range(len(data.evaluation))), out / "evaluation.pt")
    draws = {}
    for seed in SEEDS:
        generator = np.random.default_rng(1000 + seed)
        needed = fit[0] * fit[1]
        order = [generator.permutation(len(data.train)) for _ in range(-(-needed // len(data.train)))]
        training = rows(data.train, np.concatenate(order)[:needed])
        if images:
            calibration = rows(data.train, np.random.default_rng(seed).choice(len(data.train), samples, replace=False))
        else:
            drawn = Calibration(
                name="settings", source="train", samples=samples, length=None, seed=seed, batch_size=samples
            )
            (calibration,) = calibration_batches(drawn, data, tokenizer)
        torch.save({"calibration": calibration, "training": training}, out / f"draw_{seed}.pt")
        draws[str(seed)] = str((out / f"draw_{seed}.pt").resolve())
    return {"model": str(model.resolve()), "evaluation": str((out / "evaluation.pt").resolve()), "draws": draws}


def measure(engines: dict[str, list[str]], task: dict[str, Any], out: Path) -> list[dict[str, Any]]:
    """One row, all draws, by each engine in turns: means, spreads, and our share of each peer's time and memory."""
    results: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    errors: dict[str, str] = {}
    for memory in (False, True):
        (out / "task.json").write_text(json.dumps({**task, "measure_memory": memory}))
        running = {
            e: started(c, out / "task.json", out / f"{e}.log", memory) for e, c in engines.items() if e not in errors
        }
        for draw in range(len(task["draws"])):
            for engine, process in running.items():
                if engine in errors:
                    continue
                found = taken_turn(process)
                if found is None:
                    process.communicate()
                    told = (out / f"{engine}.log").read_text().strip().splitlines()
                    errors[engine] = (told or ["no result"])[-1][:120]
                elif memory:
                    results[engine][draw]["peak_bytes"] = found["peak_bytes"]
                else:
                    results[engine].append(found)
        for engine, process in running.items():
            if engine not in errors:
                process.communicate()
    return [
        {"engine": engine, "error": errors[engine]} if engine in errors else {
            "engine": engine, **summary(results[engine]),
            **({} if engine == "leanfit" or "leanfit" in errors else shares(results["leanfit"], results[engine])),
        }
        for engine in engines
    ]  # fmt: skip


def started(command: list[str], task: Path, log: Path, memory: bool) -> subprocess.Popen[str]:
    path = str(HERE.parent) if command[1].endswith("ours.py") else ""
    with log.open("w") as errors:
        return subprocess.Popen(
            [*command, "--task", str(task)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**os.environ, "PYTHONPATH": path, **(RETURNING if memory else {})},
        )  # fmt: skip


def taken_turn(process: subprocess.Popen[str]) -> dict[str, Any] | None:
    """What an engine finds for its next draw; None where it ends instead."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write("\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    for text in process.stdout:
        if text.startswith("RESULT "):
            found: dict[str, Any] = json.loads(text[7:])
            return found
    return None


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"draws": len(results)}
    for name in ("perplexity", "accuracy"):
        for start, kind in (("", lambda r: r), ("recovered_", lambda r: r["recovered"])):
            if start and "recovered" not in results[0]:
                continue
            values = [kind(result)[name] for result in results]
            found |= {start + name: statistics.mean(values), f"{start}{name}_lowest": min(values)}
            found[f"{start}{name}_highest"] = max(values)
    for name in ("seconds", "processor_seconds", "peak_bytes", "saved_bytes", "parameters"):
        if name in results[0]:
            found[name] = statistics.median(result[name] for result in results)
    return found


def shares(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, float]:
    """Ours over theirs, draw by draw: median, lowest, highest. Wall time is in the table, for readers."""
    found: dict[str, float] = {}
    for name, key in (("time", "processor_seconds"), ("memory", "peak_bytes")):
        ratios = [one[key] / max(other[key], 1e-9) for one, other in zip(ours, theirs, strict=True)]
        found |= {f"{name}_ratio": statistics.median(ratios), f"{name}_ratio_lowest": min(ratios)}
        found[f"{name}_ratio_highest"] = max(ratios)
    return found


def line(row: dict[str, Any]) -> str:
    start = f"{row['row']:<34} {row['engine']:<15}"
    if "error" in row:
        return f"{start} {row['error']}"

    def spread(name: str, digits: int = 4) -> str:
        low, high = row[f"{name}_lowest"], row[f"{name}_highest"]
        return f"{row[name]:.{digits}f}" + (f" ({low:.{digits}f}-{high:.{digits}f})" if low != high else "")

    parts = [f"ppl {spread('perplexity')}", f"acc {spread('accuracy')}"]
    if "recovered_perplexity" in row:
        parts += [f"recovered {spread('recovered_perplexity')}", f"acc {spread('recovered_accuracy')}"]
    parts += [f"{row['seconds']:.2f} s", f"{row['processor_seconds']:.2f} cpu s", f"{row['peak_bytes'] / 1e6:.1f} MB"]
    parts += [f"saved {row['saved_bytes']}"] if "saved_bytes" in row else []
    parts += [f"{row['parameters']} parameters"] if "parameters" in row else []
    if "time_ratio" in row:
        parts += [f"ours/theirs: time {spread('time_ratio', 2)}, memory {spread('memory_ratio', 2)}"]
    return f"{start} " + "  ".join(parts)


def write(rows: list[dict[str, Any]], out: Path) -> None:
    """table.csv, and table.png: by how much each row's perplexity is above float32's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    with (out / "table.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    good = [row for row in rows if "error" not in row]
    dense = next((row["perplexity"] for row in good if row["row"] == "float32"), None)
    labels = list(dict.fromkeys(row["row"] for row in good if row["row"] != "float32"))
    if dense is None or not labels:
        return
    figure, axes = plt.subplots(figsize=(8, 0.34 * len(labels) + 1.2), layout="constrained")
    shown = [row for row in good if row["row"] in labels]
    engines = list(dict.fromkeys(row["engine"] for row in shown))
    lowest = 0.0
    for row in shown:
        here = [other["engine"] for other in shown if other["row"] == row["row"]]
        height = 0.8 / len(here)
        place = labels.index(row["row"]) + (here.index(row["engine"]) - (len(here) - 1) / 2) * height
        value = 100 * (row["perplexity"] / dense - 1)
        axes.barh(place, value, height=0.95 * height, color=COLORS[row["engine"]])
        ends = [100 * (row[f"perplexity_{end}"] / dense - 1) for end in ("lowest", "highest")]
        axes.plot(ends, [place] * 2, color="black")
        lowest = min(lowest, *ends)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xlim(left=1.5 * lowest)
    axes.set_xlabel(f"perplexity above float32's {dense:.2f}, % (black: three draws of calibration)")
    handles = [Patch(color=COLORS[engine]) for engine in engines]
    axes.legend(handles, engines, loc="upper right")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(out / "table.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
