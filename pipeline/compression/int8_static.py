"""int8 W8A8 with static activations: weights per output channel, one calibrated activation scale a layer.

Jacob et al., 2018 (arXiv:1712.05877); observers as Wu et al., 2020 (arXiv:2004.09602) compare them. Calibrated block by
block, each seeing what the quantized blocks before it give. Linear layers and convolutions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from annotated_types import Gt, Le

from pipeline.compression.base import Context
from pipeline.compression.quantization import Quantizer
from pipeline.registry import register

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.models.base import Architecture

Observer = Literal["minmax", "percentile", "mse"]


def quantize_int8_static(
    model: nn.Module,
    layers: Sequence[str],
    architecture: Architecture,
    batches: Iterable[Mapping[str, torch.Tensor]],
    observer: Observer = "minmax",
    percentile: float = 99.99,
    device: str = "cpu",
) -> nn.Module:
    """`model` with each named nn.Linear and nn.Conv2d replaced, in place, by its int8 form with static activations.

    `batches` are calibration inputs of the model. `observer` says what becomes a layer's range: the largest magnitude
    (`minmax`), the one that `percentile` percent do not exceed, or that of the least squared error (`mse`).

    Raises:
        LeanfitError: no layers; NaN or infinity in a weight or in a layer's inputs, or a layer that calibration never
            reaches (the layer is named).
    """
    from pipeline.layers.blockwise import segments
    from pipeline.layers.quantize import Grid, quantize_rows
    from pipeline.layers.schemes import put, require_finite
    from pipeline.layers.static import input_scales

    require_finite(model, layers, "int8_static")
    for segment in segments(model, architecture, layers, batches, device):
        for name, scale in input_scales(segment, segment.layers, observer, percentile).items():
            weight = model.get_submodule(name).get_parameter("weight").detach().flatten(1)
            put(model, name, quantize_rows(weight, Grid(bits=8)), "int8_static", input_scale=scale)
    return model


@register("compression", "int8_static")
@dataclass(frozen=True, kw_only=True)
class Int8Static(Quantizer):
    """`observer`: what becomes a layer's activation range; `percentile` counts where it says so."""

    needs_calibration: ClassVar[bool] = True

    observer: Observer
    percentile: Annotated[float, Gt(0), Le(100)]

    def form(self, context: Context) -> tuple[str, dict[str, Any]]:
        return "int8_static", {}

    def memory(self, model: nn.Module, context: Context) -> dict[str, int] | None:
        from pipeline.layers.holding import calibrated, largest
        from pipeline.layers.static import BINS

        known = calibrated(model, context.architecture, context.calibration and context.calibration(), context.device)
        if known is None:
            return None
        layers = self.layers(model, context)
        magnitudes = known.wide + known.widened
        counts = 0
        if self.observer != "minmax":  # over the width of a bin, and then as integers of 64 bits
            magnitudes = known.wide + max(known.wide, 8)
            counts = 8 * BINS * len(known.inside(layers))
        return largest([known.running(counts, magnitudes, kept=False), *known.integers(layers, 2)])

    def finalize(self, model: nn.Module, context: Context) -> nn.Module:
        assert context.calibration is not None
        return quantize_int8_static(
            model, self.layers(model, context), context.architecture, context.calibration(),
            self.observer, self.percentile, context.device,
        )  # fmt: skip

    def detail(self, model: nn.Module, context: Context) -> dict[str, Any]:
        from pipeline.layers.quantized import quantized_layers

        scales = {name: float(cast("torch.Tensor", m.input_scale)) for name, m in quantized_layers(model).items()}
        return {**super().detail(model, context), "observer": self.observer, "input_scale": scales}
