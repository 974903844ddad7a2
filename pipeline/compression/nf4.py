"""4-bit NormalFloat weights (NF4): 16 values at the quantiles of a normal distribution, a maximum for each block.

Dettmers et al., 2023 (arXiv:2305.14314), with its double quantization of the maxima; see layers/nf4.py. Weights of
trained networks spread nearly as a normal distribution, so at 4 bits these values come nearer than evenly spaced ones.
Saves disk and memory, not time: a layer multiplies by its dequantized weight.

With `adapter=lora` or `dora` this is QLoRA: stage 0 holds the frozen layers in NF4 and trains low-rank adapters beside
them (see pipeline/adapters/base.py); this link then stores these very codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge, Le

from pipeline.compression.base import Context
from pipeline.compression.quantization import TableQuantizer
from pipeline.registry import register

if TYPE_CHECKING:
    from torch import nn


def quantize_nf4(model: nn.Module, layers: Sequence[str], block_size: int = 64, double_quant: bool = True) -> nn.Module:
    """`model` with the weights of each named layer in NF4, in place: nn.Linear, Conv2d, Embedding or EmbeddingBag.

    `block_size`: weights, in the order of the flattened tensor, that share a maximum; it need not divide anything.

    Raises:
        LeanfitError: no layers, or NaN or infinity in a weight (the layer is named).
    """
    from pipeline.layers.schemes import quantize_layers

    return quantize_layers(model, layers, "nf4", block_size=block_size, double_quant=double_quant)


@register("compression", "nf4")
@dataclass(frozen=True, kw_only=True)
class NF4(TableQuantizer):
    """`block_size`: weights that share a maximum. `double_quant`: the maxima in 8 bits too."""

    holds_adapters: ClassVar[bool] = True

    block_size: Annotated[int, Ge(16), Le(4096)]
    double_quant: bool

    def form(self, context: Context) -> tuple[str, dict[str, Any]]:
        return "nf4", {"block_size": self.block_size, "double_quant": self.double_quant}

    def finalize(self, model: nn.Module, context: Context) -> nn.Module:
        """Where stage 0 trained adapters beside NF4 layers, those are what is stored, and nothing is rounded again."""
        from pipeline.layers.nf4 import NF4Layer

        if any(isinstance(layer, NF4Layer) for layer in model.modules()):
            return model
        _, settings = self.form(context)
        return quantize_nf4(model, self.layers(model, context), **settings)

    def memory(self, model: nn.Module, context: Context) -> dict[str, int] | None:
        """Weights over their maxima, and the place of each among the values, as int64 and otherwise."""
        from pipeline.layers.holding import layer_work

        layers, form = self.layers(model, context), self.form(context)
        return layer_work(model, layers, lambda itemsize: 17 + 2 * max(4, itemsize), form)

    def detail(self, model: nn.Module, context: Context) -> dict[str, Any]:
        from pipeline.layers.lora import adapters_detail

        return {
            **super().detail(model, context), "block_size": self.block_size, "double_quant": self.double_quant,
            **adapters_detail(model),
        }  # fmt: skip
