"""Training on one GPU: tokens a second, MFU and peak memory, through the runner, by a bare PyTorch loop, nanoGPT's way.

A GPT-2 of 124M parameters and a Llama of 1.1B, random tokens, in bf16-mixed, bf16-true and fp8-mixed, compiled and not.
`runner` is the program's own fit, with its metrics, checks and memory measurement; `bare` is the loop one would write
by hand around the same model, loss, optimizer, clipping and schedule; `nanogpt` is a plain GPT-2 in the style of that
project (one product for queries, keys and values, autocast, fused AdamW, the whole model compiled). Each model and
precision has a process of its own, in which the sides take turns; a row that fails says why and the rest go on.

    python benchmarks/gpu.py                        # one call, under 10 minutes on an H100 or H200
    python benchmarks/gpu.py --decode               # decoding instead, compressed and not (gpu_decode.py); 5 minutes
    python benchmarks/gpu.py --device cpu --smoke   # all of it in tiny, to see that it works

The table, as JSON with the machine and the versions, goes to benchmarks/results/. MFU: PaLM's count of operations
(Chowdhery et al., 2022, arXiv:2204.02311, appendix B), (6 N + 12 layers x width x length) a token, N without positions,
over the peak of dense bfloat16 products, for fp8 too, so that its rows compare with the others.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline import environment

environment.prepare()

PRECISIONS = ("bf16-mixed", "bf16-true", "fp8-mixed")
VOCABULARY = 50_304
"""GPT-2's, rounded up to a multiple of 128."""
WARM_UP = 6
"""Steps before the clock starts: compilation, and the two at which the runner measures memory."""
GOALS = (
    "runner at least 1.0x the bare loop",
    "MFU at least 45% in bf16 at 124M, 55% at 1B",
    "fp8 at least 1.15x bf16 at 1B",
)
PEAKS = (
    # Dense bfloat16, without sparsity, operations a second; NVIDIA's data sheets of each board.
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989.4e12),
    ("H200 NVL", 835.5e12),
    ("H200", 989.4e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("RTX 4090", 165.2e12),
)
"""(part of the name that torch gives a GPU, its peak); the first that fits."""


@dataclass(frozen=True)
class Size:
    """A model and how it is fed: `batch` sequences of `length` tokens a step."""

    label: str
    words: tuple[str, ...]
    layers: int
    width: int
    batch: int
    length: int
    vocabulary: int = VOCABULARY


GPT = Size("GPT-2 124M", ("model=gpt_124m",), 12, 768, 32, 1024)
LLAMA = Size(
    "Llama 1.1B",
    ("model=llama", "model.layers=16", "model.width=2048", "model.heads=32", "model.key_value_heads=8",
     "model.intermediate=8192"),
    16, 2048, 8, 2048,
)  # fmt: skip
TINY_GPT = Size("GPT-2 tiny", ("model=gpt", "model.layers=2", "model.width=64", "model.heads=4"), 2, 64, 4, 64, 256)
TINY_LLAMA = Size("Llama tiny", ("model=llama", "model.layers=2", "model.width=64"), 2, 64, 2, 64, 256)


@dataclass
class Row:
    """What one side did, or why it did not."""

    model: str
    precision: str
    compiled: bool
    side: str
    tokens_per_second: float | None = None
    mfu: float | None = None
    allocated: int | None = None
    """Bytes at the peak of the timed steps."""
    reserved: int | None = None
    start_seconds: float | None = None
    """Until the clock starts: mostly compilation."""
    loss: float | None = None
    error: str | None = None


class Enough(Exception):
    """All steps are timed; what would follow (a checkpoint of many GB) is not wanted."""


class Clock:
    """Seconds and peak memory from the end of step WARM_UP to that of the last."""

    def __init__(self, device: str, steps: int) -> None:
        self.device, self.steps, self.count = device, steps, 0
        self.started = time.perf_counter()
        self.start_seconds = self.seconds = 0.0
        self.allocated: int | None = None
        self.reserved: int | None = None

    def tick(self) -> bool:
        """After each optimizer step; whether it was the last."""
        import torch

        self.count += 1
        if self.count == WARM_UP:
            if self.device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            self.start_seconds, self.started = time.perf_counter() - self.started, time.perf_counter()
        if self.count < WARM_UP + self.steps:
            return False
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.allocated, self.reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        self.seconds = time.perf_counter() - self.started
        return True


