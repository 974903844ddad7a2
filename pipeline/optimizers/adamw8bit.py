"""AdamW whose two running means take a byte each (Dettmers et al., 2022, arXiv:2110.02861).

Blocks of values share a scale, the largest magnitude among them; a code is the nearest of 256 values that lie denser
towards 0 (dynamic tree quantization). Each step decodes, updates in float32 and encodes again, a slice at a time. State
is plain tensors; no kernel is compiled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt

from pipeline.optimizers.adamw import Beta
from pipeline.optimizers.base import Optimizer, decay_groups
from pipeline.registry import register

if TYPE_CHECKING:
    import torch
    from torch import nn


@register("optimizer", "adamw8bit")
@dataclass(frozen=True, kw_only=True)
class AdamW8bit(Optimizer):
    """`block_size`: values that share one scale. Tensors of fewer than `min_elements` keep a float32 state."""

    steps_apart: ClassVar[Literal["weights", "rows", "parts", "values"]] = "rows"

    betas: tuple[Beta, Beta]
    eps: Annotated[float, Gt(0)]
    block_size: Annotated[int, Ge(16)]
    min_elements: Annotated[int, Ge(0)]

    def of_parts(self, ranks: int) -> AdamW8bit:
        return replace(self, min_elements=-(-self.min_elements // ranks))

    def build(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        from pipeline.optimizers.blockwise import AdamWBlockwise

        groups = decay_groups(model.parameters(), self.weight_decay)
        return AdamWBlockwise(groups, lr, self.betas, self.eps, self.block_size, self.min_elements)
