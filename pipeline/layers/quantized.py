"""What every quantized layer shares: geometry, stored tensors, conversion from float, and the table of kinds.

The stored tensors have the names and shapes of compressed-tensors on disk: `weight` int8 (int-quantized), or
`weight_packed` int32 and `weight_shape` (pack-quantized), with `weight_scale` [out, groups] and `bias`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pipeline.layers.packing import pack_int32, packed_columns, unpack_int32, unpack_unsigned
from pipeline.layers.quantize import dequantize_rows, quantize_rows
from pipeline.layers.sparsity import MASK

FloatLayer = nn.Linear | nn.Conv2d


class QuantizedLayer(nn.Module):
    """A layer whose weight is integers times scales. Subclasses say how it is stored and how it runs.

    `sparse`: the integers came from a masked weight, and their zeros are worth storing as a bitmask.
    """

    scheme: ClassVar[str]
    """'int8' (W8A8), 'int8_weight_only' or 'int4'."""
    bits: ClassVar[int]
    packed: ClassVar[bool]

    weight: Tensor
    weight_packed: Tensor
    weight_scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, layer: FloatLayer, group_size: int | None = None, **_: Any) -> None:
        """Room for the quantized form of `layer`, not yet filled."""
        super().__init__()
        self.group_size = group_size
        self.sparse = False
        self.weight_dims: tuple[int, ...] = tuple(layer.weight.shape)
        rows, columns, device = self.weight_dims[0], layer.weight[0].numel(), layer.weight.device
        groups = 1 if group_size is None else columns // group_size
        if self.packed:
            words = packed_columns(columns, self.bits)
            self.register_buffer("weight_packed", torch.empty(rows, words, dtype=torch.int32, device=device))
            self.register_buffer("weight_shape", torch.tensor(self.weight_dims, device=device))
        else:
            self.register_buffer("weight", torch.empty(self.weight_dims, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.empty(rows, groups, dtype=layer.weight.dtype, device=device))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)

    @classmethod
    def from_float(cls, layer: FloatLayer, **settings: Any) -> QuantizedLayer:
        """The quantized form of `layer`; its bias is shared, its mask becomes `sparse`."""
        made = cls(layer, **settings)
        integers, scale = quantize_rows(layer.weight.detach().flatten(1), made.bits, made.group_size)
        made.set_integers(integers)
        made.weight_scale = scale
        made.sparse = hasattr(layer, MASK)
        return made.train(layer.training)

    def integers(self) -> Tensor:
        """int8 [out, in] (a convolution's kernels flattened)."""
        if self.packed:
            return unpack_int32(self.weight_packed, self.bits, self._columns)
        return self.weight.flatten(1)

    def set_integers(self, integers: Tensor) -> None:
        """Store int8 [out, in]."""
        if self.packed:
            self.weight_packed = pack_int32(integers, self.bits)
        else:
            self.weight = integers.view(self.weight_dims)

    def dequantized(self) -> Tensor:
        """The weight that the integers stand for, in the float layer's shape and the scales' dtype."""
        if self.packed:
            unsigned = unpack_unsigned(self.weight_packed, self.bits, self._columns)
            weight = dequantize_rows(unsigned, self.weight_scale, offset=1 << (self.bits - 1))
        else:
            weight = dequantize_rows(self.integers(), self.weight_scale)
        return weight.view(self.weight_dims)

    @property
    def kernel(self) -> str:
        """Name of what runs the layer's products."""
        return "dequantize"

    @property
    def weight_name(self) -> str:
        return "weight_packed" if self.packed else "weight"

    @property
    def _columns(self) -> int:
        columns = 1
        for size in self.weight_dims[1:]:
            columns *= size
        return columns

    def settings(self) -> dict[str, Any]:
        """What the constructor needs beside the float layer."""
        return {"group_size": self.group_size}

    def extra_repr(self) -> str:
        return f"{self.scheme}, {'x'.join(map(str, self.weight_dims))}, group_size={self.group_size}"


KINDS: dict[tuple[str, type[nn.Module]], type[QuantizedLayer]] = {}
"""(scheme, float layer's class) -> quantized class."""


def quantizes(scheme: str, layer: type[nn.Module]) -> Any:
    """Class decorator: enters the class into KINDS."""

    def add(cls: type[QuantizedLayer]) -> type[QuantizedLayer]:
        cls.scheme = scheme
        KINDS[scheme, layer] = cls
        return cls

    return add


def float_class(layer: nn.Module) -> type[nn.Module]:
    """nn.Linear or nn.Conv2d, whichever `layer` is a kind of."""
    return nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Every quantized layer of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
