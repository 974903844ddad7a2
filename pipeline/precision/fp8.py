"""`fp8-mixed`: products of linear layers in float8, all else as bf16-mixed does it (Micikevicius et al., 2022,
arXiv:2209.05433).

Of each product's operands, input, weight and gradient, the largest magnitude is scaled to the largest float8 number
when they are cast; sums are float32. `tensorwise` has a scale a tensor, e4m3 for inputs and weights, e5m2 for
gradients; `rowwise` a scale a row or column along which is summed, rounded down to a power of two, and e4m3 throughout.
torchao's float8 training does it. As is usual, embeddings and the head stay out of it, and so does a layer whose sizes
are no multiples of 16, which the kernels want.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipeline.precision.base import Precision
from pipeline.registry import register

if TYPE_CHECKING:
    import torch
    from lightning.pytorch.plugins.precision import Precision as LightningPrecision
    from torch import nn

    from pipeline.models.base import Architecture

MULTIPLE = 16
"""Of which both sizes of a layer must be multiples."""


@register("precision", "fp8")
@dataclass(frozen=True, kw_only=True)
class Float8(Precision):
    """`recipe`: torchao's name of it. `emulate`: float8 values, multiplied in float32, on any device.

    `cache_weights`: a weight used more than once in a forward pass is cast to bfloat16 once (torch.autocast's cache).
    """

    dtype: Literal["bfloat16"]
    recipe: Literal["tensorwise", "rowwise"]
    emulate: bool
    cache_weights: bool

    @property
    def label(self) -> str:
        return "fp8-mixed emulated" if self.emulate else "fp8-mixed"

    @property
    def weight_dtype(self) -> torch.dtype:
        import torch

        return torch.float32

    def shape_problems(self, model: nn.Module, architecture: Architecture) -> list[str]:
        if chosen_layers(model, architecture):
            return []
        return [
            f"precision=fp8-mixed: no block of this model has a linear layer whose sizes are multiples of {MULTIPLE}; "
            "use precision=bf16-mixed"
        ]

    def convert_layers(self, model: nn.Module, architecture: Architecture) -> Callable[[], None]:
        from pipeline.precision.float8_layers import to_float8

        return to_float8(model, chosen_layers(model, architecture), self.recipe, emulate=self.emulate)

    def plugin(self, device: str) -> LightningPrecision:
        from pipeline.precision.plugins import Mixed as Plugin

        return Plugin("bf16-mixed", device, None, self.cache_weights)

    def evaluation_context(self, device: str) -> AbstractContextManager[object]:
        """Nothing: a plain model is evaluated in float32, the dtype of its weights."""
        return nullcontext()


def chosen_layers(model: nn.Module, architecture: Architecture) -> list[str]:
    """Names of the plain linear layers within the blocks whose sizes are multiples of 16."""
    from torch import nn

    return [
        f"{block.name}.{name}"
        for block in architecture.blocks
        for name, module in model.get_submodule(block.name).named_modules()
        if type(module) is nn.Linear and not module.in_features % MULTIPLE and not module.out_features % MULTIPLE
    ]
