"""int4_gptq: weight-only integers in groups, 4 bits unless said otherwise, rounded by GPTQ on calibration data.

Frantar et al., 2023 (arXiv:2210.17323); the algorithm is in layers/gptq.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge

from pipeline.compression.base import Context
from pipeline.compression.quantization import GroupQuantizer
from pipeline.registry import register

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipeline.models.base import Architecture


def quantize_gptq(
    model: nn.Module,
    layers: Sequence[str],
    batches: Iterable[Mapping[str, Tensor]],
    architecture: Architecture,
    group_size: int | None,
    bits: int = 4,
    symmetric: bool = True,
    **settings: Any,
) -> nn.Module:
    """`model` with the weights of each named layer as integers of `bits`, in place, block by block.

    `settings` and what is raised: see `pipeline.layers.gptq.round_with_gptq`.
    """
    from pipeline.layers.gptq import round_with_gptq
    from pipeline.layers.quantize import Grid

    grids = dict.fromkeys(layers, Grid(bits, group_size, symmetric))
    return round_with_gptq(model, grids, batches, architecture, **settings)


@register("compression", "int4_gptq")
@dataclass(frozen=True, kw_only=True)
class Int4Gptq(GroupQuantizer):
    """`damping`: share of the mean diagonal added to the Hessian's. `activation_order`: largest inputs first.

    `block_size`: columns that are updated lazily together.
    """

    needs_calibration: ClassVar[bool] = True

    damping: Annotated[float, Ge(0)]
    activation_order: bool
    block_size: Annotated[int, Ge(1)]

    def memory(self, model: nn.Module, context: Context) -> dict[str, int] | None:
        from pipeline.layers.holding import calibrated, largest

        known = calibrated(model, context.architecture, context.calibration and context.calibration(), context.device)
        if known is None:
            return None
        solving = known.solving(7, gone=known.shrunk(self.layers(model, context), self.bits))
        return largest([known.running(known.hessians(), known.widened), solving])

    def finalize(self, model: nn.Module, context: Context) -> nn.Module:
        assert context.calibration is not None
        return quantize_gptq(
            model, self.layers(model, context), context.calibration(), context.architecture,
            damping=self.damping, activation_order=self.activation_order, block_size=self.block_size,
            device=context.device, facts=context.facts, **self.grid_settings(),
        )  # fmt: skip
