"""Fused kernels for few tokens on a GPU: whether a layer has one that is right here, and how each is called.

A quantized layer that is computed by torch's operators starts several kernels where nn.Linear starts one; at one token
a GPU waits for these starts. `triton_kernels.py` has one kernel for each kind of weight. They run up to `TOKENS` tokens
at once, where no gradient is wanted, if Triton is there (it comes with torch for CUDA and is no dependency) and the
kernel gave on a small layer of the same settings what that layer gives on the CPU; else the layer computes as it does
without.
"""

from __future__ import annotations

import importlib
import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.layers import kernels
from pipeline.layers.constants import constant
from pipeline.layers.quantized import KINDS, QuantizedLayer

TOKENS = kernels.INTEGER_ROWS
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = 8
"""Outputs of a program."""
VALUES = 1024
"""Of a row, at most, that a program takes at once for one token; for more, as many times fewer."""
TOKENS_TOGETHER = 4
"""For which a program decodes a weight once: their sums are held in registers."""
NAME = "triton"

OPTIONS: dict[str, dict[str, Any]] = {
    "packed_product": {},
    "nf4_product": {"enable_fp_fusion": False},  # torch rounds between the product and the sum that make a maximum
    "float8_product": {},
    "float8_tokens_product": {},
    "int8_product": {},
}
"""The kernels, with what the compiler is told."""


