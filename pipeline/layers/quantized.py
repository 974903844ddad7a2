"""What every quantized layer shares: geometry, stored tensors, conversion from float, and the table of kinds.

The stored tensors have the names and shapes of compressed-tensors on disk: `weight` int8 (int-quantized), or
`weight_packed` int32 and `weight_shape` (pack-quantized), with `weight_scale` [out, groups], `weight_zero_point` (int8,
packed along the rows where weights are packed) and `bias`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import LeanfitError
from pipeline.layers import kernels
from pipeline.layers.packing import pack_int32, packed_columns, unpack_int32, unpack_unsigned
from pipeline.layers.quantize import Grid, Quantized, dequantize_rows, quantize_rows
from pipeline.layers.sparsity import MASK

if TYPE_CHECKING:
    from typing_extensions import Self

FloatLayer = nn.Linear | nn.Conv2d | nn.Embedding | nn.EmbeddingBag
"""Float layers that have quantized forms; a subclass of one is treated as it is."""

Form = TypeVar("Form", bound=nn.Module)


class QuantizedLayer(nn.Module):
    """A layer whose weight is stored in few bits. Subclasses say in which, and how the layer runs.

    `sparse`: it came from a masked weight, and its zeros are worth storing as a bitmask.
    """

    scheme: ClassVar[str]
    """'int8' (W8A8), 'weight_only', ...: with `settings()`, all that is needed to make the layer anew."""
    bits: int
    group_size: int | None = None
    sparse: bool = False
    weight_dims: tuple[int, ...]
    weight_scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, layer: FloatLayer) -> None:
        """Room for the quantized form of `layer`, not yet filled."""
        super().__init__()
        self.weight_dims = tuple(layer.weight.shape)
        bias = getattr(layer, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    @abstractmethod
    def from_float(cls, layer: FloatLayer, **settings: Any) -> Self:
        """The quantized form of `layer`, rounded to nearest; its bias is shared, its mask becomes `sparse`."""

    def dequantized(self) -> Tensor:
        """The weight that is stored, in the float layer's shape and the scales' dtype."""
        return self.decoded_rows(0, self.rows).view(self.weight_dims)

    @abstractmethod
    def decoded_rows(self, begin: int, end: int) -> Tensor:
        """Rows `begin` to `end` of the weight that the stored integers or codes stand for, [end - begin, columns]."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the constructor needs beside the float layer, as JSON."""

    def sparse_values(self) -> tuple[str, Tensor] | None:
        """(name of the tensor, its integers in the float layer's shape) to store as a bitmask; None: as it is."""
        return None

    def lent(self) -> list[Tensor]:
        """Tensors in which a kernel has the weight, beside or in place of what is stored."""
        return []

    @property
    def kernel(self) -> str:
        """Name of what runs the layer's products."""
        return "dequantize"

    @property
    def rows(self) -> int:
        return self.weight_dims[0]

    @property
    def columns(self) -> int:
        return math.prod(self.weight_dims[1:])

    def like(self, layer: FloatLayer) -> Self:
        """Takes over the mode of `layer` and whether it was masked."""
        self.sparse = hasattr(layer, MASK)
        self.training = layer.training
        return self

    def extra_repr(self) -> str:
        return f"{self.scheme}, {self.bits} bits, {'x'.join(map(str, self.weight_dims))}, group_size={self.group_size}"


