"""4-bit NormalFloat: Linear, Conv2d, Embedding and EmbeddingBag with weights at the quantiles of a normal distribution.

Dettmers et al., 2023 (arXiv:2305.14314). A weight, flattened, is cut into blocks; each is divided by its absolute
maximum and rounded to the nearest of 16 values. Double quantization stores these maxima in 8 bits too: less their mean,
in blocks of 256 with a scale each. The paper takes 8-bit floats for them; these are 8-bit integers, symmetric, whose
error on the maxima of normal weights is a third (root mean square). Codes are found against the maxima as stored. Zero
is one of the 16 values, so masked weights stay zero.

A layer multiplies by its dequantized weight, made anew in the forward and again in the backward pass: it is never kept
between them, and gradients flow to the input. Few tokens on a GPU are multiplied by a kernel of `fused.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.layers.constants import constant
from pipeline.layers.conv import Convolution
from pipeline.layers.embedding import Bags, Table
from pipeline.layers.fused import FusedLinear, Product
from pipeline.layers.packing import pack_int32, packed_columns, unpack_int32
from pipeline.layers.quantize import wide
from pipeline.layers.quantized import FloatLayer, QuantizedLayer, decoded_product, quantizes

if TYPE_CHECKING:
    from typing_extensions import Self

VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The data type: quantiles of N(0, 1), 8 below zero and 9 from zero up, over the largest (the paper's appendix E)."""
ZERO = VALUES.index(0.0)
SCALE_BLOCK = 256
"""Maxima that share a scale under double quantization."""


def nf4_codes(normalized: Tensor) -> Tensor:
    """Values in [-1, 1] -> int8 codes in [-8, 7]: the place of the nearest value less that of zero, 1.0 being -8.

    So a stored zero means a weight of zero, and four bits hold a code as they hold a signed integer.
    """
    table = torch.tensor(VALUES, dtype=torch.float64)
    edges = ((table[1:] + table[:-1]) / 2).to(normalized.device, normalized.dtype)
    places = torch.bucketize(normalized, edges) - ZERO
    return torch.where(places == len(VALUES) - 1 - ZERO, -8, places).to(torch.int8)


def nf4_values(codes: Tensor) -> Tensor:
    """Inverse of `nf4_codes`: int8 in [-8, 7] -> float32."""
    return _stored_order(codes.device)[(codes + 8).to(torch.int32)]


@constant
def _stored_order(device: torch.device) -> Tensor:
    """The values that packed codes 0 to 15 stand for: float32 [16]."""
    with torch.inference_mode(False):
        return torch.tensor((VALUES[-1], *VALUES[:-1]), dtype=torch.float32, device=device)


@constant
def _pairs(device: torch.device) -> Tensor:
    """The two values that a byte of packed codes stands for, low bits first: float32 [256, 2] as float64 [256]."""
    with torch.inference_mode(False):
        table = _stored_order(device)
        return torch.stack((table.repeat(16), table.repeat_interleave(16)), dim=1).view(torch.float64).view(-1)


def unpack_values(packed: Tensor, columns: int) -> Tensor:
    """Packed codes int32 [rows, words] -> values float32 [rows, columns].

    By byte, whose two values are moved as one number: on a CPU eight times as fast as by code.
    """
    if packed.stride() != (packed.shape[1], 1):  # `contiguous` leaves a dimension of one element as it is
        packed = packed.clone(memory_format=torch.contiguous_format)
    octets = packed.view(torch.uint8).view(-1).to(torch.int32)
    values = _pairs(packed.device).index_select(0, octets).view(torch.float32)
    return values.view(len(packed), 8 * packed.shape[1])[:, :columns]


def block_maxima(weight: Tensor, block_size: int) -> Tensor:
    """Absolute maxima [blocks], in float32 at least, of a weight flattened into blocks; the last may be shorter."""
    flat = wide(weight).flatten()
    return F.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size).abs().amax(1)