def tokens_of(size: Size) -> Any:
    """A dataset of random tokens; one window is enough to be read again and again."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(size.vocabulary, (512, size.length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def configured(size: Size, precision: str, compiled: bool, device: str) -> Any:
    from pipeline.composing import compose

    return compose(
        [
            *size.words, f"precision={precision}", f"device={device}", f"trainer.batch_size={size.batch}",
            f"trainer.compile={str(compiled).lower()}", "trainer.max_steps=100000", "trainer.evaluate_every=0",
            "trainer.checkpoint_every=1000000", "optimizer.lr=1e-4",
        ]
    )  # fmt: skip


def runner(size: Size, precision: str, compiled: bool, clock: Clock) -> tuple[int, float]:
    """(parameters, last loss) of a fit of the program's own."""
    import lightning.pytorch as lightning
    import torch

    from pipeline.chain import Fit, Stage
    from pipeline.data.base import DataBundle, DataSpec
    from pipeline.fitting import fit
    from pipeline.models.architecture import describe
    from pipeline.tasks import lookup

    losses = []

    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            if clock.tick():
                losses.append(float(outputs["loss"]))
                raise Enough

    config = configured(size, precision, compiled, clock.device)
    spec = DataSpec(vocabulary=size.vocabulary, sequence_length=size.length)
    rows = tokens_of(size)
    torch.manual_seed(0)
    model = config.precision.convert(config.model.build(spec))
    data = DataBundle(rows, rows, spec, "", "random tokens")
    stage = Stage(0, "train", "train", fit=Fit(config.trainer.max_steps, config.optimizer.lr))
    with tempfile.TemporaryDirectory() as directory, contextlib.suppress(Enough):
        fit(config, stage, model, lookup.get("causal_lm"), data, describe(model), Path(directory), callbacks=[Stop()])
    return weights_in_products(model), losses[0]


def batches(size: Size, device: str) -> Iterator[Any]:
    """Endless batches, copied to the device while it works."""
    import torch

    rows = tokens_of(size)
    start = 0
    while True:
        ids = torch.stack([rows[(start + i) % len(rows)]["input_ids"] for i in range(size.batch)])
        start += size.batch
        yield ids.pin_memory().to(device, non_blocking=True) if device == "cuda" else ids


