"""Quantized forms of nn.Linear: int8 W8A8, int8 weight-only, int4 in groups. Forward and layout as compressed-tensors.

Weight-only layers multiply in the model's dtype by the dequantized weight, made anew each time: they save memory and
disk, not time.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.layers import kernels
from pipeline.layers.quantized import FloatLayer, QuantizedLayer, quantizes


class _QuantizedLinear(QuantizedLayer):
    def __init__(self, layer: FloatLayer, **settings: Any) -> None:
        super().__init__(layer, **settings)
        self.out_features, self.in_features = self.weight_dims

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantized().to(x.dtype), self.bias)


@quantizes("int8", nn.Linear)
class Int8Linear(_QuantizedLinear):
    """int8 weights per output channel, int8 activations per token, integer products (`layers/kernels.py`).

    `share_flat`: one activation scale for all rows of a two-dimensional input. compressed-tensors quantizes so (its
    token strategy keeps the first two dimensions), and language models whose code flattens [batch, tokens] before a
    layer, as OPT's does before its feed-forward, give the same logits here and there only if this does too.
    """

    bits = 8
    packed = False
    weight: Tensor

    def __init__(self, layer: FloatLayer, share_flat: bool = False, **settings: Any) -> None:
        super().__init__(layer, **settings)
        self.share_flat = share_flat
        self._packed = kernels.Packed()

    def forward(self, x: Tensor) -> Tensor:
        return kernels.int8_linear(x, self.weight, self.weight_scale, self.bias, self._packed, self.share_flat)

    @property
    def kernel(self) -> str:
        few, many = (kernels.choose(self.weight.device, self.weight_scale.dtype, rows) for rows in (1, 64))
        return few if few == many else f"{few} up to {kernels.INTEGER_ROWS} tokens, then {many}"

    def settings(self) -> dict[str, Any]:
        return {"share_flat": self.share_flat}

    def set_integers(self, integers: Tensor) -> None:
        super().set_integers(integers)
        self._packed = kernels.Packed()

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        self._packed = kernels.Packed()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed = kernels.Packed()
        super()._load_from_state_dict(*args, **kwargs)


@quantizes("int8_weight_only", nn.Linear)
class Int8WeightOnlyLinear(_QuantizedLinear):
    """int8 weights per output channel, packed four to an int32; float activations."""

    bits = 8
    packed = True


@quantizes("int4", nn.Linear)
class Int4Linear(_QuantizedLinear):
    """4-bit weights with a scale for each `group_size` inputs, packed eight to an int32; float activations."""

    bits = 4
    packed = True
