"""Lightning plugins behind the precision choices: what Lightning's own do, and what they leave out.

On a CPU without 16-bit matrix kernels both use `cpu_kernels`, forward and backward. `TrueSixteen` keeps constants that
are not saved with a model (rotary frequencies) in float32, and what the model creates as it runs. `Mixed` has
autocast's weight cache, and unscales the gradients before clipping whatever the optimizer is: Lightning leaves that to
fused optimizers and then refuses to clip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision
from lightning.pytorch.plugins.precision import Precision as LightningPrecision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.precision.cpu_kernels import sixteen_bit_kernels


def kernels(device: str) -> AbstractContextManager[None]:
    """The context in which 16-bit products are fast on `device`; nothing to do on accelerators."""
    return sixteen_bit_kernels() if device == "cpu" else nullcontext()


def convert_floating(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`module` with parameters and persistent buffers in `dtype`, in place; other buffers and integers are untouched.

    A buffer that is not saved is a constant which the model recomputes (rotary frequencies). Rounded to 16 bits it
    would shift positions, and a model loaded back from disk, where it is computed afresh, would give other outputs.
    """
    constants = [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
        if name in owner._non_persistent_buffers_set
    ]
    module.to(dtype=dtype)
    for owner, name, buffer in constants:
        converted = getattr(owner, name)
        setattr(owner, name, buffer.to(converted.device))
    return module


class TrueSixteen(HalfPrecision):
    """16-bit weights, gradients and compute, on any device."""

    def __init__(self, precision: Literal["16-true", "bf16-true"], device: str) -> None:
        super().__init__(precision)
        self.device = device

    def convert_module(self, module: nn.Module) -> nn.Module:
        return convert_floating(module, torch.float16 if self.precision == "16-true" else torch.bfloat16)

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        # Lightning's makes 16 bits the default of what a model creates: positions counted in bfloat16 end at 256.
        with kernels(self.device):
            yield

    def backward(  # type: ignore[override]
        self, tensor: Tensor, model: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        with kernels(self.device):
            super().backward(tensor, model, *args, **kwargs)


class Mixed(MixedPrecision):
    """16-bit compute under autocast over float32 weights; dynamic loss scaling for float16.

    Args:
        precision: '16-mixed' or 'bf16-mixed'.
        device: 'cpu', 'cuda' or 'mps'.
        scaler: required for '16-mixed', None for 'bf16-mixed'.
        cache_weights: autocast's `cache_enabled`: a weight that is used twice in a forward pass is cast once.
    """

    def __init__(
        self,
        precision: Literal["16-mixed", "bf16-mixed"],
        device: str,
        scaler: torch.amp.GradScaler | None,
        cache_weights: bool,
    ) -> None:
        super().__init__(precision, device, scaler)
        self.cache_weights = cache_weights

    def autocast_context_manager(self) -> torch.autocast:
        dtype = torch.float16 if self.precision == "16-mixed" else torch.bfloat16
        return torch.autocast(self.device, dtype=dtype, cache_enabled=self.cache_weights)

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        with kernels(self.device), self.autocast_context_manager():
            yield

    def backward(  # type: ignore[override]
        self, tensor: Tensor, model: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        with kernels(self.device):
            super().backward(tensor, model, *args, **kwargs)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizer, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        if self.scaler is None:
            return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)
        result = closure()
        if result is None and model.automatic_optimization:
            return result
        self.scaler.unscale_(optimizer)
        self._after_closure(model, optimizer)
        output = self.scaler.step(optimizer, **kwargs)
        self.scaler.update()
        return output

    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        # Gradients are unscaled by now (see optimizer_step), so fused optimizers may be clipped like any other.
        LightningPrecision.clip_gradients(self, optimizer, clip_val, gradient_clip_algorithm)
