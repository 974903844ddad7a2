"""Quantizing the layers of a model by the name of a scheme: int8, int8_weight_only, int4.

Importing this module enters every quantized layer into the table of kinds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn

from pipeline.errors import LeanfitError
from pipeline.layers import conv, linear
from pipeline.layers.quantized import KINDS, FloatLayer, QuantizedLayer, float_class, quantized_layers
from pipeline.layers.select import select
from pipeline.models.architecture import describe
from pipeline.models.base import Architecture

__all__ = ["conv", "empty_layer", "join_siblings", "linear", "quantization_detail", "quantize_layers", "replace"]


def quantize_layers(model: nn.Module, layers: Sequence[str], scheme: str, **settings: Any) -> nn.Module:
    """`model` with each of the named `layers` replaced, in place, by its quantized form.

    Raises:
        LeanfitError: no layers, or a weight that holds NaN or infinity (the layer is named); nothing is changed then.
    """
    if not layers:
        raise LeanfitError(f"{scheme}: no layer to quantize")
    for name in layers:
        weight = cast(torch.Tensor, model.get_submodule(name).weight)
        if not torch.isfinite(weight).all():
            raise LeanfitError(f"{scheme}: the weight of {name} holds NaN or infinity: its training diverged")
    for name in layers:
        layer = cast(FloatLayer, model.get_submodule(name))
        replace(model, name, KINDS[scheme, float_class(layer)].from_float(layer, **settings))
    join_siblings(model)
    return model


def join_siblings(model: nn.Module) -> None:
    """Join the int8 layers that read the same input: query, key and value, and a feed-forward's gate and up.

    Nothing but speed changes (see `linear.Siblings`). For a model whose layers are all in place.
    """
    for block in describe(model).blocks:
        attention, feed_forward = block.attention, block.feed_forward
        names = (attention.query, attention.key, attention.value) if attention else ()
        gated = (feed_forward.gate, feed_forward.up) if feed_forward and feed_forward.gate else ()
        for group in (names, gated):
            found = [model.get_submodule(name) for name in dict.fromkeys(group)]
            layers = [layer for layer in found if isinstance(layer, linear.Int8Linear)]
            alike = len({(layer.in_features, layer.share_flat) for layer in layers}) == 1
            if len(layers) > 1 and alike:
                linear.Siblings(layers)


def empty_layer(scheme: str, layer: FloatLayer, **settings: Any) -> QuantizedLayer:
    """The quantized form of `layer` with room for its tensors, as a loader fills them.

    Raises:
        KeyError: no such scheme for this class of layer.
    """
    return KINDS[scheme, float_class(layer)](layer, **settings)


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` where `name` is in `model`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def quantization_detail(model: nn.Module, architecture: Architecture, ignore: Iterable[str]) -> dict[str, Any]:
    """JSON facts of a quantized model: which layers, how many bits, by which kernels, what stayed in float and why."""
    found = quantized_layers(model)
    integers = {name: layer.integers() for name, layer in found.items()}
    zeros = sum(int((values == 0).sum()) for values in integers.values())
    return {
        "layers": len(found),
        "layer_names": list(found),
        "bits": {name: layer.bits for name, layer in found.items()},
        "kernel": dict(Counter(layer.kernel for layer in found.values())),
        "left_in_float": select(model, architecture, ignore).left_in_float,
        "sparsity": zeros / max(1, sum(values.numel() for values in integers.values())),
    }
