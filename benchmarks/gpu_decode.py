"""Decoding and prompts at batch 1 on a GPU: tokens a second of float, quantized and 2:4 models, their kernels on and
off, in turns.

Called by `gpu.py --decode`. All models of one size and dtype are held at once, and each round decodes the same tokens
with each of them, then passes a prompt of the model's length, so that a round makes one ratio of each; the first round,
which compiles, is not counted. `operators` is the path without fused kernels (`layers/fused.py`), of the same model
object. A 2:4 model runs by sparse kernels (`layers/sparse24.py`) and, as a second model, as `nn.Linear`. How far apart
the logits of two paths are is in the table too: with random weights, what both compute is all that can be compared.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from decoding import compressed, seconds_a_token, seconds_of_a_prompt
from torch import Tensor, nn

if TYPE_CHECKING:
    from gpu import Size

METHODS = ("int8", "int8_weight_only", "int4", "nf4", "fp8")
PATHS = {"fused": None, "operators": "int_mm"}
"""What `kernels.forced` is entered with."""
SPARSE, MASKED = "2:4", "2:4, dense"
"""A model by sparse kernels, and the same as it is trained."""
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
    prompt_tokens_per_second: list[float] = field(default_factory=list)
    prompt_faster_than_float: list[float] = field(default_factory=list)
    weight_bytes: int = 0
    difference: float | None = None
    """Of the logits after the prompt and one token, from those on the other path: norms."""
    rounds: int = 0
    error: str | None = None


def built(size: Size, dtype: torch.dtype, device: str) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The float model and its compressed forms on `device`, by name; and why any of them is not there."""
    from pipeline.composing import compose
    from pipeline.data.base import DataSpec

    torch.manual_seed(0)
    spec = DataSpec(vocabulary=size.vocabulary, sequence_length=size.length)
    dense = compose(list(size.words)).model.build(spec).eval().to(device, dtype)
    models, errors = {"float": dense}, {}
    for name in METHODS:
        try:
            models[name] = compressed(dense, name, device)
        except Exception as error:
            traceback.print_exc()
            errors[name] = f"{type(error).__name__}: {error}"
    try:
        models[MASKED], models[SPARSE] = two_of_four(dense, device)
    except Exception as error:
        traceback.print_exc()
        errors[SPARSE] = f"{type(error).__name__}: {error}"
    return models, errors


def two_of_four(dense: nn.Module, device: str) -> tuple[nn.Module, nn.Module]:
    """`dense` pruned 2:4: as it is trained, and as its artifact is opened."""
    from pipeline.layers.sparse24 import use_kernels
    from pipeline.layers.sparsity import masked_layers

    masked = compressed(dense, "magnitude", device, "pattern=2:4", "sparsity=null", "steps=0").requires_grad_(False)
    layers = [name for name, _ in masked_layers(masked)]
    for name in layers:
        del masked.get_submodule(name).weight_mask
    return masked, use_kernels(copy.deepcopy(masked), layers)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all that the layers of `model` hold."""
    from pipeline.layers.sparse24 import sparse_layers
    from pipeline.memory.measure import storage_bytes

    forms = [layer.form for layer in sparse_layers(model).values() if layer.form is not None]
    return storage_bytes([*model.parameters(), *model.buffers(), *forms])


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
    from pipeline.layers.sparse24 import sparse_layers

    rows = []
    for name, model in models.items():
        paths: dict[str, str | None] = PATHS if name in METHODS else {"sparse" if name == SPARSE else "nn.Linear": None}
        for path, forced in paths.items():
            with kernels.forced(forced):
                layers = {**quantized_layers(model), **sparse_layers(model)}
                found = Counter(layer.kernel for layer in layers.values())
            rows.append(Row(size.label, dtype, name, path, dict(found), weight_bytes=weight_bytes(model)))
    return rows


def timed(rows: list[Row], models: dict[str, nn.Module], ids: Tensor, tokens: int, rounds: int, until: float) -> None:
    """Fills `rows`, in turns; the first is the float model's. `ids` [1, length] is the prompt; decoding follows its
    first `PROMPT` tokens."""
    from pipeline.layers import kernels

    a_token: list[list[float]] = [[] for _ in rows]
    a_prompt: list[list[float]] = [[] for _ in rows]
    for turn in range(rounds + 1):
        if turn > 1 and time.time() > until:
            break
        for place, row in enumerate(rows):
            with kernels.forced(PATHS.get(row.path)):
                decoded = seconds_a_token(models[row.weights], ids[:, :PROMPT], tokens)
                passed = seconds_of_a_prompt(models[row.weights], ids)
            if turn:
                a_token[place].append(decoded)
                a_prompt[place].append(passed)
    for row, token, prompt in zip(rows, a_token, a_prompt, strict=True):
        row.rounds = len(token)
        row.tokens_per_second = spread([1 / value for value in token])
        row.faster_than_float = spread([dense / value for dense, value in zip(a_token[0], token, strict=True)])
        row.prompt_tokens_per_second = spread([ids.shape[1] / value for value in prompt])
        row.prompt_faster_than_float = spread([dense / value for dense, value in zip(a_prompt[0], prompt, strict=True)])


def spread(values: list[float]) -> list[float]:
    """Median, lowest, highest."""
    return [statistics.median(values), min(values), max(values)]


def compared(rows: list[Row], models: dict[str, nn.Module], prompt: Tensor) -> None:
    """Fills in how far apart the two paths of each compressed model are."""
    from pipeline.layers import kernels

    found: dict[str, list[Tensor]] = {}
    for row in rows:
        with kernels.forced(PATHS.get(row.path)):
            name = SPARSE if row.weights == MASKED else row.weights
            found.setdefault(name, []).append(logits_of_a_token(models[row.weights], prompt))
    for row in rows:
        if len(paths := found.get(row.weights, [])) == 2:
            row.difference = float((paths[0] - paths[1]).norm() / paths[1].norm())


def text_of(row: Row) -> str:
    """A line of the table."""
    if row.error:
        return f"{row.model}, {row.dtype}, {row.weights}: {row.error}"
    speed, ratio = row.tokens_per_second, row.faster_than_float
    passed, gain = row.prompt_tokens_per_second, row.prompt_faster_than_float
    difference = "" if row.difference is None else f"; paths differ by {row.difference:.1e}"
    return (
        f"{row.model}, {row.dtype:<8} {row.weights:<16} {row.path:<9} {speed[0]:7.1f} tokens/s "
        f"({speed[1]:.1f}-{speed[2]:.1f}), {ratio[0]:.2f} times float ({ratio[1]:.2f}-{ratio[2]:.2f}); "
        f"prompt {passed[0]:,.0f} tokens/s, {gain[0]:.2f} times float ({gain[1]:.2f}-{gain[2]:.2f}); "
        f"{row.weight_bytes / 1e6:,.1f} MB, {row.rounds} rounds{difference}; {row.kernels}"
    )


def measure(sizes: list[Size], device: str, tokens: int, rounds: int, until: float) -> list[dict[str, Any]]:
    """All rows, as JSON; each is printed as it comes. After the time `until` no round is begun."""
    rows: list[Row] = []
    for size in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            label = str(dtype).removeprefix("torch.")
            models, errors = built(size, dtype, device)
            came = sides(size, label, models)
            ids = torch.randint(size.vocabulary, (1, size.length), generator=torch.Generator().manual_seed(0)).to(
                device
            )
            try:
                compared(came, models, ids[:, :PROMPT])
                timed(came, models, ids, tokens, rounds, until)
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
