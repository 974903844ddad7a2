"""Quantizing the layers of a model by the name of a scheme: int8, int8_static, weight_only, nf4, fp8.

Importing this module enters every quantized layer into the table of kinds.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from pipeline.errors import LeanfitError, did_you_mean
from pipeline.layers import conv, embedding, float8, linear, lora, nf4, static
from pipeline.layers.offload import offload_module, place_of_model
from pipeline.layers.quantize import Quantized, is_finite
from pipeline.layers.quantized import KINDS, FloatLayer, IntegerLayer, QuantizedLayer, form_of, quantized_layers
from pipeline.layers.select import select
from pipeline.layers.sparsity import is_two_of_four
from pipeline.models.architecture import describe
from pipeline.models.base import Architecture

__all__ = [
    "KINDS", "conv", "embedding", "empty_layer", "float8", "join_siblings", "linear", "lora", "nf4", "put",
    "quantization_detail", "quantize_layers", "replace", "require_finite", "static", "with_room",
]  # fmt: skip

AS_DENSE = ", 2:4 as dense"
"""Said of a kernel that reads the zeros of a 2:4 weight like any others."""


def quantize_layers(model: nn.Module, layers: Sequence[str], scheme: str, **settings: Any) -> nn.Module:
    """`model` with each of the named `layers` replaced, in place, by its quantized form, rounded to nearest.

    Raises:
        LeanfitError: no layers, one without such a form, or a weight that holds NaN or infinity (the layer is named);
            nothing is changed then.
    """
    modules = require_finite(model, layers, scheme)
    kinds = {name: form_of(KINDS, scheme, modules[name], name) for name in layers}
    place = place_of_model(model)
    for name, kind in kinds.items():
        replace(model, name, kind.from_float(cast(FloatLayer, modules.pop(name)), **settings), place)
    join_siblings(model)
    return model


def require_finite(model: nn.Module, layers: Sequence[str], method: str) -> dict[str, nn.Module]:
    """What every method demands of the weights it is about to change. Returns the modules of `model` by name.

    Raises:
        LeanfitError: no layers, one that is not in the model or has no weight, or a weight that holds NaN or infinity
            (the layer is named).
    """
    if not layers:
        raise LeanfitError(f"{method}: no layer to work on")
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    for name in layers:
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, torch.Tensor):
            near = did_you_mean(name, [other for other, module in modules.items() if hasattr(module, "weight")])
            raise LeanfitError(f"{method}: the model has no layer {name!r} with a weight{near}")
        if not is_finite(weight):
            raise LeanfitError(f"{method}: the weight of {name} holds NaN or infinity: its training diverged")
    return modules


def put(model: nn.Module, name: str, quantized: Quantized, scheme: str, **settings: Any) -> IntegerLayer:
    """Replace the layer `name` by its quantized form, with integers that a method found. Call `join_siblings` last."""
    layer = cast(FloatLayer, model.get_submodule(name))
    made = cast(IntegerLayer, empty_layer(scheme, layer, **settings))
    made.fill(quantized)
    made.like(layer)
    replace(model, name, made, place_of_model(model))
    return made


def join_siblings(model: nn.Module) -> None:
    """Join the int8 layers that read the same input: query, key and value, and a feed-forward's gate and up.

    Nothing but speed changes (see `linear.Siblings`). For a model whose layers are all in place.
    """
    if not any(isinstance(module, linear.Int8Linear) for module in model.modules()):
        return
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
        LeanfitError: no such scheme for this class of layer.
    """
    return form_of(KINDS, scheme, layer)(layer, **settings)


def with_room(model: nn.Module, layers: Sequence[str], scheme: str, **settings: Any) -> nn.Module:
    """A copy of `model`, on the meta device, with room for the quantized form of each named layer in its place."""
    made = copy.deepcopy(model)
    for name in layers:
        layer = cast(FloatLayer, made.get_submodule(name))
        replace(made, name, empty_layer(scheme, layer, **settings).like(layer))
    join_siblings(made)
    return made


def replace(model: nn.Module, name: str, layer: nn.Module, place: Path | None = None) -> None:
    """Put `layer` where `name` is in `model`, its tensors into files in `place` where the model's are. The layer before
    may be in memory all the same: a method changed it."""
    if place is not None:
        offload_module(layer, place)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def quantization_detail(
    model: nn.Module, architecture: Architecture, ignore: Iterable[str], types: tuple[type[nn.Module], ...] = ()
) -> dict[str, Any]:
    """JSON facts of a quantized model: which layers, how many bits, by which kernels, what stayed in float and why."""
    found = quantized_layers(model)
    zeros = elements = 0
    kernels: Counter[str] = Counter()
    for layer in found.values():
        weight = layer.dequantized()
        kernels[layer.kernel + (AS_DENSE if layer.sparse and is_two_of_four(weight) else "")] += 1
        zeros, elements = zeros + int((weight == 0).sum()), elements + weight.numel()
    return {
        "layers": len(found),
        "layer_names": list(found),
        "bits": {name: layer.bits for name, layer in found.items()},
        "kernel": dict(kernels),
        "left_in_float": select(model, architecture, ignore, types).left_in_float,
        "sparsity": zeros / max(1, elements),
    }
