"""`32-true`, `64-true`, `16-true`, `bf16-true`: weights, gradients and compute in one dtype."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError
from pipeline.precision.base import BITS, Precision
from pipeline.registry import register

if TYPE_CHECKING:
    import torch
    from lightning.pytorch.plugins.precision import Precision as LightningPrecision
    from torch import nn


@register("precision", "full")
@dataclass(frozen=True, kw_only=True)
class Full(Precision):
    """One dtype for everything. float16 has no loss scaling here: gradients below 6e-8 vanish.

    `stochastic_rounding`: bfloat16 weights are updated in float32, one at a time, and rounded up or down by chance, so
    that updates too small for the nearest bfloat16 count on average.
    """

    stochastic_rounding: bool

    def problems(self) -> list[str]:
        if self.stochastic_rounding and self.dtype != "bfloat16":
            return [
                f"precision.stochastic_rounding=true is for bfloat16 weights, not {self.dtype}; use precision=bf16-true"
            ]
        return []

    @property
    def rounds_stochastically(self) -> bool:
        return self.stochastic_rounding

    @property
    def label(self) -> str:
        return f"{BITS[self.dtype]}-true"

    @property
    def weight_dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def model_problems(self, model: nn.Module) -> list[str]:
        """Experts in stacked tensors are multiplied by groups, which torch does not do in float64.

        transformers has another way ("eager"), which config.json cannot ask for: what was saved would open in plain
        transformers, and fail at its first token.
        """
        from pipeline.layers.experts import by_groups, groups_multiply

        if not by_groups(model) or groups_multiply(self.weight_dtype):
            return []
        kind = type(model).__name__
        return [
            f"precision={self.label}: the experts of {kind} are multiplied by groups, which torch does not do in "
            f"{self.dtype}; use precision=32-true"
        ]

    def plugin(self, device: str) -> LightningPrecision:
        from lightning.pytorch.plugins.precision import DoublePrecision
        from lightning.pytorch.plugins.precision import Precision as SinglePrecision

        from pipeline.precision.plugins import TrueSixteen

        if self.dtype == "float64" and device == "mps":
            raise ConfigError("precision=64-true: device=mps has no float64; use precision=32-true or device=cpu")
        if self.dtype == "float64":
            return DoublePrecision()
        if self.dtype == "float32":
            return SinglePrecision()
        return TrueSixteen("16-true" if self.dtype == "float16" else "bf16-true", device)

    def evaluation_context(self, device: str) -> AbstractContextManager[object]:
        if self.dtype in ("float32", "float64"):
            return nullcontext()
        from pipeline.precision.plugins import kernels

        return kernels(device)
