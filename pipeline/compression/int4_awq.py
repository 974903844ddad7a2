"""AWQ: weight-only integers, channels that matter scaled up before rounding, ranges of groups clipped.

Lin et al., 2024 (arXiv:2306.00978). For each module whose output feeds linear layers alone, input channels are scaled
by s = mean|x|^ratio, with the ratio in [0, 1) that gives the least error of what these layers compute; the module
before is divided by s. Then the range of each group of weights is narrowed where that lowers the error of its part of
the output. Block by block, each seeing what the quantized blocks before it give; a block takes scales, ranges, both or
none of them, whichever leaves its output closest. Hessians and means are of the whole calibration set; trials that are
forward passes run on its first tokens (layers/awq.py says how many).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge, Lt

from pipeline.compression.base import Context
from pipeline.compression.quantization import GroupQuantizer, norm_problems
from pipeline.registry import register

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.models.base import Architecture


def quantize_int4_awq(
    model: nn.Module,
    layers: Sequence[str],
    architecture: Architecture,
    batches: Iterable[Mapping[str, torch.Tensor]],
    group_size: int | None,
    bits: int = 4,
    symmetric: bool = True,
    n_grid: int = 20,
    duo_scaling: bool = False,
    max_shrink: float = 0.5,
    device: str = "cpu",
) -> tuple[nn.Module, dict[str, Any]]:
    """(`model` with the weights of each named layer as integers of `bits`, in place; what was scaled, blocks' errors).

    `batches` are calibration inputs of the model. `group_size` must divide the inputs of every named linear layer.
    `n_grid`: steps of the search of ratios, and of shrinks from 1 to 1 - `max_shrink`.

    Raises:
        LeanfitError: no layers; NaN or infinity in a weight or in a layer's inputs (the layer is named).
    """
    from pipeline.layers.awq import search
    from pipeline.layers.blockwise import segments
    from pipeline.layers.equalize import pairs_detail
    from pipeline.layers.quantize import Grid
    from pipeline.layers.schemes import join_siblings, put, require_finite

    require_finite(model, layers, "int4_awq")
    scaled, refused, blocks = [], {}, {}
    for segment in segments(model, architecture, layers, batches, device):
        found = search(segment, architecture, Grid(bits, group_size, symmetric), n_grid, duo_scaling, max_shrink)
        for name, integers in found.integers.items():
            put(model, name, integers, "weight_only", bits=bits, group_size=group_size, symmetric=symmetric)
        where = segment.name or "outside of blocks"
        blocks[where] = {
            "relative_error": found.errors[0],
            "relative_error_nearest": found.errors[1],
            "scaled": bool(found.scaled),
            "clipped": found.clipped,
        }
        scaled += found.scaled
        refused.update(found.refused)
    join_siblings(model)
    return model, {**pairs_detail(scaled, refused, "scaled"), "blocks": blocks}


@register("compression", "int4_awq")
@dataclass(frozen=True, kw_only=True)
class Int4Awq(GroupQuantizer):
    """`bits`: 2, 3, 4 or 8. `n_grid`: ratios that are tried. `duo_scaling`: scales look at the weights' means too.

    `max_shrink`: by how much the range of a group may be narrowed, 0 for not at all.
    """

    needs_calibration: ClassVar[bool] = True

    n_grid: Annotated[int, Ge(1)]
    duo_scaling: bool
    max_shrink: Annotated[float, Ge(0), Lt(1)]

    def types(self) -> tuple[type[nn.Module], ...]:
        """Linear layers alone: nothing before a convolution takes over its scales."""
        from torch import nn

        return (nn.Linear,)

    def preflight(self, model: nn.Module, context: Context) -> list[str]:
        return super().preflight(model, context) or norm_problems(context, "scale", "int4")

    def memory(self, model: nn.Module, context: Context) -> dict[str, int] | None:
        from pipeline.layers.awq import SEARCH_TOKENS
        from pipeline.layers.equalize import activation, is_homogeneous
        from pipeline.layers.holding import calibrated, largest

        known = calibrated(model, context.architecture, context.calibration and context.calibration(), context.device)
        if known is None:
            return None
        between = activation(model)
        homogeneous = between is None or is_homogeneous(between)
        trying = known.trying(self.layers(model, context), homogeneous, SEARCH_TOKENS, self.group_size)
        # Magnitudes of the inner rows are looked at only where scales can pass to them.
        magnitudes = known.wide if homogeneous or known.gated else 0
        running = known.running(known.hessians(), known.widened + magnitudes)
        nearest = known.nearest(self.layers(model, context), SEARCH_TOKENS)
        running["activations"] += nearest.pop("activations")
        return largest([{**running, **nearest}, *trying])

    def finalize(self, model: nn.Module, context: Context) -> nn.Module:
        assert context.calibration is not None
        model, facts = quantize_int4_awq(
            model, self.layers(model, context), context.architecture, context.calibration(), self.group_size,
            bits=self.bits, symmetric=self.symmetric, n_grid=self.n_grid, duo_scaling=self.duo_scaling,
            max_shrink=self.max_shrink, device=context.device,
        )  # fmt: skip
        context.facts.update(facts)
        return model
