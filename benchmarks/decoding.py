"""What benchmarks of decoding share: a model quantized where it is, and seconds a token."""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor, nn

from pipeline.app import compose
from pipeline.compression.base import Context
from pipeline.layers.decoding import decode
from pipeline.models.architecture import describe


def quantized(dense: nn.Module, name: str, device: str) -> nn.Module:
    """A copy of `dense`, which is on `device`, after `compression=name`."""
    method = compose([f"compression={name}"]).chain[name]
    model = copy.deepcopy(dense)
    context = Context(stage=name, architecture=describe(model), device=device, steps=0, seed=0)
    return method.finalize(method.prepare(model, context), context).eval()


@torch.inference_mode()
def seconds_a_token(model: nn.Module, prompt: Tensor, tokens: int) -> float:
    """Greedy, with the key-value cache; the prompt is not counted."""

    def finished() -> float:
        if prompt.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    logits, cache = decode(model, prompt)
    began = finished()
    for _ in range(tokens):
        logits, cache = decode(model, logits[:, -1:].argmax(-1), cache)
    return (finished() - began) / tokens
