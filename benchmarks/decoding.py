"""What benchmarks of decoding share: a model compressed where it is, seconds a token, and seconds of a prompt."""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor, nn

from pipeline.composing import compose
from pipeline.compression.base import Context
from pipeline.layers.decoding import decode
from pipeline.models.architecture import describe


def compressed(dense: nn.Module, name: str, device: str, *settings: str) -> nn.Module:
    """A copy of `dense`, which is on `device`, after `compression=name` with `settings` (key=value)."""
    method = compose([f"compression={name}", *(f"compression.{name}.{setting}" for setting in settings)]).chain[name]
    model = copy.deepcopy(dense)
    context = Context(stage=name, architecture=describe(model), device=device, steps=0, seed=0)
    return method.finalize(method.prepare(model, context), context).eval()


def finished(device: torch.device) -> float:
    """The time at which all that was started on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.inference_mode()
def seconds_a_token(model: nn.Module, prompt: Tensor, tokens: int) -> float:
    """Greedy, with the key-value cache; the prompt is not counted."""
    logits, cache = decode(model, prompt)
    began = finished(prompt.device)
    for _ in range(tokens):
        logits, cache = decode(model, logits[:, -1:].argmax(-1), cache)
    return (finished(prompt.device) - began) / tokens


@torch.inference_mode()
def seconds_of_a_prompt(model: nn.Module, prompt: Tensor) -> float:
    """One pass over all of its tokens, which fills a key-value cache."""
    began = finished(prompt.device)
    decode(model, prompt)
    return finished(prompt.device) - began
