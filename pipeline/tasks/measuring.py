"""What every task needs in order to measure a model: no gradients, and an accelerator that has really finished."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def wait(device: torch.device) -> None:
    """Until everything that was started on `device` is done, so that a clock read next is right."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; the model's former mode after. Not `inference_mode`, whose tensors, where a layer
    keeps one, could not take part in training later."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
