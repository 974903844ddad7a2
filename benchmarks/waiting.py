"""How long torch's threads spin while they wait for one another: GOMP_SPINCOUNT as the program sets it, against
sleeping at once and spinning all the time.

A step of training and int8 decoding at batch 1, each setting in a process of its own, in turns, once on the machine as
it is and once with another process that keeps one core busy.

    python benchmarks/waiting.py
    python benchmarks/waiting.py --rounds 5 --counts 1000 10000 100000
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.environment import DEFAULTS

STEP = """
import time
from pipeline.composing import compose
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
DECODE = """
import torch
from benchmarks.decoding import compressed, seconds_a_token
from pipeline.composing import compose
from pipeline.data.base import DataSpec
model = compose(["model=gpt_124m"]).model.build(DataSpec(vocabulary=256, sequence_length=128)).eval()
model, prompt = compressed(model, "int8", "cpu"), torch.randint(0, 256, (1, 16))
print(sorted(seconds_a_token(model, prompt, 12) for _ in range(6))[2])
"""
WORK = {"a step of training gpt_nano": STEP, "a token of int8 at width 768": DECODE}


def seconds(code: str, variables: dict[str, str]) -> float:
    """What `code` prints, run with the environment variables in a fresh process."""
    own = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment = {**own, **variables, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--counts", type=int, nargs="+", default=[int(DEFAULTS["GOMP_SPINCOUNT"])])
    arguments = parser.parse_args()
    settings = {
        "sleeping at once": {"OMP_WAIT_POLICY": "PASSIVE"},
        **{
            f"{count} turns": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": str(count)} for count in arguments.counts
        },
        "spinning": {"OMP_WAIT_POLICY": "ACTIVE"},
    }
    for busy in (False, True):
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
        try:
            for what, code in WORK.items():
                rounds = [
                    [seconds(code, variables) for variables in settings.values()] for _ in range(arguments.rounds)
                ]
                print(f"{what}, {'one core busy' if busy else 'nothing else started'}:")
                for place, name in enumerate(settings):
                    ratios = sorted(spent[0] / spent[place] for spent in rounds)
                    print(
                        f"  {name:<18} {1e3 * statistics.median(spent[place] for spent in rounds):7.1f} ms; as fast as "
                        f"sleeping at once by {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
                    )
        finally:
            if other is not None:
                other.kill()
                other.wait()


if __name__ == "__main__":
    main()
