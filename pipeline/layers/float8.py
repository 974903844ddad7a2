"""8-bit floats (E4M3): Linear and Conv2d with weights scaled per output channel; activations per token, or in float.

Micikevicius et al., 2022 (arXiv:2209.05433). A channel's largest magnitude becomes 448, the largest E4M3 number; the
rest is torch's cast, to nearest even. Forward and layout are those of compressed-tensors' `float-quantized`.

With `activations="dynamic"` each token of a linear layer's input is cast likewise, at a scale of its own. One
arithmetic, two kernels: `scaled_mm` (torch._scaled_mm, where the GPU multiplies E4M3: compute capability 8.9 or above),
and `float`, which multiplies what was cast, in float. With `activations=None` inputs stay as they are. Few tokens on a
GPU are multiplied by a kernel of `fused.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.layers import kernels
from pipeline.layers.constants import constant
from pipeline.layers.conv import Convolution
from pipeline.layers.fused import FusedLinear, Product, sharing
from pipeline.layers.quantize import wide
from pipeline.layers.quantized import FloatLayer, QuantizedLayer, decoded_product, quantizes

if TYPE_CHECKING:
    from typing_extensions import Self

Activations = Literal["dynamic"] | None
E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
CAPABILITY = (8, 9)
SIGN_AND_VALUE = ~(1 << 14)
"""Of the bits of a moved number: between them stands a copy of the sign."""


def to_float8(values: Tensor, scale: Tensor) -> Tensor:
    """values / scale in E4M3, clamped to its range (the cast itself makes NaN of what lies beyond)."""
    return (values / scale).clamp_(-LARGEST, LARGEST).to(E4M3)


def find_scale(peaks: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales of `dtype` that carry these largest magnitudes to 448; any but 0 where all is zero."""
    scale = (peaks / LARGEST).to(dtype)
    return torch.where(scale == 0, torch.finfo(dtype).eps, scale)


def from_float8(values: Tensor, dtype: torch.dtype) -> Tensor:
    """E4M3 in `dtype`, exactly (but for NaN, which a CPU makes 480).

    A number's bits, moved, are those of a float16 that is 256 times smaller: 15 times as fast as a CPU's cast, which
    takes one number at a time.
    """
    if not kernels.is_cpu(values.device):
        return values.to(dtype)
    bits = values.view(torch.int8).to(torch.int16)
    halves = bits.bitwise_left_shift_(7).bitwise_and_(SIGN_AND_VALUE).view(torch.float16)
    return halves.to(dtype).mul_(256)


