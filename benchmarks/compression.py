"""Every method after training, on one model: perplexity, seconds and memory, beside llm-compressor's where it is given.

The model is any Hugging Face causal-LM directory (`--model`), or one trained here. Calibration is drawn by three seeds;
both engines get the same windows, and both are evaluated by the same code (peers/protocol.py), in windows of the
model's length that do not overlap. Memory is by how much the process's resident set rose at its highest.

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


def quantized(method: str, bits: int, **more: Any) -> tuple[str, str, dict[str, Any]]:
    return f"{method} {bits} bits", method, {"bits": bits, **GROUP, **more}


ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("float32", "none", {}),
    ("int8", "int8", {}),
    ("int8_smoothquant", "int8_smoothquant", {"alpha": 0.5}),
    *(quantized(method, bits) for bits in (4, 3, 2) for method in ("int4", "int4_gptq", "int4_awq")),
    ("mixed_bits 3 on average", "mixed_bits", {"average_bits": 3.0, **GROUP}),
    ("nf4", "nf4", {}),
    *((f"{method} 50%", method, {"sparsity": 0.5}) for method in ("magnitude", "wanda", "sparsegpt")),
    *((f"{method} 2:4", method, {"sparsity": 0.5, "pattern": "2:4"}) for method in ("magnitude", "wanda", "sparsegpt")),
]
"""(label, method, settings)."""
SHARED = ("none", "int8", "int8_smoothquant", "int4", "int4_gptq", "int4_awq", "wanda", "sparsegpt")
"""Methods that llm-compressor has too."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face directory; default: one is trained (minutes)")
    parser.add_argument("--choice", default="gpt", help="the model choice that is trained: gpt or llama")
    parser.add_argument("--steps", type=int, default=1600, help="how long it is trained")
    parser.add_argument("--peers", type=Path, help="where peers/setup.py put their environments")
    parser.add_argument("--only", nargs="*", help="labels of rows, or beginnings of them")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--tokens", type=int, default=65536, help="held-out tokens")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/compression"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    model = arguments.model or trained(arguments.choice, arguments.steps, arguments.out / f"{arguments.choice}_trained")
    task = prepared(model, arguments.samples, arguments.tokens, arguments.out)
    engines = {"leanfit": [sys.executable, str(HERE / "peers" / "ours.py")]}
    if arguments.peers:
        python = arguments.peers / "llmcompressor" / "bin" / "python"
        engines["llm-compressor"] = [str(python), str(HERE / "peers" / "llmcompressor_side.py")]
    rows = []
    for label, method, settings in ROWS:
        if arguments.only and not any(label.startswith(start) for start in arguments.only):
            continue
        for engine, command in engines.items():
            if engine != "leanfit" and method not in SHARED:
                continue
            found = measure(command, {**task, "method": method, "settings": settings}, arguments.out)
            rows.append({"row": label, "engine": engine, **found})
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


def prepared(model: Path, samples: int, tokens: int, out: Path) -> dict[str, Any]:
    """Calibration windows by seed and evaluation windows, as files that every engine reads."""
    import torch

    from pipeline.app import compose
    from pipeline.calibration.settings import Calibration
    from pipeline.data.calibration import calibration_batches

    config = compose(["model=hf", f"model.pretrained='{model}'", f"data.evaluation_tokens={tokens}"])
    tokenizer = config.model.tokenizer()
    data = config.data.open(tokenizer)
    held_out = torch.stack([data.evaluation[i]["input_ids"] for i in range(len(data.evaluation))])  # type: ignore[arg-type]
    torch.save(held_out, out / "evaluation.pt")
    calibration = {}
    for seed in SEEDS:
        drawn = Calibration(
            name="settings", source="train", samples=samples, length=None, seed=seed, batch_size=samples
        )
        (batch,) = calibration_batches(drawn, data, tokenizer)
        torch.save(batch["input_ids"], out / f"calibration_{seed}.pt")
        calibration[str(seed)] = str((out / f"calibration_{seed}.pt").resolve())
    return {
        "model": str(model.resolve()), "evaluation": str((out / "evaluation.pt").resolve()), "calibration": calibration
    }  # fmt: skip


def measure(command: list[str], task: dict[str, Any], out: Path) -> dict[str, Any]:
    """One engine, one row, all seeds: medians and the spread."""
    if task["method"] in ("none", "int8", "int4", "magnitude", "nf4"):  # which look at no calibration
        task = {**task, "calibration": dict(list(task["calibration"].items())[:1])}
    (out / "task.json").write_text(json.dumps(task))
    done = subprocess.run(
        [*command, "--task", str(out / "task.json")], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parent) if "ours" in command[1] else ""},
    )  # fmt: skip
    results = [json.loads(text[7:]) for text in done.stdout.splitlines() if text.startswith("RESULT ")]
    if done.returncode or not results:
        return {"error": (done.stderr.strip().splitlines() or ["no result"])[-1][:120]}
    values = [result["perplexity"] for result in results]
    return {
        "perplexity": statistics.mean(values), "lowest": min(values), "highest": max(values),
        "seconds": statistics.median(result["seconds"] for result in results),
        "peak_bytes": max(result["peak_bytes"] for result in results), "seeds": len(results),
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    start = f"{row['row']:<24} {row['engine']:<15}"
    if "error" in row:
        return f"{start} {row['error']}"
    spread = f"({row['lowest']:.4f} to {row['highest']:.4f})" if row["seeds"] > 1 else ""
    return f"{start} {row['perplexity']:9.4f} {spread:<22} {row['seconds']:7.1f} s {row['peak_bytes'] / 1e6:7.0f} MB"


def write(rows: list[dict[str, Any]], out: Path) -> None:
    """table.csv, and table.png: by how much each row is above float32."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with (out / "table.csv").open("w", newline="") as stream:
        names = ["row", "engine", "perplexity", "lowest", "highest", "seeds", "seconds", "peak_bytes", "error"]
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        writer.writerows(rows)
    good = [row for row in rows if "error" not in row]
    dense = next((row["perplexity"] for row in good if row["row"] == "float32"), None)
    if dense is None:
        return
    labels = list(dict.fromkeys(row["row"] for row in good if row["row"] != "float32"))
    figure, axes = plt.subplots(figsize=(8, 0.34 * len(labels) + 1.2), layout="constrained")
    for engine, color, shift in (("leanfit", "#1f77b4", -0.2), ("llm-compressor", "#ff7f0e", 0.2)):
        for row in good:
            if row["engine"] == engine and row["row"] in labels:
                place = labels.index(row["row"]) + shift
                axes.barh(place, 100 * (row["perplexity"] / dense - 1), height=0.38, color=color)
                axes.plot([100 * (row[end] / dense - 1) for end in ("lowest", "highest")], [place] * 2, color="black")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xlabel(f"perplexity above float32's {dense:.2f}, % (black: three draws of calibration)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in ("#1f77b4", "#ff7f0e")]
    axes.legend(handles, ["leanfit", "llm-compressor"], loc="upper right")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(out / "table.png", dpi=120)


if __name__ == "__main__":
    main()