class Product:
    """The start of a kernel for layers of one size. Copied and pickled without what was compiled."""

    def __init__(self, name: str, features: int, outputs: int, length: int = 1, *settings: Any) -> None:
        """`length`: values that make whole bytes. `settings`: what the kernel takes after FEATURES, in its order."""
        self.made_of = name, features, outputs, length, *settings
        self.name, self.features, self.outputs = name, features, outputs
        self._compiled: dict[Any, Any] = {}

    def __reduce__(self) -> tuple[type[Product], tuple[Any, ...]]:
        return Product, self.made_of

    def __call__(self, x: Tensor, *tensors: Tensor | None, setting: tuple[Any, ...] = ()) -> Tensor:
        """x [..., features] times what `tensors` hold, in the kernel's order: [..., outputs] in the dtype of x.

        Triton finds out at each start what its arguments are like, which takes longer than the start itself. Here that
        is known from `setting`, tokens, device and dtypes, if addresses are multiples of 16 as those of whole tensors
        are: what was compiled is then started directly.
        """
        index = x.get_device()
        if x.is_cuda and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                return self(x, *tensors, setting=setting)
        tokens = x.numel() // self.features
        y = x.new_empty((*x.shape[:-1], self.outputs))
        addresses = 0
        given: list[Tensor | None] = [x, *tensors, y]
        dtypes: list[torch.dtype | None] = [None] * len(given)
        for place, tensor in enumerate(given):
            if tensor is not None:
                if not tensor.is_contiguous():
                    given[place] = tensor = tensor.contiguous()
                dtypes[place] = tensor.dtype
                addresses |= tensor.data_ptr()
        key = tokens, index, setting, *dtypes
        found = None if addresses % 16 else self._compiled.get(key)
        if found is None:
            _, _, _, length, *settings = self.made_of
            together = min(TOKENS_TOGETHER, _power_above(tokens))
            units = min(VALUES // length // together, _power_above(-(-self.features // length)))
            grid = (-(-self.outputs // ROWS), -(-tokens // together), 1)
            fixed = (tokens, self.outputs, self.features, *settings, *setting, together, ROWS, units)
            compiled = _kernel(self.name)[grid](*given, *fixed, **OPTIONS[self.name])
            if not addresses % 16 and compiled is not None:  # Triton's interpreter compiles nothing
                self._compiled[key] = compiled[grid], fixed
        else:
            start, fixed = found
            start(*given, *fixed)
        return y


class FusedLinear(QuantizedLayer):
    """A linear layer for which there is a fused kernel."""

    in_features: int
    out_features: int
    product: Product | None = None
    """None: the kernels cannot read the layer's layout."""
    probe: tuple[str, tuple[tuple[str, Any], ...]]
    """Scheme and settings of the small layer on which the kernel is tried."""

    @property
    def float_dtype(self) -> torch.dtype:
        """dtype of the dequantized weight: that of the scales."""
        return self.weight_scale.dtype

    @abstractmethod
    def fused_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., in] times the weight, plus the bias, by the kernel: [..., out]."""

    def fuses(self, x: Tensor) -> bool:
        """Whether `fused_product` is to multiply x [..., in]."""
        return (
            x.is_cuda
            and not torch.compiler.is_compiling()
            and type(x) is Tensor  # neither a fake one nor a shard
            and 0 < x.numel() <= TOKENS * self.in_features
            and not (torch.is_grad_enabled() and (x.requires_grad or getattr(self.bias, "requires_grad", False)))
            and not torch.is_autocast_enabled("cuda")
            and x.dtype == self.float_dtype
            and self._runs(x.device, x.dtype)
        )

    def _runs(self, device: torch.device, dtype: torch.dtype) -> bool:
        if self.product is None or dtype not in DTYPES:
            return False
        forced = kernels.forced_kernel()
        return works(*self.probe, device, dtype) if forced is None else forced == NAME

    def named(self, otherwise: str) -> str:
        """What `kernel` says of a layer that `otherwise` computes where no fused kernel does."""
        scale = self.weight_scale
        fused = scale.is_cuda and type(scale) is Tensor and self._runs(scale.device, self.float_dtype)
        return f"{NAME} up to {TOKENS} tokens, then {otherwise}" if fused else otherwise


@constant
def works(scheme: str, settings: tuple[tuple[str, Any], ...], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel of such layers compiles on `device` and gives, for one token and for three, what the layer
    gives on the CPU; one token twice, since what was compiled is started another way. Whatever goes wrong in a compiler
    or a driver counts as no.
    """
    group = dict(settings).get("group_size") or dict(settings).get("block_size")
    layer, x = small_layer(scheme, 19, 2 * group if group else 200, dtype, **dict(settings))
    with kernels.forced("reference"):
        want = layer(x)
    try:
        layer, x = layer.to(device), x.to(device)
        found = torch.cat([layer.fused_product(part, layer.bias) for part in (x[:1], x[:1], x)])
    except Exception:
        return False
    return nearly(found.cpu(), torch.cat((want[:1], want[:1], want)))


def small_layer(
    scheme: str, outputs: int, features: int, dtype: torch.dtype, **settings: Any
) -> tuple[FusedLinear, Tensor]:
    """A layer of fixed weights, and three tokens [3, features] for it, on the CPU."""
    linear = nn.utils.skip_init(nn.Linear, features, outputs, dtype=dtype)  # type: ignore[no-untyped-call]
    places = torch.arange(outputs * features, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(places.mul(0.7).sin().view(outputs, features))
        linear.bias.copy_(places[:outputs].cos())
    x = torch.arange(3 * features, dtype=torch.float64).mul(1.3).cos().view(3, features).to(dtype)
    layer = KINDS[scheme, nn.Linear].from_float(linear, **settings)
    assert isinstance(layer, FusedLinear)
    return layer, x


def nearly(found: Tensor, want: Tensor, roundings: int = 1) -> bool:
    """Whether two results differ by no more than the order of their sums and so many roundings of each explain."""
    error = (found.double() - want.double()).norm() / want.double().norm()
    return bool(error < roundings * torch.finfo(want.dtype).eps + 2e-6)


def sharing(share_flat: bool, x: Tensor) -> int:
    """How many tokens at most share one activation scale, as the kernels take it; 0: each has its own."""
    return TOKENS if share_flat and x.ndim == 2 else 0


def values_in_bytes(bits: int) -> int:
    """How many packed values make whole bytes."""
    return 8 // math.gcd(bits, 8)


def _power_above(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


def _kernel(name: str) -> Any:
    return getattr(importlib.import_module("pipeline.layers.triton_kernels"), name)
