"""What others say that training the same models takes, beside the measured peak: error and time to answer.

    torch's MemTracker           counts modules and operators; a plain loop on fake tensors is written around it here
    DeepSpeed's ZeRO estimators  bytes of weights, gradients and state for one GPU, from the number of parameters
    accelerate estimate-memory   four times the weights in training with Adam

Each model trains in float32 with fused AdamW, plainly: forward, backward, step, gradients freed. Measured by the
allocator's events over the third step, on a CPU. Lightning's batch-size finder asks another question (the largest micro
batch) and answers it by running until memory runs out, which a CPU does not report: it has no row.

    python benchmarks/planner_peers.py        # needs the extra leanfit[deepspeed]; accelerate comes with it
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from pipeline import environment

environment.prepare()

import torch
from accelerate.commands.estimate import estimate_training_usage
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import (
    EfficientNetConfig,
    EfficientNetForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from pipeline.memory.measure import measure_peak
from pipeline.planner.estimate import estimate

ADAMW = partial(torch.optim.AdamW, fused=True)
Batch = dict[str, torch.Tensor]


def tokens(rows: int, length: int) -> Batch:
    ids = torch.zeros(rows, length, dtype=torch.long)
    return {"input_ids": ids, "labels": ids.clone()}


def opt(layers: int, width: int, vocabulary: int) -> nn.Module:
    config = OPTConfig(
        vocab_size=vocabulary, hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width,
        num_hidden_layers=layers, num_attention_heads=width // 64, max_position_embeddings=512, dropout=0.0,
    )  # fmt: skip
    return OPTForCausalLM(config)


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=8000, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def efficientnet() -> nn.Module:
    return EfficientNetForImageClassification(
        EfficientNetConfig(num_labels=10, dropout_rate=0.0, drop_connect_rate=0.0)
    )


CASES: dict[str, tuple[Callable[[], nn.Module], Batch]] = {
    "OPT, 2 x 128, 256 words, 8 x 128": (partial(opt, 2, 128, 256), tokens(8, 128)),
    "OPT, 4 x 256, 256 words, 8 x 256": (partial(opt, 4, 256, 256), tokens(8, 256)),
    "OPT, 4 x 256, 16,000 words, 4 x 128": (partial(opt, 4, 256, 16000), tokens(4, 128)),
    "OPT, 4 x 512, 256 words, 1 x 16": (partial(opt, 4, 512, 256), tokens(1, 16)),
    "Llama, 4 x 256, 8,000 words, 4 x 128": (llama, tokens(4, 128)),
    "EfficientNet-B0, 16 images of 64": (
        efficientnet, {"pixel_values": torch.zeros(16, 3, 64, 64), "labels": torch.zeros(16, dtype=torch.long)}
    ),
}  # fmt: skip


def measured(model: nn.Module, batch: Batch) -> int:
    optimizer = ADAMW(model.parameters())
    peak_bytes = 0
    for _ in range(3):
        state = [value for held in optimizer.state.values() for value in held.values()]
        with measure_peak("cpu", [*model.parameters(), *model.buffers(), *state]) as peak:
            model(**{name: tensor.clone() for name, tensor in batch.items()}).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert peak.bytes is not None
        peak_bytes = peak.bytes
    return peak_bytes


def ours(build: Callable[[], nn.Module], batch: Batch) -> int:
    with torch.device("meta"):
        model = build()
    return estimate(model, ADAMW, batch).bytes


def mem_tracker(build: Callable[[], nn.Module], batch: Batch) -> int:
    with FakeTensorMode():
        model = build().train()
        optimizer = ADAMW(model.parameters())
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            for step in range(3):
                if step:
                    tracker.reset_mod_stats()
                given = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in batch.items()}
                model(**given).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    snapshot: dict[torch.device, dict[Any, int]] = tracker.get_tracker_snapshot("peak")
    return max(kinds["Total"] for kinds in snapshot.values())


def parameters(build: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        return sum(weight.numel() for weight in build().parameters())


def zero(build: Callable[[], nn.Module], batch: Batch) -> int:
    return estimate_zero2_model_states_mem_needs(parameters(build), 1, 1, cpu_offload=False)[1]  # type: ignore[no-any-return]


def accelerate(build: Callable[[], nn.Module], batch: Batch) -> int:
    return max(estimate_training_usage(4 * parameters(build), "float32").values())


WAYS = {"pipeline.memory.estimate": ours, "MemTracker": mem_tracker, "ZeRO estimator": zero, "accelerate": accelerate}


def main() -> None:
    print(f"{'':38} {'measured':>10}  " + "  ".join(f"{name:>24}" for name in WAYS))
    for name, (build, batch) in CASES.items():
        truth = measured(build().train(), batch)
        cells = []
        for way in WAYS.values():
            started = time.process_time()
            try:
                said = way(build, batch)
            except Exception as error:  # a peer that cannot is a result
                cells.append(f"{type(error).__name__:>24}")
                continue
            cells.append(f"{f'{100 * (said / truth - 1):+.1f}% in {time.process_time() - started:.2f} s':>24}")
        print(f"{name:38} {truth / 1e6:7.1f} MB  " + "  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
