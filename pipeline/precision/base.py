"""What every precision choice offers: the dtype of weights and compute, and the Lightning plugin that does it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from lightning.pytorch.plugins.precision import Precision as LightningPrecision
    from torch import nn

    from pipeline.models.base import Architecture

Dtype = Literal["float16", "bfloat16", "float32", "float64"]
BITS: dict[Dtype, str] = {"float16": "16", "bfloat16": "bf16", "float32": "32", "float64": "64"}


@dataclass(frozen=True, kw_only=True)
class Precision:
    """A `precision` choice."""

    name: str
    dtype: Dtype
    gradient_dtype: Literal["float32", "bfloat16"] | None
    """dtype in which gradients are held and summed; None: that of the weights."""

    def problems(self) -> list[str]:
        """What is wrong with these settings that types and ranges cannot say. Must not import torch."""
        return []

    @property
    @abstractmethod
    def label(self) -> str:
        """The field's name of what runs: '16-mixed', 'bf16-true', ..."""

    @property
    @abstractmethod
    def weight_dtype(self) -> torch.dtype:
        """dtype in which weights live, and in which the model is evaluated and saved."""

    def convert(self, module: nn.Module) -> nn.Module:
        """`module` with its weights in `weight_dtype`, in place; constants that are not saved with it stay as they are.

        To be done before a fit: Lightning reads a checkpoint's weights into the module as it finds it, and converts
        after.
        """
        from pipeline.precision.plugins import convert_floating

        return convert_floating(module, self.weight_dtype)

    def shape_problems(self, model: nn.Module, architecture: Architecture) -> list[str]:
        """Why a model of these shapes (on the meta device) cannot be trained so."""
        return []

    def model_problems(self, model: nn.Module) -> list[str]:
        """Why a model of these shapes (on the meta device) cannot be run so at all, be it trained or not."""
        return []

    def convert_layers(self, model: nn.Module, architecture: Architecture) -> Callable[[], None]:
        """Layers that compute otherwise while a fit goes on, in place; names and weights stay. What is returned takes
        them off again."""
        return lambda: None

    def prepare_training(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """What holds beyond the plugin while `optimizer` trains `model`: the gradients' dtype."""
        import torch

        from pipeline.optimizers.stepping import step_one_by_one

        if self.gradient_dtype is None and not self.rounds_stochastically:
            return
        if self.gradient_dtype is not None:
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.grad_dtype = getattr(torch, self.gradient_dtype)
        step_one_by_one(optimizer, stochastic=self.rounds_stochastically)

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled, so that steps which overflow are skipped."""
        return False

    @property
    def rounds_stochastically(self) -> bool:
        """Whether updates of bfloat16 weights are rounded by chance."""
        return False

    @abstractmethod
    def plugin(self, device: str) -> LightningPrecision:
        """The Lightning plugin for `device` ('cpu', 'cuda', 'mps')."""

    @abstractmethod
    def evaluation_context(self, device: str) -> AbstractContextManager[object]:
        """Entered around evaluation of a plain model: changes which kernels run, never the arithmetic's dtype."""
