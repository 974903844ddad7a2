"""int8 W8A8: weights per output channel, activations dynamic per token, integer products.

Round to nearest, symmetric, no calibration (Dettmers et al., 2022, arXiv:2208.07339, without its outlier path;
compressed-tensors' dynamic W8A8). Convolutions too: see layers/conv.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.compression.base import Context, Kind, Method
from pipeline.registry import register

if TYPE_CHECKING:
    from torch import nn


def quantize_int8(model: nn.Module, layers: Sequence[str], share_flat: bool = False) -> nn.Module:
    """`model` with each named nn.Linear and nn.Conv2d replaced, in place, by its int8 W8A8 form.

    `share_flat`: linear layers that are given [rows, in] take one activation scale for all rows, as compressed-tensors
    does; right for language models (see layers/linear.py).

    Raises:
        LeanfitError: no layers, or NaN or infinity in a weight (the layer is named).
    """
    from pipeline.layers.schemes import quantize_layers

    return quantize_layers(model, layers, "int8", share_flat=share_flat)


@register("compression", "int8")
@dataclass(frozen=True, kw_only=True)
class Int8(Method):
    """`ignore`: module names, last components or fnmatch patterns of layers to leave in float."""

    kind: ClassVar[Kind] = "quantization"
    cannot_follow: ClassVar[frozenset[str]] = frozenset({"quantization"})

    ignore: tuple[str, ...]

    def preflight(self, model: nn.Module, context: Context) -> list[str]:
        from pipeline.layers.select import selection_problems

        return selection_problems(model, context.architecture, self.ignore, f"compression.{context.stage}")

    def finalize(self, model: nn.Module, context: Context) -> nn.Module:
        from pipeline.layers.select import select

        selection = select(model, context.architecture, self.ignore)
        return quantize_int8(model, selection.layers, share_flat=bool(context.architecture.embeddings))

    def detail(self, model: nn.Module, context: Context) -> dict[str, Any]:
        from pipeline.layers.schemes import quantization_detail

        return quantization_detail(model, context.architecture, self.ignore)
