"""What both sides of a comparison share: one evaluation, one training loop, one clock, one measure of memory.

Each engine runs in its own virtual environment as `python SCRIPT --task FILE`; the task names a model directory, files
of calibration, training and evaluation batches, and a method with its settings. A batch is a dict of tensors: token ids
[N, T], or images and labels. Torch and transformers only. It prints one JSON line a draw, and before each waits for a
line on standard input, so that engines can take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import nn
from torch.nn import functional

Batch = dict[str, torch.Tensor]
EVALUATION_BATCH = 32


@dataclass(frozen=True)
class Draw:
    """What a method may look at: `calibration`, and for methods that train `training` rows in their order."""

    calibration: Batch
    training: Batch
    steps: int
    lr: float
    batch_size: int


Compress = Callable[[nn.Module, Draw], nn.Module]
Save = Callable[[nn.Module, Path], None]


def split(batch: Batch, size: int) -> Iterator[Batch]:
    """`batch` in parts of `size` rows."""
    length = len(next(iter(batch.values())))
    return ({name: rows[start : start + size] for name, rows in batch.items()} for start in range(0, length, size))


def losses(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(nats of each prediction, whether it was right): tokens but the first of a window, or images."""
    if "labels" in batch:
        logits, labels = model(pixel_values=batch["pixel_values"]).logits, batch["labels"]
    else:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].flatten(0, 1)
        labels = batch["input_ids"][:, 1:].flatten()
    return functional.cross_entropy(logits.float(), labels, reduction="none"), logits.argmax(-1) == labels


def quality(model: nn.Module, evaluation: Batch) -> dict[str, float]:
    """{"perplexity", "accuracy"}: of tokens WikiText's protocol, windows that do not overlap."""
    model.eval()
    nats, right, count = 0.0, 0, 0
    with torch.no_grad():
        for batch in split(evaluation, EVALUATION_BATCH):
            found, hits = losses(model, batch)
            nats, right, count = nats + float(found.sum()), right + int(hits.sum()), count + len(found)
    return {"perplexity": float(torch.tensor(nats / count).exp()), "accuracy": right / count}


def fit(model: nn.Module, draw: Draw) -> None:
    """`draw.steps` steps of AdamW on the training rows in order, the rate falling to 0 in a straight line."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=draw.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / draw.steps)
    for step, batch in zip(range(draw.steps), split(draw.training, draw.batch_size), strict=False):
        loss = losses(model, batch)[0].mean()
        assert torch.isfinite(loss), f"training diverged at step {step}"
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def measured(work: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, float]]:
    """(what `work` gives, seconds, processor seconds, bytes by which the resident set rose at its highest).

    Bytes and seconds are for different processes: what was freed stays resident as long as the allocator likes, unless
    it is told not to, and that costs time.
    """
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest mark so far
    before = resident("VmRSS")
    started, processor = time.perf_counter(), time.process_time()
    made = work()
    spent = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - processor}
    return made, {**spent, "peak_bytes": resident("VmHWM") - before}


def save_state(model: nn.Module, directory: Path) -> None:
    """As the documentation of torchao and torch-pruning does."""
    torch.save(model.state_dict(), directory / "model.pt")


def run(prepare: Callable[[str, dict[str, Any], nn.Module], Compress], save: Save | None = None) -> None:
    """`prepare(method, settings, model)`, which imports and reads configs, then what it gives, measured, by draw.

    `save(model, directory)` writes the result as this engine does; the files' bytes are counted.
    """
    import transformers

    parser = argparse.ArgumentParser()
    parser.add_argument("--task", type=Path, required=True)
    task = json.loads(parser.parse_args().task.read_text())
    evaluation: Batch = torch.load(task["evaluation"], weights_only=True)
    auto = "AutoModelForImageClassification" if "labels" in evaluation else "AutoModelForCausalLM"
    for seed, path in task["draws"].items():
        sys.stdin.readline()
        drawn = torch.load(path, weights_only=True)
        draw = Draw(drawn["calibration"], drawn["training"], **task["fit"])
        model = getattr(transformers, auto).from_pretrained(task["model"], dtype=torch.float32)
        quality(model, next(split(evaluation, 2)))  # what a first call allocates is no method's
        compress = prepare(task["method"], dict(task["settings"]), model)
        torch.manual_seed(int(seed))
        made, found = measured(lambda work=compress, model=model, draw=draw: work(model, draw))  # type: ignore[misc]
        line: dict[str, Any] = {"seed": int(seed), **found}
        if not task["measure_memory"]:
            line |= quality(made, evaluation)
            if save is not None:
                with tempfile.TemporaryDirectory() as directory:
                    save(made, Path(directory))
                    line["saved_bytes"] = sum(file.stat().st_size for file in weight_files(Path(directory)))
            if task["recover"]:
                fit(made, draw)
                line |= {
                    "recovered": quality(made, evaluation),
                    "parameters": sum(p.numel() for p in made.parameters()),
                }
        print("RESULT " + json.dumps(line), flush=True)


def weight_files(directory: Path) -> list[Path]:
    """Files of weights: leanfit's sample of inputs and outputs is none."""
    endings = (".safetensors", ".bin", ".pt")
    return [file for file in directory.rglob("*") if file.suffix in endings and file.stem != "probe"]