@constant
def multiplies_float8(device: torch.device) -> bool:
    """Whether `device` multiplies E4M3 matrices: tried, and compared with the exact product."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        return False
    left = torch.tensor([[448.0, -0.5] * 8, [1.0, 2.0] * 8], device=device)
    right = torch.tensor([[448.0, 448.0] * 8, [-3.0, 0.0625] * 8, [0.0, 1.0] * 8], device=device)
    ones = torch.ones(1, 1, device=device)
    try:
        found = _scaled_mm(left.to(E4M3), right.to(E4M3), ones, ones)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.allclose(found, left @ right.t(), rtol=1e-4)


def _scaled_mm(left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor) -> Tensor:
    """E4M3 [tokens, in] and [out, in], scales [tokens or 1, 1] and [out or 1, 1] -> float32 [tokens, out]."""
    one = torch.ones((), device=left.device)
    tokens, outputs = left.shape[0], right.shape[0]
    # The kernel wants multiples of 16 for all but the tokens. Zero bytes are zero in E4M3, which F.pad does not take.
    left = F.pad(left.view(torch.uint8), (0, -left.shape[1] % 16, 0, -tokens % 16)).view(E4M3)
    right = F.pad(right.view(torch.uint8), (0, -right.shape[1] % 16, 0, -outputs % 16)).view(E4M3)
    sums = torch._scaled_mm(left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=False)
    # Scales by row inside the kernel need newer GPUs and 16-bit results: here they are applied to the float32 sums.
    return sums[:tokens, :outputs] * left_scale.float() * right_scale.float().view(1, -1)


class Float8Layer(QuantizedLayer):
    """Stored: `weight` float8_e4m3fn in the float layer's shape, and `weight_scale` [out, 1] in the weight's dtype."""

    bits = 8
    weight: Tensor

    def __init__(self, layer: FloatLayer, activations: Activations = None, share_flat: bool = False) -> None:
        super().__init__(layer)
        self.activations, self.share_flat = activations, share_flat
        device, dtype = layer.weight.device, layer.weight.dtype
        self.register_buffer("weight", torch.empty(self.weight_dims, dtype=E4M3, device=device))
        self.register_buffer("weight_scale", torch.empty(self.rows, 1, dtype=dtype, device=device))

    @classmethod
    def from_float(cls, layer: FloatLayer, **settings: Any) -> Self:
        made = cls(layer, **settings)
        rows = wide(layer.weight).flatten(1)
        made.weight_scale = find_scale(rows.abs().amax(1, keepdim=True), layer.weight.dtype)
        made.weight = to_float8(rows, made.weight_scale.to(rows.dtype)).view(made.weight_dims)
        return made.like(layer)

    def decoded_rows(self, begin: int, end: int) -> Tensor:
        scale = self.weight_scale[begin:end]
        return from_float8(self.weight[begin:end].flatten(1), scale.dtype).mul_(scale)

    def settings(self) -> dict[str, Any]:
        return {"activations": self.activations, "share_flat": self.share_flat}

    def _apply(self, fn: Any, recurse: bool = True) -> Float8Layer:
        # `model.to(dtype)` casts what is floating point, which E4M3 is; it is moved as bytes.
        self.weight = self.weight.view(torch.uint8)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.weight = self.weight.view(E4M3)
        return self


@quantizes("fp8", nn.Linear)
class Float8Linear(Float8Layer, FusedLinear):
    """`share_flat`: one activation scale for all rows of a two-dimensional input, as `linear.Int8Linear` explains.

    No gradient flows where activations are cast.
    """

    def __init__(self, layer: FloatLayer, **settings: Any) -> None:
        super().__init__(layer, **settings)
        self.out_features, self.in_features = self.weight_dims
        name = "float8_product" if self.activations is None else "float8_tokens_product"
        self.product = Product(name, self.in_features, self.out_features)
        self.probe = "fp8", (("activations", self.activations),)

    def fused_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        assert self.product is not None
        weight, scale = self._buffers["weight"], self._buffers["weight_scale"]
        setting = () if self.activations is None else (sharing(self.share_flat, x), torch.finfo(x.dtype).eps)
        return self.product(x, weight, scale, bias, setting=setting)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and self.fuses(x):
            return self.fused_product(x, self.bias)
        if self.activations is None:
            return decoded_product(x, self, self.bias)
        peaks = x.detach().abs().amax() if self.share_flat and x.ndim == 2 else x.detach().abs().amax(-1, keepdim=True)
        scale = find_scale(peaks, x.dtype)
        cast = to_float8(x.detach(), scale)
        if self._scaled():
            rows = cast.view(-1, self.in_features)
            y = _scaled_mm(rows, self.weight, scale.reshape(-1, 1), self.weight_scale)
            y = y.to(x.dtype) if self.bias is None else (y + self.bias.float()).to(x.dtype)
            return y.view(*x.shape[:-1], self.out_features)
        return decoded_product(cast.to(x.dtype) * scale, self, self.bias)

    def _scaled(self) -> bool:
        plain = kernels.forced_kernel() == "float" or torch.compiler.is_compiling()
        return not plain and multiplies_float8(self.weight.device)

    @property
    def kernel(self) -> str:
        if self.activations is None:
            return self.named("dequantize")
        return self.named("scaled_mm" if self._scaled() else "float")


@quantizes("fp8", nn.Conv2d)
class Float8Conv2d(Convolution, Float8Layer):
    """Weights alone: no convolution takes E4M3."""

    def __init__(self, layer: FloatLayer, **settings: Any) -> None:
        super().__init__(layer, **settings)
        self.take_geometry(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.dequantized().to(x.dtype), self.bias)
