"""Seconds until the program answers: `--cfg job`, a typing mistake, `--help`, against importing what a run needs.

python benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "python itself": [sys.executable, "-c", "pass"],
    "--cfg job": [sys.executable, "run.py", "--cfg", "job"],
    "a mistake (compresion=int8)": [sys.executable, "run.py", "compresion=int8"],
    "--help": [sys.executable, "run.py", "--help"],
    "import hydra": [sys.executable, "-c", "import hydra"],
    "import torch, lightning, transformers' OPT": [
        sys.executable,
        "-c",
        "import torch, lightning.pytorch; from transformers import OPTForCausalLM",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
            seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        counted = values[1:]  # the first fills the file cache
        print(f"{name:<44} median {statistics.median(counted):.2f} s (from {min(counted):.2f} to {max(counted):.2f})")


if __name__ == "__main__":
    main()
