"""`16-mixed`, `bf16-mixed`: 16-bit compute, float32 master weights (Micikevicius et al., 2018, arXiv:1710.03740)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt

from pipeline.errors import ConfigError
from pipeline.precision.base import BITS, Precision
from pipeline.registry import register

if TYPE_CHECKING:
    import torch
    from lightning.pytorch.plugins.precision import Precision as LightningPrecision


@register("precision", "mixed")
@dataclass(frozen=True, kw_only=True)
class Mixed(Precision):
    """`cache_weights`: a weight used more than once in a forward pass is cast once (torch.autocast's cache).

    `initial_scale`, `growth_interval`: the loss scale at the start, and the steps without overflow after which it
    doubles; an overflow halves it and skips the step. They are set for float16, null for bfloat16, which needs no
    scaling.
    """

    dtype: Literal["float16", "bfloat16"]
    cache_weights: bool
    initial_scale: Annotated[float, Gt(0)] | None
    growth_interval: Annotated[int, Ge(1)] | None

    @property
    def label(self) -> str:
        return f"{BITS[self.dtype]}-mixed"

    @property
    def scales_loss(self) -> bool:
        return self.dtype == "float16"

    @property
    def weight_dtype(self) -> torch.dtype:
        import torch

        return torch.float32

    def problems(self) -> list[str]:
        """Scaling settings that do not go with the dtype. Imports no torch."""
        found = []
        settings = {"initial_scale": self.initial_scale, "growth_interval": self.growth_interval}
        for key, value in settings.items():
            if self.dtype == "float16" and value is None:
                found.append(f"precision.{key}=null: float16 needs loss scaling; give a number above 0")
            if self.dtype == "bfloat16" and value is not None:
                found.append(f"precision.{key}={value:g}: bfloat16 takes no loss scaling; it must be null")
        return found

    def plugin(self, device: str) -> LightningPrecision:
        from pipeline.precision.plugins import Mixed as Plugin
        from pipeline.precision.scaling import Scaler

        if problems := self.problems():
            raise ConfigError(problems)
        if self.dtype == "bfloat16":
            return Plugin("bf16-mixed", device, None, self.cache_weights)
        assert self.initial_scale is not None
        assert self.growth_interval is not None
        scaler = Scaler(device, init_scale=self.initial_scale, growth_interval=self.growth_interval)
        return Plugin("16-mixed", device, scaler, self.cache_weights)

    def evaluation_context(self, device: str) -> AbstractContextManager[object]:
        """Nothing: a plain model is evaluated in float32, the dtype of its weights."""
        return nullcontext()