def loop(model: Any, loss_of: Callable[[Any], Any], size: Size, mixed: bool, clock: Clock) -> float:
    """Plain PyTorch: autocast, fused AdamW, clipping, a schedule. Returns the last loss."""
    import torch

    decayed = [weight for weight in model.parameters() if weight.ndim >= 2]
    others = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100))
    source = batches(size, clock.device)
    while True:
        ids = next(source)
        with torch.autocast(clock.device, dtype=torch.bfloat16, enabled=mixed):
            loss = loss_of(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if clock.tick():
            return float(loss)


def bare(size: Size, precision: str, compiled: bool, clock: Clock) -> tuple[int, float]:
    """(parameters, last loss) of a loop by hand around the same model and loss."""
    import torch

    from pipeline.data.base import DataSpec
    from pipeline.layers.sliced_loss import whole_cross_entropy
    from pipeline.tasks import lookup

    words = configured(size, "bf16-mixed", False, clock.device)
    torch.manual_seed(0)
    model = words.model.build(DataSpec(vocabulary=size.vocabulary, sequence_length=size.length)).to(clock.device)
    count = weights_in_products(model)
    if precision == "bf16-true":
        model = model.bfloat16()
    if precision == "fp8-mixed":
        from torchao.float8 import convert_to_float8_training

        convert_to_float8_training(model, module_filter_fn=lambda module, name: "lm_head" not in name)
    model.train()
    task = lookup.get("causal_lm")

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        return task.loss(model, {"input_ids": ids, "labels": ids}, criterion=whole_cross_entropy)

    called = torch.compile(loss_of) if compiled else loss_of
    return count, loop(model, called, size, precision != "bf16-true", clock)


def nanogpt(size: Size, precision: str, compiled: bool, clock: Clock) -> tuple[int, float]:
    """(parameters, last loss) of a GPT-2 written for nothing but its speed."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            split = self.qkv(self.first(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(split[0], split[1], split[2], is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).flatten(2))
            return x + self.down(F.gelu(self.up(self.second(x))))

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(size.vocabulary, size.width)
            self.positions = nn.Embedding(size.length, size.width)
            self.blocks = nn.ModuleList(Block(size.width, size.width // 64) for _ in range(size.layers))
            self.norm = nn.LayerNorm(size.width)
            self.head = nn.Linear(size.width, size.vocabulary, bias=False)
            self.head.weight = self.tokens.weight
            nn.init.normal_(self.tokens.weight, std=0.02)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.tokens(ids) + self.positions.weight
            for block in self.blocks:
                x = block(x)
            logits = self.head(self.norm(x))[:, :-1]
            return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    torch.manual_seed(0)
    model = Plain().to(clock.device)
    count = sum(weight.numel() for weight in model.parameters()) - model.positions.weight.numel()
    if precision == "bf16-true":
        model = model.bfloat16()
    called = torch.compile(model) if compiled else model
    return count, loop(model, called, size, precision != "bf16-true", clock)


SIDES = {"bare": bare, "runner": runner, "nanogpt": nanogpt}


def weights_in_products(model: Any) -> int:
    """Parameters less position embeddings; a tied embedding, which is the head's product too, counts once."""
    positions = [weight for name, weight in model.named_parameters() if "embed_positions" in name]
    return sum(weight.numel() for weight in model.parameters()) - sum(weight.numel() for weight in positions)


def peak_of(name: str) -> float | None:
    """Dense bfloat16 operations a second of the GPU that torch calls `name`; None where it is not in the table."""
    return next((peak for part, peak in PEAKS if part in name), None)


def operations(parameters: int, size: Size) -> float:
    """Of a token, forward and backward."""
    return 6.0 * parameters + 12.0 * size.layers * size.width * size.length


def measured(row: Row, size: Size, device: str, steps: int, peak: float | None) -> Row:
    """`row` with what its side did."""
    import torch

    clock = Clock(device, steps)
    try:
        parameters, loss = SIDES[row.side](size, row.precision, row.compiled, clock)
        if not math.isfinite(loss):
            raise ArithmeticError(f"the loss is {loss}")
        row.loss, row.start_seconds = loss, clock.start_seconds
        row.tokens_per_second = steps * size.batch * size.length / clock.seconds
        row.mfu = row.tokens_per_second * operations(parameters, size) / peak if peak else None
        row.allocated, row.reserved = clock.allocated, clock.reserved
    except Exception as error:
        traceback.print_exc()
        row.error = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return row


def work(part: str, arguments: argparse.Namespace) -> None:
    """One model in one precision: a line of JSON a row."""
    import torch

    torch.set_float32_matmul_precision("high")
    kind, precision = part.split(":")
    size = sizes(arguments.smoke)[kind]
    name = torch.cuda.get_device_name(0) if arguments.device == "cuda" else platform.processor()
    sides = [side for side in SIDES if side != "nanogpt" or (kind == "gpt" and precision != "fp8-mixed")]
    for compiled in (True, False):
        for side in sides:
            if side not in arguments.sides or compiled not in arguments.compiled:
                continue
            row = Row(size.label, precision, compiled, side)
            if time.time() > arguments.until:
                row.error = "not run: no time left"
            else:
                row = measured(row, size, arguments.device, arguments.steps, peak_of(name))
            print(f"ROW {json.dumps(asdict(row))}", flush=True)


def sizes(smoke: bool) -> dict[str, Size]:
    return {"gpt": TINY_GPT if smoke else GPT, "llama": TINY_LLAMA if smoke else LLAMA}


def rows_of(part: str, arguments: argparse.Namespace) -> list[Row]:
    """What a process of its own measures; where it dies, a row that says so."""
    passed = [f"--device={arguments.device}", f"--steps={arguments.steps}", f"--until={arguments.until}"]
    passed += ["--sides", *arguments.sides, "--compiled", *("yes" if on else "no" for on in arguments.compiled)]
    command = [sys.executable, __file__, "--part", part, *passed, *(["--smoke"] if arguments.smoke else [])]
    left = max(1.0, arguments.until + 60 - time.time())
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    late = False
    try:
        said, complaint = process.communicate(timeout=left)
    except subprocess.TimeoutExpired:
        process.kill()
        said, complaint = process.communicate()
        late = True
    rows = [Row(**json.loads(line[4:])) for line in said.splitlines() if line.startswith("ROW ")]
    if process.returncode != 0 or not rows:
        kind, precision = part.split(":")
        last = (complaint.strip().splitlines() or ["nothing said"])[-1][:200]
        error = "stopped: no time left" if late else f"ended with {process.returncode}: {last}"
        rows.append(Row(sizes(arguments.smoke)[kind].label, precision, False, "process", error=error))
    for row in rows:
        print(text_of(row), flush=True)
    return rows


COLUMNS = ("model", "precision", "compiled", "side", "tokens/s", "MFU", "allocated", "reserved", "start")
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def text_of(row: Row) -> str:
    """A line of the table."""

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    said = f"| {row.model} | {row.precision} | {'yes' if row.compiled else 'no'} | {row.side} | "
    if row.error:
        return f"{said}{row.error} | | | | |"
    gib = 2**30
    return said + " | ".join(
        [
            shown(row.tokens_per_second, "{:,.0f}"),
            shown(row.mfu and 100 * row.mfu, "{:.1f}%"),
            shown(row.allocated and row.allocated / gib, "{:.2f} GiB"),
            shown(row.reserved and row.reserved / gib, "{:.2f} GiB"),
            shown(row.start_seconds, "{:.0f} s"),
        ]
    ) + " |"  # fmt: skip


def ratio(rows: list[Row], above: tuple[str, str, bool, str], below: tuple[str, str, bool, str]) -> float | None:
    """Tokens a second of one row over those of another, where both are there."""
    speed = {(row.model, row.precision, row.compiled, row.side): row.tokens_per_second for row in rows}
    top, bottom = speed.get(above), speed.get(below)
    return top / bottom if top and bottom else None


def verdicts(rows: list[Row], smoke: bool) -> list[str]:
    """The goals, each with what came."""
    lines = []
    for size in sizes(smoke).values():
        for precision in PRECISIONS:
            for compiled in (True, False):
                for other in ("bare", "nanogpt"):
                    key = (size.label, precision, compiled)
                    if (came := ratio(rows, (*key, "runner"), (*key, other))) is not None:
                        goal = " (goal 1.0)" if other == "bare" else ""
                        how = "compiled" if compiled else "not compiled"
                        lines.append(f"runner / {other}, {size.label}, {precision}, {how}: {came:.3f}{goal}")
        best = max((row.mfu for row in rows if row.model == size.label and "bf16" in row.precision and
                    row.side == "runner" and row.mfu), default=None)  # fmt: skip
        goal = 45 if size is sizes(smoke)["gpt"] else 55
        lines.append(f"best MFU in bf16, {size.label}: {'-' if best is None else f'{100 * best:.1f}%'} (goal {goal}%)")
    large = sizes(smoke)["llama"].label
    for compiled in (True, False):
        came = ratio(rows, (large, "fp8-mixed", compiled, "runner"), (large, "bf16-mixed", compiled, "runner"))
        how = "compiled" if compiled else "not compiled"
        lines.append(f"fp8 / bf16, {large}, {how}: {'-' if came is None else f'{came:.3f}'} (goal 1.15)")
    return lines


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    from pipeline.versions import versions

    about: dict[str, Any] = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
    }
    if device == "cuda":
        here = torch.cuda.get_device_properties(0)
        about |= {"gpu": here.name, "memory": here.total_memory, "cuda": torch.version.cuda, "peak": peak_of(here.name)}
    return {**about, "versions": versions()}


