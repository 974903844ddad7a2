"""What the runner costs: seconds of a training step inside `pipeline.fitting.fit` against a bare PyTorch loop.

Same model, same optimizer, same batches, same clipping and schedule, in one process, in turns (A B A B ...). A step is
timed from batch to batch, so data loading counts on both sides; the median step of each round makes one ratio.

    python benchmarks/overhead.py                     # nano and a model of 12M parameters
    python benchmarks/overhead.py --rounds 7 --steps 40
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline import environment

environment.prepare()

import lightning.pytorch as lightning
import torch

from pipeline.chain import Fit, Stage
from pipeline.composing import compose
from pipeline.data.loader import train_loader
from pipeline.fitting import fit
from pipeline.models.architecture import describe
from pipeline.tasks import lookup

SIZES = {
    "nano, 0.1M parameters": ["model=gpt_nano"],
    "12M parameters": ["model.layers=6", "model.width=384", "model.heads=6", "trainer.batch_size=8"],
}


class StepTimes(lightning.Callback):
    """The moments at which optimizer steps end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())


def median_step(ends: list[float]) -> float:
    """Median seconds between ends, the first quarter left out as warm-up."""
    steps = [after - before for before, after in itertools.pairwise(ends)]
    return statistics.median(steps[len(steps) // 4 :])


def bare(config: Any, data: Any, steps: int) -> float:
    """The loop one would write by hand."""
    torch.manual_seed(0)
    model, task = config.model.build(data.spec).train(), lookup.get(config.data.task)
    optimizer = config.optimizer.build(model, config.optimizer.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: config.optimizer.factor(step, steps))
    batches = iter(train_loader(data.train, batch_size=config.trainer.batch_size, seed=0))
    ends = []
    for _ in range(steps):
        batch = next(batches)
        loss = task.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.trainer.grad_clip)
        optimizer.step()
        schedule.step()
        ends.append(time.perf_counter())
    return median_step(ends)


def ours(config: Any, data: Any, steps: int) -> float:
    """The same through the runner, with its callbacks: metrics, memory measurement, checkpoint at the end."""
    torch.manual_seed(0)
    model, times = config.model.build(data.spec), StepTimes()
    stage = Stage(0, "train", "train", fit=Fit(steps, config.optimizer.lr))
    task = lookup.get(config.data.task)
    with tempfile.TemporaryDirectory() as directory:
        fit(config, stage, model, task, data, describe(model), Path(directory), callbacks=[times])
    return median_step(times.ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, overrides in SIZES.items():
        config = compose([*overrides, "trainer.checkpoint_every=100000", "trainer.evaluate_every=0", "device=cpu"])
        data = config.data.open(config.model.tokenizer())
        pairs = [
            (bare(config, data, arguments.steps), ours(config, data, arguments.steps)) for _ in range(arguments.rounds)
        ]
        ratios = sorted(after / before for before, after in pairs)
        typical = statistics.median(before for before, _ in pairs)
        print(
            f"{name}: bare {1e3 * typical:.1f} ms a step; runner / bare median {statistics.median(ratios):.3f}"
            f" (from {ratios[0]:.3f} to {ratios[-1]:.3f} over {len(ratios)} rounds)"
        )


if __name__ == "__main__":
    main()
