"""What both sides of a comparison share: one evaluation, one clock, one measure of memory. Torch and transformers only.

Each engine runs in its own virtual environment as `python SCRIPT --task FILE`; the task names a model directory,
tensors of calibration and evaluation windows, and a method with its settings. It prints one JSON line a seed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import nn


def perplexity(model: nn.Module, windows: torch.Tensor, batch_size: int = 32) -> float:
    """WikiText's protocol: exp of the mean nats a predicted token, over windows [N, T] that do not overlap."""
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(windows), batch_size):
            ids = windows[start : start + batch_size]
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            total += float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
            count += ids[:, 1:].numel()
    return float(torch.tensor(total / count).exp())


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def measured(work: Callable[[], nn.Module]) -> tuple[nn.Module, float, int]:
    """(what `work` gives, seconds, bytes by which the resident set rose at its highest)."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest mark so far
    before = resident("VmRSS")
    started = time.perf_counter()
    made = work()
    return made, time.perf_counter() - started, resident("VmHWM") - before


Compress = Callable[[nn.Module, torch.Tensor], nn.Module]
"""(model, calibration [N, T]) -> the compressed model."""


def run(prepare: Callable[[str, dict[str, Any], nn.Module], Compress]) -> None:
    """`prepare(method, settings, model)`, which imports and reads configs, then what it gives, measured, by seed."""
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser()
    parser.add_argument("--task", type=Path, required=True)
    task = json.loads(parser.parse_args().task.read_text())
    evaluation = torch.load(task["evaluation"], weights_only=True)
    for seed, path in task["calibration"].items():
        calibration = torch.load(path, weights_only=True)
        model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32)
        perplexity(model, evaluation[:2])  # what a first call allocates is no method's
        compress = prepare(task["method"], dict(task["settings"]), model)
        made, seconds, peak = measured(lambda work=compress, model=model, rows=calibration: work(model, rows))
        line = {"seed": int(seed), "seconds": seconds, "peak_bytes": peak, "perplexity": perplexity(made, evaluation)}
        print("RESULT " + json.dumps(line), flush=True)
