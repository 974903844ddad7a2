"""Decoding at batch 1: float32 against quantized weights, in one process, in turns.

The model is a GPT of random weights: speed does not depend on what they are. Each round decodes the same tokens with
each model; a round makes one ratio. Threads: one, and as many as torch takes here, one after the other, since they wait
for one another at each of some 50 products a token.

    python benchmarks/cpu_decode.py
    python benchmarks/cpu_decode.py --layers 6 --width 2048 --rounds 9 --threads 1 2 4 --only int4 nf4
"""

from __future__ import annotations

import argparse
import os
import statistics

from pipeline import environment

environment.prepare()  # as the program does, before torch is there

import torch
from decoding import compressed, seconds_a_token
from torch import nn

from pipeline.composing import compose
from pipeline.data.base import DataSpec
from pipeline.layers import kernels

NEW_TOKENS = 24
CASES: dict[str, tuple[str, ...]] = {
    "int8": ("int8",),
    "int8_weight_only": ("int8_weight_only",),
    "int4": ("int4",),
    "int4, 3 bits": ("int4", "bits=3"),
    "int4, 2 bits": ("int4", "bits=2"),
    "int4, 8 bits": ("int4", "bits=8"),
    "int4, zero points": ("int4", "symmetric=false"),
    "nf4": ("nf4",),
    "fp8": ("fp8",),
}
"""By what is printed: the choice of compression, and its settings."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = f"{arguments.layers} layers of width {arguments.width}"
    wide = (f"model.width={arguments.width}", f"model.heads={arguments.width // 64}")
    base = compose(["model=gpt_124m", f"model.layers={arguments.layers}", *wide])
    torch.manual_seed(0)
    dense = base.model.build(DataSpec(vocabulary=256, sequence_length=128)).eval()
    models: dict[str, nn.Module] = {"float32": dense.to(device)}
    for name in arguments.only:
        models[name] = compressed(models["float32"], CASES[name][0], device, *CASES[name][1:])
    prompt = torch.randint(0, 256, (1, 16), device=device)
    print(
        f"torch {torch.__version__}, {device}, {torch.backends.cpu.get_cpu_capability()}, int8 kernel "
        f"{kernels.choose(torch.device(device), torch.float32, 1)}, {sizes}"
    )
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        compare(models, prompt, arguments.rounds)


def compare(models: dict[str, nn.Module], prompt: torch.Tensor, rounds: int) -> None:
    """Print seconds a token of each model, and the ratios of each to the first."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            spent = seconds_a_token(model, prompt, NEW_TOKENS)
            if turn:  # the first warms up
                seconds[name].append(spent)
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    for name, values in seconds.items():
        ratios = sorted(slow / fast for slow, fast in zip(seconds["float32"], values, strict=True))
        print(
            f"{name:<18} {1e3 * statistics.median(values):6.2f} ms a token; faster than float32 by median "
            f"{statistics.median(ratios):.2f}x (from {ratios[0]:.2f} to {ratios[-1]:.2f} over {len(ratios)} rounds)"
        )


if __name__ == "__main__":
    main()
