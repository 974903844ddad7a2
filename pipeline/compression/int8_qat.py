"""Quantization-aware training to int8 W8A8: train with the rounding of weights and activations, then round.

Jacob et al., 2018 (arXiv:1712.05877) and Krishnamoorthi, 2018 (arXiv:1806.08342), with the straight-through estimator
of Bengio et al., 2013 (arXiv:1308.3432). Weights per output channel; activations dynamic per token, so there are no
ranges to learn. Batch norms are not folded, here as in `int8`. The result is `int8`'s, with weights that have adapted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipeline.compression.base import Context
from pipeline.compression.quantization import Int8Quantizer, QuantizationAware
from pipeline.registry import register

if TYPE_CHECKING:
    from torch import nn


def prepare_int8_qat(model: nn.Module, layers: Sequence[str], share_flat: bool = False) -> nn.Module:
    """`model` with each named nn.Linear and nn.Conv2d computing, in place, as its int8 form will; to be trained.

    `share_flat`: see `int8`. Names and values in the state dict stay.

    Raises:
        LeanfitError: no layers, or NaN or infinity in a weight (the layer is named).
    """
    from pipeline.layers.fake import fake_quantize_layers

    return fake_quantize_layers(model, layers, "int8", share_flat=share_flat)


def convert_int8_qat(model: nn.Module, layers: Sequence[str], share_flat: bool = False) -> nn.Module:
    """The trained `model` with each named layer in its int8 form, in place; masked weights are zero in it.

    Raises:
        LeanfitError: no layers, or NaN or infinity in a weight (the layer is named).
    """
    from pipeline.layers.schemes import quantize_layers
    from pipeline.layers.sparsity import apply_masks

    apply_masks(model)
    return quantize_layers(model, layers, "int8", share_flat=share_flat)


@register("compression", "int8_qat")
@dataclass(frozen=True, kw_only=True)
class Int8Qat(QuantizationAware, Int8Quantizer):
    """No settings but those of every quantizer that trains."""

    untrained: ClassVar[str] = "int8"

    def prepare(self, model: nn.Module, context: Context) -> nn.Module:
        return prepare_int8_qat(model, self.layers(model, context), share_flat=self.share_flat(context))

    def finalize(self, model: nn.Module, context: Context) -> nn.Module:
        return convert_int8_qat(model, self.layers(model, context), share_flat=self.share_flat(context))