class IntegerLayer(QuantizedLayer):
    """A layer whose weight is integers on a `Grid`, as bytes or packed."""

    packed: ClassVar[bool]

    weight: Tensor
    weight_packed: Tensor
    weight_zero_point: Tensor | None

    def __init__(self, layer: FloatLayer, grid: Grid) -> None:
        super().__init__(layer)
        self.grid, self.bits, self.group_size = grid, grid.bits, grid.group_size
        device, dtype = layer.weight.device, layer.weight.dtype
        groups = 1 if grid.group_size is None else self.columns // grid.group_size
        if self.packed:
            words = packed_columns(self.columns, self.bits)
            self.register_buffer("weight_packed", torch.empty(self.rows, words, dtype=torch.int32, device=device))
            self.register_buffer("weight_shape", torch.tensor(self.weight_dims, device=device))
        else:
            self.register_buffer("weight", torch.empty(self.weight_dims, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.empty(self.rows, groups, dtype=dtype, device=device))
        zeros = None
        if not grid.symmetric:
            shape = (packed_columns(self.rows, self.bits), groups) if self.packed else (self.rows, groups)
            zeros = torch.empty(shape, dtype=torch.int32 if self.packed else torch.int8, device=device)
        self.register_buffer("weight_zero_point", zeros)

    @classmethod
    def from_float(cls, layer: FloatLayer, **settings: Any) -> Self:
        made = cls(layer, **settings)
        made.fill(quantize_rows(layer.weight.detach().flatten(1), made.grid))
        return made.like(layer)

    def fill(self, quantized: Quantized) -> None:
        """Store integers [rows, columns] with their scales and zero points, however they were found."""
        self.set_integers(quantized.integers)
        self.weight_scale = quantized.scale.contiguous()
        zeros = quantized.zero_point
        if zeros is not None:
            zeros = pack_int32(zeros.t().contiguous(), self.bits).t().contiguous() if self.packed else zeros
        self.weight_zero_point = zeros

    def integers(self) -> Tensor:
        """int8 [rows, columns] (a convolution's kernels flattened)."""
        if self.packed:
            return (self.unsigned_rows(0, self.rows) - (1 << (self.bits - 1))).view(torch.int8)  # bytes wrap around
        return self.weight.flatten(1)

    def unsigned_rows(self, begin: int, end: int) -> Tensor:
        """Rows `begin` to `end` of packed integers, each plus 2^(bits-1): uint8 [end - begin, columns]."""
        return unpack_unsigned(self.weight_packed[begin:end], self.bits, self.columns)

    def zero_points(self) -> Tensor | None:
        """int8 [rows, groups]; None where the grid is symmetric."""
        if self.weight_zero_point is None or not self.packed:
            return self.weight_zero_point
        return unpack_int32(self.weight_zero_point.t().contiguous(), self.bits, self.rows).t()

    def set_integers(self, integers: Tensor) -> None:
        """Store int8 [rows, columns]."""
        if self.packed:
            self.weight_packed = pack_int32(integers, self.bits)
        else:
            self.weight = integers.view(self.weight_dims)

    def decoded_rows(self, begin: int, end: int) -> Tensor:
        scale, zeros = self.weight_scale[begin:end], self.zero_points()
        zeros = None if zeros is None else zeros[begin:end]
        if self.packed:
            return dequantize_rows(self.unsigned_rows(begin, end), scale, zeros, offset=1 << (self.bits - 1))
        return dequantize_rows(self.weight[begin:end].flatten(1), scale, zeros)

    def sparse_values(self) -> tuple[str, Tensor] | None:
        if not self.sparse or not self.grid.symmetric:
            return None
        integers = self.integers()
        return ("weight_packed", integers) if self.packed else ("weight", integers.view(self.weight_dims))

    def settings(self) -> dict[str, Any]:
        return {}


DECODED = 1 << 19
"""Weights that a CPU decodes at once: 2 MB in float32, which stay in its cache. A copy of a large layer is a new piece
of memory each time, whose pages the system hands out and clears one by one: three to ten times the time."""


def decoded_product(x: Tensor, layer: QuantizedLayer, bias: Tensor | None) -> Tensor:
    """x [..., in] times the decoded weight of a linear layer, plus bias, in the dtype of x: [..., out].

    On a CPU some of its rows at a time, where no gradient is wanted: no copy of a large weight is then held, either.
    """
    step, outputs = max(16, DECODED // layer.columns), layer.rows
    trained = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if outputs <= step or trained or not kernels.is_cpu(x.device) or torch.compiler.is_compiling():
        return F.linear(x, layer.decoded_rows(0, outputs).to(x.dtype), bias)
    y: Tensor | None = None
    for begin, end in parts(outputs, step):
        weight = layer.decoded_rows(begin, end).to(x.dtype)
        part = F.linear(x, weight, None if bias is None else bias[begin:end])
        del weight
        if y is None:
            y = part.new_empty(*part.shape[:-1], outputs)
        y[..., begin:end] = part
        del part
    assert y is not None
    return y


def parts(rows: int, step: int) -> list[tuple[int, int]]:
    """Where each `step` of `rows` begins and ends."""
    return [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


KINDS: dict[tuple[str, type[nn.Module]], type[QuantizedLayer]] = {}
"""(scheme, float layer's class) -> quantized class."""


def quantizes(scheme: str, layer: type[nn.Module]) -> Any:
    """Class decorator: enters the class into KINDS."""

    def add(cls: type[QuantizedLayer]) -> type[QuantizedLayer]:
        cls.scheme = scheme
        KINDS[scheme, layer] = cls
        return cls

    return add


def form_of(
    table: Mapping[tuple[str, type[nn.Module]], type[Form]], scheme: str, layer: nn.Module, name: str = "a layer"
) -> type[Form]:
    """Which class of `table`, by scheme and float layer's class, is for `layer`; a subclass is taken for its base.

    Raises:
        LeanfitError: none of them.
    """
    forms = {cls: form for (of, cls), form in table.items() if of == scheme}
    for cls, form in forms.items():
        if isinstance(layer, cls):
            return form
    if not forms:
        raise LeanfitError(f"there is no scheme {scheme!r}; there are {', '.join(sorted({of for of, _ in table}))}")
    have = ", ".join(sorted(cls.__name__ for cls in forms))
    raise LeanfitError(f"{name} ({type(layer).__name__}) has no {scheme!r} form; {have} have one")


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Every quantized layer of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
