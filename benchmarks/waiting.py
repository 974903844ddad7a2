"""Why the program sets OMP_WAIT_POLICY=PASSIVE: a training step with threads that spin and threads that sleep.

Each setting is measured in a process of its own, in turns, once on the machine as it is and once with another process
that keeps one core busy.

    python benchmarks/waiting.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEP = """
import time
from pipeline.app import compose
from pipeline.data.loader import train_loader
from pipeline.tasks import lookup
config = compose(["model=gpt_nano", "device=cpu"])
data = config.data.open(config.model.tokenizer())
model, task = config.model.build(data.spec).train(), lookup.get("causal_lm")
optimizer = config.optimizer.build(model, 1e-3)
batches, spent = iter(train_loader(data.train, batch_size=16, seed=0)), []
for _ in range(12):
    start = time.perf_counter()
    loss = task.loss(model, next(batches))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    spent.append(time.perf_counter() - start)
print(sorted(spent[2:])[5])
"""


def step(policy: str) -> float:
    """Median seconds of a training step of gpt_nano in a fresh process."""
    environment = {**os.environ, "OMP_WAIT_POLICY": policy, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", STEP], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    for busy in (False, True):
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
        try:
            pairs = [(step("ACTIVE"), step("PASSIVE")) for _ in range(rounds)]
        finally:
            if other is not None:
                other.kill()
                other.wait()
        ratios = sorted(active / passive for active, passive in pairs)
        name = "one core busy" if busy else "nothing else started"
        print(
            f"{name}: sleeping {1e3 * pairs[0][1]:.0f} ms a step; spinning / sleeping "
            f"median {statistics.median(ratios):.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
