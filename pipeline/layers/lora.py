"""Low-rank adapters beside a frozen linear layer: LoRA and DoRA, over weights in float or in NF4.

LoRA (Hu et al., 2021, arXiv:2106.09685): y = x W^T + s (dropout(x) A^T) B^T + b, with A [rank, in] drawn as in its
authors' code (Kaiming uniform), B [out, rank] of zeros, and s = alpha / rank, or alpha / sqrt(rank) (Kalajdzievski,
2023, arXiv:2312.03732). So the layer starts as it was.

DoRA (Liu et al., 2024, arXiv:2402.09353): each row of W + s B A is brought to a length m that is trained, at first the
length of the row of W. The length that it is divided by counts as a constant in the backward pass (their section 4.3).

`merge` turns a float layer into the plain nn.Linear that computes the same, up to rounding. Over NF4 there is nothing
to merge into without rounding again, so such a layer is stored as it is: codes, and the adapter's tensors beside them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.layers.nf4 import NF4Linear, dequantized_product
from pipeline.layers.quantize import wide
from pipeline.layers.quantized import FloatLayer, QuantizedLayer, quantized_layers, quantizes


@dataclass(frozen=True)
class LowRank:
    """An adapter's shape and how it enters: `scaling` is s, `magnitude` says DoRA."""

    rank: int
    scaling: float
    dropout: float = 0.0
    magnitude: bool = False


class AdaptedLayer(nn.Module):
    """What adapted layers share. Subclasses say what the frozen weight is and how it multiplies."""

    adapter: LowRank
    in_features: int
    out_features: int
    bias: Any
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter | None

    def base_weight(self) -> Tensor:
        """The frozen weight [out, in]."""
        raise NotImplementedError

    def base_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x times the frozen weight, and the bias."""
        raise NotImplementedError

    def add_adapter(self, adapter: LowRank, like: Tensor) -> None:
        """Tensors for `adapter`, of the dtype and on the device of `like`; not yet drawn."""
        self.adapter = adapter
        self.lora_A = nn.Parameter(like.new_empty(adapter.rank, self.in_features))
        self.lora_B = nn.Parameter(like.new_zeros(self.out_features, adapter.rank))
        self.lora_magnitude = nn.Parameter(like.new_empty(self.out_features)) if adapter.magnitude else None

    @torch.no_grad()
    def reset_adapter(self, generator: torch.Generator) -> None:
        """A drawn anew (on the CPU, whatever the device), B zero, m the lengths of the frozen rows."""
        bound = 1 / math.sqrt(self.lora_A.shape[1])  # Kaiming uniform with a = sqrt(5)
        self.lora_A.copy_((torch.rand(self.lora_A.shape, generator=generator) * 2 - 1) * bound)
        self.lora_B.zero_()
        if self.lora_magnitude is not None:
            self.lora_magnitude.copy_(wide(self.base_weight()).norm(dim=1))

    def adapter_parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        found = [self.lora_A, self.lora_B, self.lora_magnitude]
        return [parameter for parameter in found if parameter is not None]

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.adapter.dropout, self.training)
        added = F.linear(F.linear(dropped, self.lora_A), self.lora_B) * self.adapter.scaling
        if self.lora_magnitude is None:
            return self.base_product(x, self.bias) + added
        share = (self.lora_magnitude / self.row_lengths().to(self.lora_magnitude.dtype)).to(added.dtype)
        y = share * (self.base_product(x, None) + added)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def row_lengths(self) -> Tensor:
        """Lengths of the rows of W + s B A: [out], in float32 at least, outside of autograd."""
        lengths: Tensor = self._direction().norm(dim=1)
        return lengths.clamp_min(torch.finfo(lengths.dtype).tiny)

    def _direction(self) -> Tensor:
        return wide(self.base_weight()) + self.adapter.scaling * (wide(self.lora_B) @ wide(self.lora_A))

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The one weight [out, in] that computes what this layer does in eval mode, in the frozen weight's dtype."""
        weight = self._direction()
        if self.lora_magnitude is not None:
            weight = weight * (wide(self.lora_magnitude) / self.row_lengths()).unsqueeze(1)
        return weight.to(self.base_weight().dtype)


class LoraLinear(AdaptedLayer, nn.Linear):
    """An adapter over a float nn.Linear, whose weight and bias it takes over under their own names."""

    def __init__(self, layer: nn.Linear, adapter: LowRank) -> None:
        nn.Linear.__init__(self, layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.add_adapter(adapter, layer.weight.detach())

    def base_weight(self) -> Tensor:
        return self.weight.detach()

    def base_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight, bias)