def named(arguments: argparse.Namespace, about: dict[str, Any], began: datetime, kind: str) -> Path:
    """Where the table goes."""
    what = str(about.get("gpu", "cpu-smoke" if arguments.smoke else "cpu")).lower().replace(" ", "-")
    return Path(arguments.out) / f"{kind}-{what}-{began:%Y-%m-%d-%H%M}.json"


def decode(arguments: argparse.Namespace, began: datetime) -> None:
    import gpu_decode

    tokens, rounds = (4, 2) if arguments.smoke else (48, 7)
    models = list(sizes(arguments.smoke).values())
    rows = gpu_decode.measure(models, arguments.device, tokens, rounds, arguments.until)
    about = machine(arguments.device)
    gpu_decode.written(rows, about, named(arguments, about, began, "gpu-decode"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny models")
    parser.add_argument(
        "--decode", action="store_true", help="decoding and prompts at batch 1, fused and 2:4 kernels on and off"
    )
    parser.add_argument("--steps", type=int, default=None, help="timed steps of each row (default 15; smoke 3)")
    parser.add_argument("--limit", type=float, default=530, help="seconds after which no row is begun")
    parser.add_argument("--parts", nargs="+", help="of these only: llama:bf16-mixed gpt:fp8-mixed ...")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="of these only")
    parser.add_argument("--compiled", nargs="+", choices=("yes", "no"), default=("yes", "no"), help="of these only")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.compiled = [said == "yes" for said in arguments.compiled]
    arguments.steps = arguments.steps or (3 if arguments.smoke else 15)
    if arguments.part:
        work(arguments.part, arguments)
        return
    began = datetime.now()
    arguments.until = time.time() + arguments.limit
    if arguments.decode:
        decode(arguments, began)
        return
    print(HEADER, flush=True)
    # What the goals are about comes first, in case the time does not suffice for all.
    parts = [
        f"{kind}:{precision}" for precision in ("bf16-mixed", "fp8-mixed", "bf16-true") for kind in ("llama", "gpt")
    ]
    rows = [row for part in arguments.parts or parts for row in rows_of(part, arguments)]
    came = verdicts(rows, arguments.smoke)
    about = machine(arguments.device)
    print("\nGoals: " + "; ".join(GOALS), *came, json.dumps(about), sep="\n")
    arguments.out.mkdir(parents=True, exist_ok=True)
    target = named(arguments, about, began, "gpu")
    written = {"machine": about, "goals": GOALS, "came": came, "rows": [asdict(row) for row in rows]}
    target.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    print(f"written to {target}; {(datetime.now() - began).total_seconds():.0f} s in all")


if __name__ == "__main__":
    main()
