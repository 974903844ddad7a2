"""What cross-entropy over a vocabulary costs: ours in slices, as torch has it, compiled, and torchtune's in chunks.

    python benchmarks/loss.py [--rows 2048 --rounds 7]
    pip install torchtune   # in an environment of its own: its row is there where it can be imported

Forward and backward of the loss alone, given the logits. Every way is measured once for its peak (bytes a logit, the
logits themselves included) and then takes a turn in each round; a ratio is that of a round, its median and range are
printed. torchtune's is given the logits in 8 chunks, its default, as its models make them.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from pipeline.layers.sliced_loss import cross_entropy, whole_cross_entropy
from pipeline.memory.measure import measure_peak
from pipeline.trainer.compiling import compiled_criterion

CHUNKS = 8


def ways() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Each a mean over targets [N] under logits [N, V]."""
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "torch": whole_cross_entropy,
        "in slices": cross_entropy,
        "compiled": compiled_criterion(),
    }
    if importlib.util.find_spec("torchtune"):
        from torchtune.modules.loss import CEWithChunkedOutputLoss

        theirs = CEWithChunkedOutputLoss(CHUNKS)
        found["torchtune"] = lambda logits, targets: theirs(
            list(logits.unsqueeze(0).chunk(CHUNKS, dim=1)), targets.unsqueeze(0)
        )
    return found


def measured(rows: int, vocabulary: int, dtype: torch.dtype, rounds: int) -> Iterator[str]:
    """A line of the table for each way."""
    torch.manual_seed(0)
    logits = torch.randn(rows, vocabulary).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (rows,))

    def seconds(way: Callable[[Tensor, Tensor], Tensor]) -> float:
        started = time.process_time()
        way(logits, targets).backward()  # type: ignore[no-untyped-call]
        logits.grad = None
        return time.process_time() - started

    chosen, peaks = ways(), {}
    for name, way in chosen.items():
        seconds(way)
        with measure_peak("cpu", [logits, targets]) as peak:
            seconds(way)
        peaks[name] = peak.bytes / logits.numel()
    turns = [{name: seconds(way) for name, way in chosen.items()} for _ in range(rounds)]
    for name, peak_bytes in peaks.items():
        took = statistics.median(turn[name] for turn in turns)
        ratios = sorted(turn[name] / turn["torch"] for turn in turns)
        what = f"{rows} x {vocabulary}, {str(dtype).removeprefix('torch.')}"
        yield (
            f"| {name} | {what} | {peak_bytes:.1f} | {1e3 * took:.1f} "
            f"| {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print("| | logits | bytes a logit at the peak | ms | its time / torch's |\n|---|---|---|---|---|")
    for vocabulary in (256, 8192, 50257):
        for dtype in (torch.float32, torch.bfloat16):
            for line in measured(arguments.rows, vocabulary, dtype, arguments.rounds):
                print(line, flush=True)


if __name__ == "__main__":
    main()
