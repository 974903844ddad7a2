"""8-bit float weights (E4M3), one scale an output channel; activations in E4M3 per token where the device has that.

Micikevicius et al., 2022 (arXiv:2209.05433); see layers/float8.py. No calibration. GPUs of compute capability 8.9 and
above multiply E4M3 matrices; elsewhere nothing is gained by casting activations, so weights alone are stored so. What
was chosen is written into the artifact, and is the arithmetic wherever it is opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipeline.compression.base import Context
from pipeline.compression.quantization import Quantizer
from pipeline.registry import register

if TYPE_CHECKING:
    from torch import nn


def quantize_fp8(
    model: nn.Module,
    layers: Sequence[str],
    activations: Literal["dynamic"] | None = None,
    share_flat: bool = False,
) -> nn.Module:
    """`model` with the weights of each named nn.Linear and nn.Conv2d in E4M3, in place.

    `activations`: `dynamic` casts the inputs of linear layers too, a scale a token. `share_flat`: see `int8`.

    Raises:
        LeanfitError: no layers, or NaN or infinity in a weight (the layer is named).
    """
    from pipeline.layers.schemes import quantize_layers

    return quantize_layers(model, layers, "fp8", activations=activations, share_flat=share_flat)


@register("compression", "fp8")
@dataclass(frozen=True, kw_only=True)
class Fp8(Quantizer):
    """`activations`: `dynamic`, `none`, or `auto`: dynamic where the run's device multiplies E4M3."""

    activations: Literal["auto", "dynamic", "none"]

    def form(self, context: Context) -> tuple[str, dict[str, Any]]:
        import torch

        from pipeline.layers.float8 import multiplies_float8

        dynamic = self.activations == "dynamic" or (
            self.activations == "auto" and multiplies_float8(torch.device(context.device))
        )
        return "fp8", {"activations": "dynamic" if dynamic else None, "share_flat": self.share_flat(context)}

    def finalize(self, model: nn.Module, context: Context) -> nn.Module:
        _, settings = self.form(context)
        return quantize_fp8(model, self.layers(model, context), **settings)

    def detail(self, model: nn.Module, context: Context) -> dict[str, Any]:
        from pipeline.layers.float8 import Float8Linear
        from pipeline.layers.quantized import quantized_layers

        chosen = {layer.activations for layer in quantized_layers(model).values() if isinstance(layer, Float8Linear)}
        return {**super().detail(model, context), "activations": "dynamic" if "dynamic" in chosen else "none"}