def double_quantize(maxima: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Maxima [blocks] -> (int8 [blocks], scales [blocks / 256] and the mean [1], both of `dtype`)."""
    mean = maxima.mean().view(1).to(dtype)
    groups = F.pad(maxima - mean, (0, -maxima.numel() % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    scale = (groups.abs().amax(1) / 127).to(dtype)
    scale = torch.where(scale == 0, torch.finfo(dtype).eps, scale)
    integers = (groups / scale.unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8)
    return integers.flatten()[: maxima.numel()], scale, mean


class NF4Layer(QuantizedLayer):
    """What the NF4 forms of all layers share.

    Stored: `weight_packed` int32 [rows, words], eight codes a word; `weight_scale` [blocks], the maxima in the weight's
    dtype, or int8 under double quantization, with `weight_scale_scale` and `weight_scale_mean` in that dtype.
    """

    bits = 4
    weight_packed: Tensor
    weight_scale_scale: Tensor
    weight_scale_mean: Tensor

    def __init__(self, layer: FloatLayer, block_size: int, double_quant: bool) -> None:
        super().__init__(layer)
        self.block_size = self.group_size = block_size
        self.double_quant = double_quant
        device, dtype = layer.weight.device, layer.weight.dtype
        blocks = -(-self.rows * self.columns // block_size)
        words = packed_columns(self.columns, self.bits)
        self.register_buffer("weight_packed", torch.empty(self.rows, words, dtype=torch.int32, device=device))
        stored = torch.int8 if double_quant else dtype
        self.register_buffer("weight_scale", torch.empty(blocks, dtype=stored, device=device))
        if double_quant:
            scales = torch.empty(-(-blocks // SCALE_BLOCK), dtype=dtype, device=device)
            self.register_buffer("weight_scale_scale", scales)
            self.register_buffer("weight_scale_mean", torch.empty(1, dtype=dtype, device=device))

    @classmethod
    def from_float(cls, layer: FloatLayer, **settings: Any) -> Self:
        made = cls(layer, **settings)
        weight = layer.weight.detach()
        maxima = block_maxima(weight, made.block_size)
        if made.double_quant:
            integers, scale, mean = double_quantize(maxima, weight.dtype)
            made.weight_scale, made.weight_scale_scale, made.weight_scale_mean = integers, scale, mean
        else:
            made.weight_scale = maxima.to(weight.dtype)
        spread = made.spread_maxima().view(made.rows, made.columns)
        # A block of zeros, or one whose maximum is stored as zero, is zero whatever its codes.
        normalized = wide(weight).flatten(1) / torch.where(spread == 0, 1, spread)
        made.weight_packed = pack_int32(nf4_codes(normalized.float()), made.bits)
        return made.like(layer)

    def maxima(self, begin: int = 0, end: int | None = None) -> Tensor:
        """The absolute maximum of each block from `begin` to `end`, as stored: float32 [blocks]."""
        stored = self.weight_scale[begin:end]
        if not self.double_quant:
            return stored.float()
        first = begin // SCALE_BLOCK
        scales = self.weight_scale_scale[first : -(-(begin + len(stored)) // SCALE_BLOCK)].float()
        scale = scales.repeat_interleave(SCALE_BLOCK)[begin - first * SCALE_BLOCK :][: len(stored)]
        # Rounding may carry the smallest below zero.
        return (stored * scale + self.weight_scale_mean.float()).clamp_min_(0)

    def spread_maxima(self) -> Tensor:
        """The maximum of its block for each weight: float32 [rows * columns]."""
        return self.maxima().repeat_interleave(self.block_size)[: self.rows * self.columns]

    def codes(self) -> Tensor:
        """int8 [rows, columns], as of `nf4_codes`."""
        return unpack_int32(self.weight_packed, self.bits, self.columns)

    def stored_weight(self) -> Tensor:
        """The weight that the codes stand for, without any adapter beside them."""
        return self.decoded_rows(0, self.rows).view(self.weight_dims)

    def decoded_rows(self, begin: int, end: int) -> Tensor:
        flat = unpack_values(self.weight_packed[begin:end], self.columns).flatten()
        first, before = divmod(begin * self.columns, self.block_size)  # a block may begin in the row before
        after = -(before + flat.numel()) % self.block_size
        padded = F.pad(flat, (before, after)).view(-1, self.block_size)
        weight = padded.mul_(self.maxima(first, first + len(padded)).unsqueeze(1)).view(-1)
        return weight[before : before + flat.numel()].view(-1, self.columns).to(self.float_dtype)

    @property
    def float_dtype(self) -> torch.dtype:
        """dtype of the dequantized weight: that of the scales."""
        return (self.weight_scale_scale if self.double_quant else self.weight_scale).dtype

    def sparse_values(self) -> tuple[str, Tensor] | None:
        return ("weight_packed", self.codes()) if self.sparse else None

    def settings(self) -> dict[str, Any]:
        return {"block_size": self.block_size, "double_quant": self.double_quant}


class _DequantizedProduct(torch.autograd.Function):
    """F.linear by an NF4 weight, which is dequantized again for the gradient of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: NF4Layer) -> Tensor:
        ctx.layer = layer
        return decoded_product(x, layer, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad = grads[0]
        x = grad @ ctx.layer.stored_weight().to(grad.dtype) if ctx.needs_input_grad[0] else None
        return x, grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None, None


def dequantized_product(x: Tensor, bias: Tensor | None, layer: NF4Linear) -> Tensor:
    """x [..., in] times the stored weight of `layer`, and the bias; the weight is not kept for the backward pass."""
    if x.is_cuda and layer.fuses(x):
        return layer.fused_product(x, bias)
    y: Tensor = _DequantizedProduct.apply(x, bias, layer)  # type: ignore[no-untyped-call]
    return y


@quantizes("nf4", nn.Linear)
class NF4Linear(NF4Layer, FusedLinear):
    """Weights of 4 bits, activations in float."""

    def __init__(self, layer: FloatLayer, **settings: Any) -> None:
        super().__init__(layer, **settings)
        self.out_features, self.in_features = self.weight_dims
        if self.in_features % self.block_size == 0 and self.block_size % 2 == 0:  # no byte is of two blocks
            sizes = self.in_features, self.out_features, 2, self.block_size, SCALE_BLOCK
            self.product = Product("nf4_product", *sizes)
        self.probe = "nf4", (("block_size", self.block_size), ("double_quant", self.double_quant))

    def fused_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        assert self.product is not None
        stored = self._buffers
        names = ("weight_packed", "weight_scale", "weight_scale_scale", "weight_scale_mean")
        return self.product(x, *(stored.get(name) for name in names), _stored_order(x.device), bias)

    def forward(self, x: Tensor) -> Tensor:
        return dequantized_product(x, self.bias, self)

    @property
    def kernel(self) -> str:
        return self.named("dequantize")


@quantizes("nf4", nn.Conv2d)
class NF4Conv2d(Convolution, NF4Layer):
    """Blocks run on from the kernels of a channel into the next's, so that short filters share one too."""

    def __init__(self, layer: FloatLayer, **settings: Any) -> None:
        super().__init__(layer, **settings)
        self.take_geometry(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.dequantized().to(x.dtype), self.bias)


class _NF4Rows(NF4Layer, Table):
    def __init__(self, layer: FloatLayer, **settings: Any) -> None:
        super().__init__(layer, **settings)
        self.take_geometry(layer)

    def lookup(self, ids: Tensor) -> Tensor:
        values = unpack_values(self.weight_packed[ids], self.columns)
        places = ids.unsqueeze(1) * self.columns + torch.arange(self.columns, device=ids.device)
        return (values * self.maxima()[places // self.block_size]).to(self.float_dtype)


@quantizes("nf4", nn.Embedding)
class NF4Embedding(_NF4Rows):
    """Rows of 4-bit values."""


@quantizes("nf4", nn.EmbeddingBag)
class NF4EmbeddingBag(_NF4Rows, Bags):
    """Sums, means or maxima of bags."""
