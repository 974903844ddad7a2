"""Quantized forms of nn.Linear: int8 W8A8, and weights alone in 2 to 8 bits. Forward and layout as compressed-tensors.

Weight-only layers multiply in the model's dtype by the dequantized weight, made anew each time: they save memory and
disk, not time. But few tokens are multiplied by kernels that decode as they read: on a CPU one by the int8 kernel's,
where 8 bits have one scale a row, else up to `bagged.TOKENS` (`bagged.py`); on a GPU those of `fused.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.layers import bagged, kernels
from pipeline.layers.fused import FusedLinear, Product, sharing, values_in_bytes
from pipeline.layers.offload import place_of
from pipeline.layers.packing import pack_int32, unpack_unsigned
from pipeline.layers.quantize import Grid
from pipeline.layers.quantized import FloatLayer, IntegerLayer, decoded_product, quantizes
from pipeline.layers.weight_only import WeightOnly


class CopiedLinear(FusedLinear, IntegerLayer):
    """Weights of which a kernel has a packed form of its own. Whatever changes the weights makes that void."""

    def __init__(self, layer: FloatLayer, grid: Grid) -> None:
        super().__init__(layer, grid)
        self.out_features, self.in_features = self.weight_dims
        self._packed = kernels.Packed()

    def void(self) -> None:
        """Leave the kernel's form."""
        self._packed = kernels.Packed()

    def set_integers(self, integers: Tensor) -> None:
        super().set_integers(integers)
        self._packed = kernels.Packed()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.void()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.void()
        super()._load_from_state_dict(*args, **kwargs)


class KernelLinear(CopiedLinear):
    """int8 weights per output channel whose products an int8 kernel makes."""

    packed = False

    def __init__(self, layer: FloatLayer) -> None:
        super().__init__(layer, Grid(bits=8))
        self.product = Product("int8_product", self.in_features, self.out_features)
        self.probe = "int8", ()

    @property
    def kernel(self) -> str:
        few, many = (kernels.choose(self.weight.device, self.weight_scale.dtype, rows) for rows in (1, 64))
        if (fused := self.named(many)) != many:
            return fused
        return few if few == many else f"{few} up to {kernels.INTEGER_ROWS} tokens, then {many}"


@quantizes("int8", nn.Linear)
class Int8Linear(KernelLinear):
    """int8 weights per output channel, int8 activations per token, integer products (`layers/kernels.py`).

    `share_flat`: one activation scale for all rows of a two-dimensional input. compressed-tensors quantizes so (its
    token strategy keeps the first two dimensions), and language models whose code flattens [batch, tokens] before a
    layer, as OPT's does before its feed-forward, give the same logits here and there only if this does too.
    """

    def __init__(self, layer: FloatLayer, share_flat: bool = False) -> None:
        super().__init__(layer)
        self.share_flat = share_flat
        self._siblings: Siblings | None = None
        self._place = 0

    def forward(self, x: Tensor) -> Tensor:
        # Attributes of nn.Module are looked for in Python, and a token waits for that at every layer.
        bias = self._parameters.get("bias")
        if not torch.compiler.is_compiling():
            if x.is_cuda and self.fuses(x):
                return self.fused_product(x, bias)
            if self._siblings is not None:
                found = self._siblings.take(self, x)
                if found is not None:
                    return found
            elif self._packed.value is not None and kernels.is_fast_token(x, self.in_features):
                y = kernels.token_product(x, self._packed.value)
                return y if bias is None else y.add_(bias)
        return kernels.int8_linear(x, self.weight, self.weight_scale, bias, self._packed, self.share_flat)

    def fused_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        assert self.product is not None
        weight, scale = self._buffers["weight"], self._buffers["weight_scale"]
        return self.product(x, weight, scale, None, bias, setting=(sharing(self.share_flat, x),))

    def settings(self) -> dict[str, Any]:
        return {"share_flat": self.share_flat}


