"""What `job=fit` chooses beside the best of an exhaustive search, at budgets that bind.

Every config of a small grid (checkpointing x micro batch x chunks of the loss x kernels of AdamW) is trained for some
steps: its measured peak, and its seconds a step, the quickest of all in two rounds. The best at a budget is the
quickest whose measured peak is within. What fit chooses, by prediction alone and with its own timing, is timed in the
same rounds; the four best at each budget and what was chosen are timed again, in many more. Time is processor time of
one thread, so that other programs on the machine count as little as can be.

    python benchmarks/fit.py [--model gpt] [--rounds 2]
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

from pipeline import environment

environment.prepare()

from pipeline.composing import compose
from pipeline.fitting import fit
from pipeline.planner import speed, timing
from pipeline.planner.fit_search import Search
from pipeline.planner.search import command
from pipeline.report.progress import Progress
from pipeline.report.result import new_result
from pipeline.schema import RunConfig
from pipeline.stage_input import prepared
from pipeline.tasks import lookup
from pipeline.walk import stages_of

GRID = {
    "memory.activation_checkpointing": ["none", "selective", "full"],
    "trainer.micro_batch_size": ["12", "4", "1"],
    "memory.loss_chunks": ["1", "4"],
    "optimizer.implementation": ["fused", "foreach"],
}
BUDGETS = (0.8, 0.5, 0.3, 0.22)
"""Of the largest measured peak."""


def peak(config: RunConfig, directory: Path) -> int:
    """Measured, over two warm steps of the fit."""
    short = replace(config.trainer, max_steps=4, evaluate_every=0, checkpoint_every=100)
    config = replace(config, trainer=short)
    line, tokenizer = stages_of(config), config.model.tokenizer()
    data = config.data.open(tokenizer)
    model, context = prepared(config, directory, data, tokenizer, line, line[0])
    found = fit(config, line[0], model, lookup.get(config.data.task), data, context.architecture, directory).peak_bytes
    assert found is not None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--again", type=int, default=16, help="rounds for each budget's contenders")
    arguments = parser.parse_args()
    speed.now = time.process_time
    base = [f"model={arguments.model}", "device=cpu", "trainer.evaluate_every=0", "plan.calibrate=false"]
    config = compose(base)
    data = config.data.open(config.model.tokenizer())
    task = lookup.get(config.data.task)
    grid = [
        tuple(f"{key}={value}" for key, value in zip(GRID, values, strict=True))
        for values in itertools.product(*GRID.values())
    ]
    peaks: dict[tuple[str, ...], int] = {}
    seconds: dict[tuple[str, ...], float] = {}
    with tempfile.TemporaryDirectory() as place:
        for number, changes in enumerate(grid):
            peaks[changes] = peak(compose([*base, *changes]), Path(place) / str(number))
        largest = max(peaks.values())
        chosen: dict[tuple[float, int], tuple[str, ...]] = {}
        for share, measure in itertools.product(BUDGETS, (0, 3)):
            asked = [*base, "job=fit", f"budget={int(share * largest)}", f"fit.measure={measure}"]
            started = time.perf_counter()
            try:
                search = Search(compose(asked), Path(place), new_result("fit", [], {}), Progress({}, "silent"))
                found = search.run()
            except Exception as error:
                print(f"budget {share:.2f}, measure {measure}: {error}", flush=True)
                continue
            chosen[share, measure] = found.best.candidate.changes
            print(f"budget {share:.2f}, measure {measure}: {time.perf_counter() - started:.0f} s", flush=True)
        every = [*grid, *dict.fromkeys(chosen.values())]
        for _ in range(arguments.rounds):
            for changes in every:
                took = timing.measured(compose(command(base, changes)), data, task)
                seconds[changes] = min(took, seconds.get(changes, took))
        for number, changes in enumerate(every):
            if changes not in peaks:
                peaks[changes] = peak(compose(command(base, changes)), Path(place) / f"chosen-{number}")
        contenders = dict.fromkeys(chosen.values())
        for share in BUDGETS:
            within = [one for one in grid if peaks[one] <= share * largest]
            contenders |= dict.fromkeys(sorted(within, key=lambda one: seconds[one])[:4])
        again: dict[tuple[str, ...], list[float]] = {changes: [] for changes in contenders}
        for _, (changes, times) in itertools.product(range(arguments.again), again.items()):
            times.append(timing.measured(compose(command(base, changes)), data, task))
        seconds |= {changes: min(times) for changes, times in again.items() if times}
    for changes in grid:
        print(f"{peaks[changes] / 1e6:8.1f} MB {seconds[changes] * 1e3:8.1f} ms  {' '.join(changes)}")
    for (share, measure), changes in chosen.items():
        budget = share * largest
        within = [one for one in grid if peaks[one] <= budget and one in contenders]
        best = min(within, key=lambda one: seconds[one]) if within else None
        ratio = seconds[best] / seconds[changes] if best else float("nan")
        print(
            f"budget {budget / 1e6:6.1f} MB, fit.measure={measure}: {ratio:.3f} of the best's throughput; "
            f"{seconds[changes] * 1e3:.1f} ms, {peaks[changes] / 1e6:.1f} MB ({' '.join(changes) or 'as typed'}); "
            f"best {seconds[best] * 1e3 if best else 0:.1f} ms ({' '.join(best or ())})"
        )


if __name__ == "__main__":
    main()
