"""The training forward and backward of each block as compiled kernels (Ansel et al., 2024, "PyTorch 2", ASPLOS).

Blocks are compiled one by one, as torchtitan does: those that are alike share one compilation, and what is between
them (embeddings, the head, collectives of sharded models) stays as it is. What makes a loss of logits is compiled, too.
Names of modules and parameters do not change. Without gradients (evaluation) nothing that is compiled runs.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor, nn
from torch import _inductor as inductor

from pipeline.layers.sliced_loss import Criterion, cross_entropy, whole_cross_entropy

BACKEND = "inductor"
PER_BLOCK = 4
"""Compilations that one block may need. torch's own limit counts those of all blocks of a class together, and beyond it
runs the rest uncompiled without a word."""


Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]


def compiler(plain: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(plain, backend=BACKEND)


@contextmanager
def compiled_blocks(model: nn.Module, blocks: Sequence[str], compiler: Compiler = compiler) -> Iterator[None]:
    """While entered, each of `blocks` (module names; the whole model where there are none) is compiled on first use.

    Random numbers are those of plain blocks, so that dropout drops the same. `compiler`: a plan's, which builds no
    kernels; torch's otherwise.
    """
    modules = [model.get_submodule(name) for name in blocks] or [model]
    before = [module.__dict__.get("forward") for module in modules]
    limit = PER_BLOCK * len(modules)
    try:
        with (
            torch._dynamo.config.patch(
                recompile_limit=limit, accumulated_recompile_limit=limit, fail_on_recompile_limit_hit=True
            ),
            inductor.config.patch(fallback_random=True),
            warnings.catch_warnings(),
        ):
            # What torch's compiler does by itself: uses deprecated parts of torch, looks at gradients of any tensor.
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            _replace_forwards(modules, compiler)
            yield
    finally:
        for module, own in zip(modules, before, strict=True):
            module.__dict__.pop("forward", None)
            if own is not None:
                module.__dict__["forward"] = own
        torch._dynamo.reset()


def _replace_forwards(modules: Sequence[nn.Module], compiler: Compiler) -> None:
    compiled: dict[type[nn.Module], Callable[..., Any]] = {}
    for module in modules:
        own = module.__dict__.get("forward")
        if own is not None:
            forward = _forward(_without_self(own), compiler)
        else:
            forward = compiled.setdefault(type(module), _forward(type(module).forward, compiler))
        # A bound method, so that a deep copy of the model gets blocks that run themselves and not the original's.
        module.__dict__["forward"] = MethodType(forward, module)


def _forward(plain: Callable[..., Any], compiler: Compiler) -> Callable[..., Any]:
    fast = compiler(plain)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (fast if torch.is_grad_enabled() else plain)(self, *args, **kwargs)

    return forward


def compiled_criterion(compiler: Compiler = compiler) -> Criterion:
    """Cross-entropy of all rows in one kernel each way, which hold no more than slices by torch's operators do."""
    fast = compiler(whole_cross_entropy)

    def criterion(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        return (fast if torch.is_grad_enabled() else cross_entropy)(logits, targets, reduction)

    return criterion


def _without_self(own: Callable[..., Any]) -> Callable[..., Any]:
    return lambda _, *args, **kwargs: own(*args, **kwargs)


class FirstStepCompiles(lightning.Callback):
    """Says that the first step of a fit takes longer, and how long it took.

    `step` is that step, from 1, to be left out of rates; 0 before the fit.
    """

    def __init__(self, stage: str, count: int, say: Callable[[str], None] | None) -> None:
        self.stage, self.count = stage, count
        self.say: Callable[[str], Any] = say or str
        self.step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.step, self._start = trainer.global_step + 1, time.monotonic()
        what = f"{self.count} blocks" if self.count else "the model"
        self.say(f"{self.stage}: compiling {what} in the first step")

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step and self._start:
            self.say(f"{self.stage}: compiled in {time.monotonic() - self._start:.0f} s")
            self._start = 0.0