class Siblings:
    """int8 layers that are given the same tensor one after another, as query, key and value are: one product for all.

    At one token, to quantize the input and start a product takes longer than to read 768 x 768 weights. The first layer
    multiplies by the weights of all, one below another; the others, given that very tensor, take their part, once each.
    A layer that is given another tensor multiplies by itself. What must not happen, and in attention does not: that
    the tensor is changed in place between the calls. The group's packed weights are made anew when a layer's are void.
    """

    def __init__(self, layers: Sequence[Int8Linear]) -> None:
        """Joins `layers`, in the order in which the model calls them; all have one input width and `share_flat`."""
        self.layers = tuple(layers)
        self.sizes = [layer.out_features for layer in layers]
        self._forget()
        for place, layer in enumerate(layers):
            layer._siblings, layer._place = self, place

    def _forget(self) -> None:
        self._packed: Any = None
        self._packed_of: list[kernels.Packed] = []
        self._given: tuple[Tensor, list[Tensor | None]] | None = None
        """An input, and the outputs that are still to be taken: one object, since threads may share a model."""

    def take(self, layer: Int8Linear, x: Tensor) -> Tensor | None:
        """The output of `layer` at `x`, or None: there is none, and the layer is to multiply itself."""
        place = layer._place
        if place == 0:
            outputs = self._multiply(x)
            given = self._given = (x, outputs) if outputs else None  # else it would be held until the next pass
        else:
            given = self._given
        if given is None or given[0] is not x:
            return None
        outputs = given[1]
        found, outputs[place] = outputs[place], None
        if place == len(outputs) - 1:
            self._given = None
        return found

    def _multiply(self, x: Tensor) -> list[Tensor | None]:
        """Outputs of all layers at `x`; none where no kernel of FBGEMM's takes it."""
        biases: list[Tensor | None] = [layer._parameters.get("bias") for layer in self.layers]
        if kernels.is_fast_token(x, self.layers[0].in_features):
            parts = kernels.token_product(x, self._pack()).split_with_sizes(self.sizes, -1)
            given: list[Tensor] = [bias for bias in biases if bias is not None]
            if len(given) == len(parts):
                return list(torch._foreach_add(parts, given))  # all in one call
            return [part if bias is None else part + bias for part, bias in zip(parts, biases, strict=True)]
        tokens = x.numel() // x.shape[-1]
        if tokens > kernels.INTEGER_ROWS:
            return []
        kernel = kernels.choose(x.device, x.dtype, tokens)
        if kernel not in kernels.FBGEMM:
            return []
        steps, sums = kernels.fbgemm_sums(x, kernel, self._pack(), self.layers[0].share_flat)
        parts = sums.split_with_sizes(self.sizes, -1)
        return [kernels.rescaled(x, steps, part, bias) for part, bias in zip(parts, biases, strict=True)]

    def _pack(self) -> Any:
        if self._packed_of != [layer._packed for layer in self.layers]:
            weights, scales = ([getattr(layer, name) for layer in self.layers] for name in ("weight", "weight_scale"))
            self._packed = kernels.fbgemm_pack(torch.cat(weights), torch.cat(scales))
            self._packed_of = [layer._packed for layer in self.layers]
        return self._packed

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "sizes": self.sizes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


@quantizes("weight_only", nn.Linear)
class WeightOnlyLinear(WeightOnly, CopiedLinear):
    """Packed weights of 2 to 8 bits, a scale for each `group_size` inputs; float activations.

    Few tokens are multiplied without a dequantized copy. One in float32 at 8 bits with one scale a row is by
    `kernels.weight_only_token`, for which a copy of a byte a weight is made and stays. Others are by `bagged.product`,
    and the weights are then held in its form alone, until somebody asks for them as they are stored.
    """

    def __init__(self, layer: FloatLayer, **settings: Any) -> None:
        super().__init__(layer, **settings)
        self._token = self.bits == 8 and self.group_size is None and self.grid.symmetric
        length, group = values_in_bytes(self.bits), self.group_size or self.in_features
        if self.group_size is None or group % length == 0:
            self.product = Product("packed_product", self.in_features, self.out_features, length, self.bits, group)
        self.probe = "weight_only", tuple(self.settings().items())

    @property
    def kernel(self) -> str:
        scale, few = self.weight_scale, ""
        kernel, tokens = kernels.choose(scale.device, torch.float32, 1), bagged.TOKENS.get(scale.dtype, 0)
        if kernel in kernels.FBGEMM and self._token and scale.dtype == torch.float32:
            few = f"{kernel} at one token, then "
        elif kernel in kernels.FBGEMM and tokens and bagged.works(bagged.width_of(self.bits)):
            few = f"bags {'at one token' if tokens == 1 else f'up to {tokens} tokens'}, then "
        return self.named(f"{few}dequantize")

    def fused_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        assert self.product is not None
        stored = self._buffers
        return self.product(x, stored["weight_packed"], stored["weight_scale"], stored["weight_zero_point"], bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and self.fuses(x):
            return self.fused_product(x, self.bias)
        packed, scale = self._packed, self.weight_scale
        if self._token and scale.dtype == torch.float32:
            if kernels.reads_integers(x, scale):
                if packed.value is None:
                    packed.value = kernels.fbgemm_pack(self.integers(), scale)
                return kernels.weight_only_token(x, self.bias, packed.value)
        elif bagged.reads(x, self.bits, scale):
            if packed.value is None and place_of(self.weight_packed) is None:  # what lies in a file stays there
                self.hand_over()
            if packed.value is not None:
                return bagged.product(x, self.bias, packed.value)
        return decoded_product(x, self, self.bias)

    def lent(self) -> list[Tensor]:
        return [part for part in self._packed.value if isinstance(part, Tensor)] if self.handed_over else []

    @property
    def handed_over(self) -> bool:
        return isinstance(self._packed.value, bagged.Packed)

    def hand_over(self) -> None:
        """Hold the weight in the form of `bagged.product` alone."""
        with torch.inference_mode(False), torch.no_grad():
            self._packed.value = bagged.pack(self.integers(), self.bits, self.weight_scale, self.zero_points())
            self.weight_packed = self.weight_packed.new_empty(self.rows, 0)
            if self.weight_scale.dtype == torch.float32:
                self.weight_scale = self._packed.value.scales.squeeze(1).t()  # which are the same, transposed

    def void(self) -> None:
        if self.handed_over:
            with torch.inference_mode(False), torch.no_grad():
                self.weight_packed = pack_int32(self.integers(), self.bits)
                self.weight_scale = self.weight_scale.contiguous()
        super().void()

    def unsigned_rows(self, begin: int, end: int) -> Tensor:
        # In this order, each read once: another thread may hand the weight over, or take it back, meanwhile.
        packed, stored = self._packed, self.weight_packed
        if stored.shape[1]:
            return unpack_unsigned(stored[begin:end], self.bits, self.columns)
        return bagged.unpack(packed.value, begin, end)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.void()
        super()._save_to_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self.void()  # a copy, or what is pickled, has the weights as they are stored
        return self.__dict__
