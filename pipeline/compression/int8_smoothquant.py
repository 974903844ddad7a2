"""SmoothQuant: outliers of activations are moved into weights, then int8 W8A8 with dynamic activations.

Xiao et al., 2023 (arXiv:2211.10438). The input channel j of linear layers is divided by s_j = max|X_j|^alpha /
max|W_j|^(1 - alpha), and the column j of their weights multiplied by it, so that both are equally hard to quantize
(alpha=0.5). The division is folded into the module before: a norm, a value projection, or an up projection, wherever a
trial shows that the model computes what it did. Block by block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge, Le

from pipeline.compression.base import Context
from pipeline.compression.quantization import Int8Quantizer, norm_problems
from pipeline.registry import register

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.models.base import Architecture


def quantize_int8_smoothquant(
    model: nn.Module,
    layers: Sequence[str],
    architecture: Architecture,
    batches: Iterable[Mapping[str, torch.Tensor]],
    alpha: float = 0.5,
    share_flat: bool = False,
    device: str = "cpu",
) -> tuple[nn.Module, dict[str, Any]]:
    """(`model` smoothed and with each named layer in int8 W8A8, in place; which pairs were smoothed or why not).

    `batches` are calibration inputs of the model. `alpha`: how much of the difficulty goes to the weights, from 0
    (none of the activations' outliers) to 1 (all). `share_flat`: see `quantize_int8`.

    Raises:
        LeanfitError: no layers; NaN or infinity in a weight (the layer is named); or not one pair to smooth.
    """
    from pipeline.errors import LeanfitError
    from pipeline.layers.blockwise import segments
    from pipeline.layers.equalize import pairs_detail, smooth
    from pipeline.layers.schemes import quantize_layers, require_finite

    require_finite(model, layers, "int8_smoothquant")
    smoothed, refused = [], {}
    for segment in segments(model, architecture, layers, batches, device):
        pairs = smooth(segment, architecture, segment.layers, alpha)
        smoothed += pairs.exact
        refused.update(pairs.refused)
        quantize_layers(model, segment.layers, "int8", share_flat=share_flat)
    if not smoothed:
        said = "; ".join(f"{pair}: {reason}" for pair, reason in [*refused.items()][:3]) or "no norm feeds any layer"
        raise LeanfitError(f"int8_smoothquant: no scale can be moved in this model ({said}); int8 does the rest of it")
    return model, pairs_detail(smoothed, refused, "smoothed")


@register("compression", "int8_smoothquant")
@dataclass(frozen=True, kw_only=True)
class Int8SmoothQuant(Int8Quantizer):
    """`alpha`: how much of the outliers goes into the weights; 0.5 is the paper's, larger where outliers are large."""

    needs_calibration: ClassVar[bool] = True

    alpha: Annotated[float, Ge(0), Le(1)]

    def preflight(self, model: nn.Module, context: Context) -> list[str]:
        return super().preflight(model, context) or norm_problems(context, "smooth", "int8")

    def memory(self, model: nn.Module, context: Context) -> dict[str, int] | None:
        from pipeline.layers.holding import calibrated, largest

        known = calibrated(model, context.architecture, context.calibration and context.calibration(), context.device)
        if known is None:
            return None
        magnitudes = known.wide + known.widened if known.gated else 0  # elsewhere of hidden states alone
        return largest([known.running(copied=magnitudes, kept=False), *known.integers(self.layers(model, context), 1)])

    def finalize(self, model: nn.Module, context: Context) -> nn.Module:
        assert context.calibration is not None
        model, facts = quantize_int8_smoothquant(
            model, self.layers(model, context), context.architecture, context.calibration(), self.alpha,
            share_flat=self.share_flat(context), device=context.device,
        )  # fmt: skip
        context.facts.update(facts)
        return model