@quantizes("nf4_adapted", nn.Linear)
class NF4AdaptedLinear(AdaptedLayer, NF4Linear):
    """An adapter over a frozen NF4 weight (QLoRA, Dettmers et al., 2023, arXiv:2305.14314)."""

    def __init__(self, layer: FloatLayer, block_size: int, double_quant: bool, **adapter: Any) -> None:
        NF4Linear.__init__(self, layer, block_size=block_size, double_quant=double_quant)
        self.add_adapter(LowRank(**adapter), layer.weight.detach())

    @classmethod
    def over(cls, layer: NF4Linear, adapter: LowRank) -> NF4AdaptedLinear:
        """An adapter over an NF4 layer, whose stored tensors it takes over."""
        with torch.device("meta"):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.float_dtype)
        made = cls(plain, **layer.settings(), **asdict(adapter))
        made.bias = layer.bias
        for name, stored in layer.named_buffers():
            setattr(made, name, stored)
        made.add_adapter(adapter, torch.empty(0, dtype=layer.float_dtype, device=layer.weight_packed.device))
        made.sparse = layer.sparse
        return made.train(layer.training)

    def base_weight(self) -> Tensor:
        return self.stored_weight()

    def base_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return dequantized_product(x, bias, self)

    def dequantized(self) -> Tensor:
        return self.merged_weight()

    def sparse_values(self) -> None:
        """With its adapter, the weight has no zeros to leave out."""
        return

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), **asdict(self.adapter)}


def adaptable(layer: nn.Module) -> bool:
    """Whether `adapt` takes `layer`: a plain nn.Linear (one that is read by its owner is none) or an NF4 one."""
    return type(layer) is nn.Linear or type(layer) is NF4Linear


def adapt(model: nn.Module, layers: Sequence[str], adapter: LowRank, seed: int) -> nn.Module:
    """`model` with an adapter on each of the named layers, in place, and nothing else that requires a gradient.

    A is drawn from `seed`, layer by layer in the order given.

    Raises:
        ValueError: a layer that is neither a plain nn.Linear nor one in NF4, or no layer at all.
    """
    if not layers:
        raise ValueError("no layer to adapt")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name in layers:
        layer = model.get_submodule(name)
        if not adaptable(layer):
            raise ValueError(f"{name} is a {type(layer).__name__}; adapters go on nn.Linear, in float or NF4")
        made = NF4AdaptedLinear.over(layer, adapter) if isinstance(layer, NF4Linear) else _over_float(layer, adapter)
        made.reset_adapter(generator)
        for parameter in made.adapter_parameters():
            parameter.requires_grad_(True)
        model.set_submodule(name, made)
    return model


def _over_float(layer: nn.Module, adapter: LowRank) -> LoraLinear:
    assert isinstance(layer, nn.Linear)
    made = LoraLinear(layer, adapter)
    return made.train(layer.training)


def merge(model: nn.Module) -> nn.Module:
    """`model` with each adapter over a float weight merged into it, in place; all but quantized layers trainable again.

    Adapters over NF4 stay, frozen.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            plain.weight, plain.bias = layer.weight, cast(Any, layer.bias)
            with torch.no_grad():
                plain.weight.copy_(layer.merged_weight())
            model.set_submodule(name, plain.train(layer.training))
    held = {id(p) for layer in quantized_layers(model).values() for p in layer.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) not in held)
    return model


@torch.no_grad()
def fill_dense(dense: nn.Module, model: nn.Module) -> nn.Module:
    """`dense`, a float model of the same architecture, filled with the weights of `model`, quantized ones decoded."""
    state = dense.state_dict()
    held = quantized_layers(model)
    decoded: dict[str, Tensor] = {}
    for name, layer in held.items():
        decoded[f"{name}.weight"] = layer.dequantized()
        if layer.bias is not None:
            decoded[f"{name}.bias"] = layer.bias
    others = {name: value for name, value in model.state_dict().items() if name in state}
    dense.load_state_dict({**others, **decoded})
    return dense


def adapters_detail(model: nn.Module) -> dict[str, Any]:
    """JSON facts of the adapters that are stored beside quantized layers; empty where there are none."""
    found = [layer for layer in model.modules() if isinstance(layer, AdaptedLayer)]
    if not found:
        return {}
    stored = sum(parameter.numel() for layer in found for parameter in layer.adapter_parameters())
    return {"adapters": {"layers": len(found), "parameters": stored, **asdict(found[0].adapter)}}


def held_tensors(model: nn.Module) -> dict[str, Tensor]:
    """State of quantized layers that no training changes, by its name in the state dict: codes and scales, no adapters.

    A checkpoint leaves it out, for it holds float tensors alone; it is made anew from the base model.
    """
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            found |= {f"{name}.{leaf}": buffer for leaf, buffer in module.named_buffers()}
    return found
