"""The weight-only scheme: packed integers of 2 to 8 bits with scales by row or group, float activations."""

from __future__ import annotations

from typing import Any

from pipeline.layers.quantize import Grid
from pipeline.layers.quantized import FloatLayer, IntegerLayer


class WeightOnly(IntegerLayer):
    """What the weight-only forms of all layers share; each says how it runs on `dequantized()`."""

    packed = True

    def __init__(self, layer: FloatLayer, bits: int, group_size: int | None = None, symmetric: bool = True) -> None:
        super().__init__(layer, Grid(bits, group_size, symmetric))

    def settings(self) -> dict[str, Any]:
        return dict(vars(self.grid))
