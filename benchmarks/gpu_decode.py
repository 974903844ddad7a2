"""Decoding at batch 1 on a GPU: tokens a second of float and quantized models, fused kernels on and off, in turns.

Called by `gpu.py --decode`. All models of one size and dtype are held at once, and each round decodes the same tokens
with each of them, so that a round makes one ratio; the first round, which compiles, is not counted. `operators` is the
path without fused kernels (`layers/fused.py`), of the same model object. How far its logits are from those of the fused
path is in the table too: with random weights, what both compute is all that can be compared.
"""

from __future__ import annotations

import json
import statistics
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from decoding import quantized, seconds_a_token
from torch import Tensor, nn

if TYPE_CHECKING:
    from gpu import Size

METHODS = ("int8", "int8_weight_only", "int4", "nf4", "fp8")
PATHS = {"fused": None, "operators": "int_mm"}
"""What `kernels.forced` is entered with."""
PROMPT = 16


@dataclass
class Row:
    """One model on one path, over all rounds: median, lowest and highest."""

    model: str
    dtype: str
    weights: str
    path: str
    kernels: dict[str, int] = field(default_factory=dict)
    tokens_per_second: list[float] = field(default_factory=list)
    faster_than_float: list[float] = field(default_factory=list)
    """Beside the float model of the same dtype in the same round."""
    difference: float | None = None
    """Of the logits after the prompt and one token, from those on the other path: norms."""
    rounds: int = 0
    error: str | None = None


def built(size: Size, dtype: torch.dtype, device: str) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The float model and its quantized forms on `device`, by name; and why any of them is not there."""
    from pipeline.app import compose
    from pipeline.data.base import DataSpec

    torch.manual_seed(0)
    spec = DataSpec(vocabulary=size.vocabulary, sequence_length=size.length)
    dense = compose(list(size.words)).model.build(spec).eval().to(device, dtype)
    models, errors = {"float": dense}, {}
    for name in METHODS:
        try:
            models[name] = quantized(dense, name, device)
        except Exception as error:
            traceback.print_exc()
            errors[name] = f"{type(error).__name__}: {error}"
    return models, errors


@torch.inference_mode()
def logits_of_a_token(model: nn.Module, prompt: Tensor) -> Tensor:
    """Of one token after the prompt, which is decoded alone."""
    from pipeline.layers.decoding import decode

    _, cache = decode(model, prompt[:, :-1])
    return decode(model, prompt[:, -1:], cache)[0].double()


def sides(size: Size, dtype: str, models: dict[str, nn.Module]) -> list[Row]:
    """A row for each model and path that will be timed, with what runs in it."""
    from pipeline.layers import kernels
    from pipeline.layers.quantized import quantized_layers

    rows = []
    for name, model in models.items():
        for path, forced in PATHS.items() if name != "float" else [("nn.Linear", None)]:
            with kernels.forced(forced):
                found = Counter(layer.kernel for layer in quantized_layers(model).values())
            rows.append(Row(size.label, dtype, name, path, dict(found)))
    return rows


def timed(
    rows: list[Row], models: dict[str, nn.Module], prompt: Tensor, tokens: int, rounds: int, until: float
) -> None:
    """Fills `rows`, in turns; the first is the float model's."""
    from pipeline.layers import kernels

    seconds: list[list[float]] = [[] for _ in rows]
    for turn in range(rounds + 1):
        if turn > 1 and time.time() > until:
            break
        for row, spent in zip(rows, seconds, strict=True):
            with kernels.forced(PATHS.get(row.path)):
                value = seconds_a_token(models[row.weights], prompt, tokens)
            if turn:
                spent.append(value)
    for row, spent in zip(rows, seconds, strict=True):
        row.rounds = len(spent)
        row.tokens_per_second = spread([1 / value for value in spent])
        row.faster_than_float = spread([dense / value for dense, value in zip(seconds[0], spent, strict=True)])


def spread(values: list[float]) -> list[float]:
    """Median, lowest, highest."""
    return [statistics.median(values), min(values), max(values)]


def compared(rows: list[Row], models: dict[str, nn.Module], prompt: Tensor) -> None:
    """Fills in how far apart the two paths of each quantized model are."""
    from pipeline.layers import kernels

    for name, model in models.items():
        found = []
        for forced in PATHS.values():
            with kernels.forced(forced):
                found.append(logits_of_a_token(model, prompt))
        for row in rows:
            if row.weights == name != "float":
                row.difference = float((found[0] - found[1]).norm() / found[1].norm())


def text_of(row: Row) -> str:
    """A line of the table."""
    if row.error:
        return f"{row.model}, {row.dtype}, {row.weights}: {row.error}"
    speed, ratio = row.tokens_per_second, row.faster_than_float
    difference = "" if row.difference is None else f"; paths differ by {row.difference:.1e}"
    return (
        f"{row.model}, {row.dtype:<8} {row.weights:<16} {row.path:<9} {speed[0]:7.1f} tokens/s "
        f"({speed[1]:.1f}-{speed[2]:.1f}), {ratio[0]:.2f} times float ({ratio[1]:.2f}-{ratio[2]:.2f}), "
        f"{row.rounds} rounds{difference}; {row.kernels}"
    )


def measure(sizes: list[Size], device: str, tokens: int, rounds: int, until: float) -> list[dict[str, Any]]:
    """All rows, as JSON; each is printed as it comes. After the time `until` no round is begun."""
    rows: list[Row] = []
    for size in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            label = str(dtype).removeprefix("torch.")
            models, errors = built(size, dtype, device)
            came = sides(size, label, models)
            prompt = torch.randint(size.vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(device)
            try:
                compared(came, models, prompt)
                timed(came, models, prompt, tokens, rounds, until)
            except Exception as error:
                traceback.print_exc()
                for row in came:
                    row.error = f"{type(error).__name__}: {error}"
            came += [Row(size.label, label, name, "", error=error) for name, error in errors.items()]
            print(*map(text_of, came), sep="\n", flush=True)
            rows += came
            del models
            if device == "cuda":
                torch.cuda.empty_cache()
    return [asdict(row) for row in rows]


def written(rows: list[dict[str, Any]], about: dict[str, Any], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"machine": about, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    print(f"written to {target}")
