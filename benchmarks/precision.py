"""Step time of each precision as a ratio to float32, measured in turns on one machine.

    python benchmarks/precision.py [--layers 4 --width 256 --batch 16 --length 128] [--rounds 9 --model conv]

Every precision trains its own copy of one model; in each round each takes one step, so that drift hits all alike. A
ratio is that of a round; its median and its quartiles are printed. The step is a whole one: forward, backward,
unscaling, clipping, optimizer.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.memory.measure import measure_peak, storage_bytes
from pipeline.precision.cpu_kernels import native
from pipeline.precision.plugins import Mixed, TrueSixteen, kernels

CHOICES = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true")


def transformer(layers: int, width: int, length: int) -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=256, hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64), max_position_embeddings=length, activation_function="gelu",
        dropout=0.0, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return OPTForCausalLM(config)


def convolutional() -> nn.Module:
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    config = EfficientNetConfig(
        width_coefficient=0.5, depth_coefficient=0.5, hidden_dim=640, num_channels=1, num_labels=10, image_size=32
    )
    return EfficientNetForImageClassification(config)


def step_of(precision: str, model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], float]:
    """One training step of `model` in `precision`, as a function that returns the loss."""
    plugin: Any = None
    scaler = torch.amp.GradScaler("cpu") if precision == "16-mixed" else None
    if precision in ("16-mixed", "bf16-mixed"):
        plugin = Mixed(precision, "cpu", scaler, cache_weights=True)  # type: ignore[arg-type]
    elif precision != "32-true":
        plugin = TrueSixteen(precision, "cpu")  # type: ignore[arg-type]
        plugin.convert_module(model)
    inputs = {name: plugin.convert_input(value) if plugin else value for name, value in batch.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, eps=1e-4, fused=True)
    context = plugin.forward_context if plugin else torch.enable_grad

    def step() -> float:
        with context():
            labels = inputs["labels"]
            logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits.float()
            loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten())
        scaled = scaler.scale(loss) if scaler else loss
        with kernels("cpu"):
            scaled.backward()
        if scaler:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    step.parts = (model, optimizer, inputs)  # type: ignore[attr-defined]
    return step


def peak(step: Any) -> int:
    model, optimizer, inputs = step.parts
    states = [value for state in optimizer.state.values() for value in state.values()]
    with measure_peak("cpu", [*model.parameters(), *model.buffers(), *states, *inputs.values()]) as measured:
        step()
    assert measured.bytes is not None
    return measured.bytes


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("layers", 4), ("width", 256), ("batch", 16), ("length", 128), ("rounds", 9), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", choices=("transformer", "conv"), default="transformer")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: this process's time, on a busy machine"
    )
    parser.add_argument("--choices", default=",".join(CHOICES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.model == "conv":
        model = convolutional()
        batch = {
            "pixel_values": torch.randn(options.batch, 1, 32, 32),
            "labels": torch.randint(0, 10, (options.batch,)),
        }
    else:
        model = transformer(options.layers, options.width, options.length)
        ids = torch.randint(0, 256, (options.batch, options.length))
        batch = {"input_ids": ids, "labels": ids}
    count = sum(weight.numel() for weight in model.parameters())
    print(
        f"{count / 1e6:.1f}M parameters, {storage_bytes(model.parameters()) / 2**20:.1f} MiB, {options.threads} threads"
    )
    print(f"native float16: {native(torch.float16)}, native bfloat16: {native(torch.bfloat16)}")
    steps = {choice: step_of(choice, copy.deepcopy(model), batch) for choice in options.choices.split(",")}
    seconds: dict[str, list[float]] = {choice: [] for choice in steps}
    for step in steps.values():
        step()
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    for _ in range(options.rounds):
        for choice, step in steps.items():
            start = clock()
            step()
            seconds[choice].append(clock() - start)
    print(f"{'precision':<12}{'ms':>9}{'ratio':>8}{'  quartiles':<16}{'peak MiB':>10}")
    for choice, step in steps.items():
        ratios = [mine / base for mine, base in zip(seconds[choice], seconds["32-true"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        milliseconds = statistics.median(seconds[choice]) * 1e3
        print(f"{choice:<12}{milliseconds:>9.1f}{middle:>8.2f}  {low:.2f} - {high:.2f}{peak(step) / 2**20:>13.1f}")


if __name__ == "__main__":
    main()
