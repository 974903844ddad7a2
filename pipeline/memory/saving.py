"""Less memory while training: blocks computed twice, gradients freed early, or used up while they are computed.

Activation checkpointing: `full` (Chen et al., 2016, arXiv:1604.06174) keeps each block's input and runs the block
again in the backward pass. `selective` keeps the results of the large products and of fused attention as well and
recomputes what lies between; products of attention scores grow with the square of the length and are recomputed too
(Korthikanti et al., 2022, arXiv:2205.05198).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any, Literal

import lightning.pytorch as lightning
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from pipeline.errors import ConfigError
from pipeline.layers.decoding import CACHES
from pipeline.optimizers.stepping import step_in_backward

Mode = Literal["none", "full", "selective"]
KEPT = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::linear",  # one operator on Apple GPUs
        "aten::convolution",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_attention_math_for_mps",
        "aten::_scaled_dot_product_fused_attention_overrideable",
    }
)
"""Operators whose results `selective` keeps."""


def apply_activation_checkpointing(model: nn.Module, blocks: Sequence[str], mode: Mode) -> Callable[[], None]:
    """Recompute each of `blocks` (module names) in the backward pass, in place; names and parameters stay as they are.

    May be applied again, and then only sets the mode. Blocks inside blocks would be computed three times and are
    refused.

    Returns:
        A function that takes it off again; calling it twice does nothing more.

    Raises:
        ConfigError: there are no blocks to recompute.
        ValueError: a name is no module of the model, or lies inside another block.
    """
    if mode == "none":
        return lambda: None
    if not blocks:
        raise ConfigError(f"memory.activation_checkpointing={mode}: this model has no repeated blocks; use none")
    modules = dict(model.named_modules())
    for name in blocks:
        if name not in modules:
            raise ValueError(f"the model has no module '{name}' to recompute")
        if outer := next((other for other in blocks if name.startswith(f"{other}.")), None):
            raise ValueError(f"block '{name}' lies inside block '{outer}', which is recomputed as a whole")
    for name in blocks:
        block = modules[name]
        if not _is_checkpointed(block):
            block.__dict__["_plain_forward"] = block.__dict__.get("forward")
        block.__dict__["_checkpoint_mode"] = mode
        # A bound method, so that a deep copy of the model gets blocks that run themselves and not the original's.
        block.__dict__["forward"] = MethodType(_checkpointed_forward, block)

    def remove() -> None:
        for name in blocks:
            block = modules[name]
            if _is_checkpointed(block):
                plain = block.__dict__.pop("_plain_forward")
                del block.__dict__["forward"], block.__dict__["_checkpoint_mode"]
                if plain is not None:
                    block.__dict__["forward"] = plain

    return remove


def _is_checkpointed(block: nn.Module) -> bool:
    return getattr(block.__dict__.get("forward"), "__func__", None) is _checkpointed_forward


def _checkpointed_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    plain: Callable[..., Any] = self.__dict__["_plain_forward"] or MethodType(type(self).forward, self)
    if not torch.is_grad_enabled():
        return plain(*args, **kwargs)
    args = tuple(_without_cache(value) for value in args)
    kwargs = {name: _without_cache(value) if name in CACHES else value for name, value in kwargs.items()}
    if kwargs.get("use_cache"):
        kwargs["use_cache"] = False
    mode = self.__dict__["_checkpoint_mode"]
    return checkpoint(plain, *args, use_reentrant=False, context_fn=lambda: _contexts(self, mode), **kwargs)


def _without_cache(value: Any) -> Any:
    """None for an empty key-value cache: the second run of a block would append to it again."""
    if not hasattr(value, "get_seq_length"):
        return value
    if value.get_seq_length() > 0:
        raise RuntimeError("activation checkpointing cannot train with a filled key-value cache; pass use_cache=False")
    return None


def _contexts(block: nn.Module, mode: Mode) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What the first and the second run of a block are entered in."""
    if mode == "full":
        return nullcontext(), _second_run(block, nullcontext())
    first, second = create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]
    return first, _second_run(block, second)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return (
        CheckpointPolicy.MUST_SAVE if operator.name().partition(".")[0] in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
    )


@contextmanager
def _second_run(block: nn.Module, inner: AbstractContextManager[Any]) -> Iterator[None]:
    """Keeps batch statistics from being counted a second time."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm, _, counted in before:
            norm.momentum = 0.0
            norm.num_batches_tracked = None if counted is None else counted.clone()
        # Last, because operators that are not the block's own would confuse the selective kind.
        with inner:
            yield
    finally:
        for norm, momentum, counted in before:
            norm.momentum, norm.num_batches_tracked = momentum, counted


class ReleaseGradients(lightning.Callback):
    """Frees gradients right after the optimizer step; by default they stay until the next backward pass replaces them.

    Saves a copy of the trained weights during the forward pass. Under ddp with `bucket_view` the gradients live in the
    buckets, which stay; it makes others for its second step, beside which they would hold the first ones.
    """

    def __init__(self, once: bool = False) -> None:
        """`once`: after the first step of this process alone."""
        self.once, self.done = once, False

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.done:
            return
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch:
            self.done = self.once
            for optimizer in trainer.optimizers:
                optimizer.zero_grad(set_to_none=True)


class StepInBackward(lightning.Callback):
    """Each weight is stepped, and its gradient freed, within the backward pass."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.remove = step_in_backward(trainer.optimizers[0])

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.remove()
