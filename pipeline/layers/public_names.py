"""What the tensors of a quantized mixture, its experts linear layers, are called in checkpoints of its family.

transformers opens a checkpoint in which each expert has layers of its own, stacks them, and takes them apart again when
it writes one. Here it is asked what it would write, of small tensors whose contents tell where each of them came from:
so the names are those that it looks for when it opens what is stored under them. A gate and a way up that are one layer
here are two layers there, its upper and its lower rows.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from pipeline.layers.experts import DOWN, LinearExperts, groups_multiply, linear_experts, stacked_experts
from pipeline.models.unfilled import on_meta

Names = dict[str, list[str]]
"""{a quantized layer, or a tensor of none: what it is called in public}, as far as it is called otherwise; a layer of
which the rows are two layers' in public has two names."""
EXPERTS_SINCE = (5, 22)
"""The transformers that opens all quantized experts that are written here. Measured: 5.13 opens those of 4 and 8 bits,
and refuses 3 bits and fp8; 5.16 opens all, fp8 with an error of 1% of the logits; earlier ones warn, and fill in random
weights, which nothing in a file of this format can keep them from."""
SHAPE = "weight_shape"
"""The tensor of a packed layer that says of which shape its weight is."""


def public_names(model: nn.Module, quantized: Container[str]) -> Names | None:
    """Names for the tensors of `model`, of which these layers, among them all of experts', are or will be `quantized`.

    None where checkpoints of its family hold experts in another way than in two or three layers each, or other layers
    than the model does, and where transformers would not open them: it puts their weights together in float, without
    biases, for products of stacked experts in the model's dtype.
    """
    from transformers.core_model_loading import revert_weight_conversion

    stacked = stacks_of(model)
    experts = set(itertools.chain.from_iterable(stacked.values()))
    if not opens_experts() or not groups_multiply(cast(Any, model).dtype) or stacked_experts(model):
        return None
    if any(name not in quantized or model.get_submodule(name).bias is not None for name in experts):
        return None
    mixtures = (cast(LinearExperts, model.get_submodule(name)) for name in linear_experts(model))
    if any(mixture.up_begins is None for mixture in mixtures):  # rows of the gate and of the way up lie in turn
        return None
    with _disable_current_modes():
        whole = cast(Any, on_meta(type(model), cast(Any, model).config))
        marks = {name: torch.empty(0, device="cpu") for name in whole.state_dict()}
        rows = _mark_experts(stacked, marks)
        try:
            written = revert_weight_conversion(whole, marks)
        except Exception:  # whatever the conversion of a family makes of tensors that are not of a model's sizes
            return None
    origins = {
        id(mark): (layer, ".weight") if (layer := name.removesuffix(".weight")) in quantized else (name, "")
        for name, mark in marks.items()
        if name not in stacked
    }
    names: Names = {}
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    for name, tensor in written.items():
        if (found := origins.get(id(tensor))) and name.endswith(found[1]):
            names[found[0]] = [name.removesuffix(found[1])]
        elif (found := rows.get(str(tensor.tolist()))) and name.endswith(".weight"):
            parts[found[0]][found[1]] = name.removesuffix(".weight")
        else:
            return None
    for layer, named in parts.items():
        if sorted(named) not in (["whole"], ["lower", "upper"]):
            return None
        names[layer] = [named[part] for part in ("whole", "upper", "lower") if part in named]
    if set(names) != {own for own, _ in origins.values()} | {layer for layer, _ in rows.values()}:
        return None
    return {own: public for own, public in names.items() if public != [own]}


def opens_experts() -> bool:
    """Whether the installed transformers opens quantized experts, all that are stored in a public format, rightly."""
    return tuple(map(int, version("transformers").split(".")[:2])) >= EXPERTS_SINCE


def stacks_of(model: nn.Module) -> dict[str, list[str]]:
    """{a tensor in which transformers stacks experts: their layers in `model`}"""
    mixtures = {name: cast(LinearExperts, model.get_submodule(name)) for name in linear_experts(model)}
    return {
        f"{name}.{leaf}": [f"{name}.{expert}.{leaf}" for expert in range(experts.number)]
        for name, experts in mixtures.items()
        for leaf in (experts.first, DOWN)
    }


def _mark_experts(stacked: dict[str, list[str]], marks: dict[str, Tensor]) -> dict[str, tuple[str, str]]:
    """Put numbers [experts, 2 rows, 3] that are nowhere else into `marks`, in the place of experts' stacked weights.
    Returns {numbers: (expert's layer, which of its rows)}."""
    found: dict[str, tuple[str, str]] = {}
    for name, layers in stacked.items():
        first = 2 * len(found)
        marks[name] = torch.arange(first, first + 6 * len(layers), device="cpu").view(-1, 2, 3)
        for layer, (upper, lower) in zip(layers, marks[name].tolist(), strict=True):
            whole = str([upper, lower])
            found |= {whole: (layer, "whole"), str([upper]): (layer, "upper"), str([lower]): (layer, "lower")}
    return found


def under_public_names(tensors: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """`tensors` of a model as they are stored. Those of a layer with two names are parted: views."""
    found = {}
    for name, tensor in tensors.items():
        if name in names:
            (public,) = names[name]
            found[public] = tensor
            continue
        layer, _, leaf = name.rpartition(".")
        public_layers = names.get(layer, [layer])
        parts = _parted(leaf, tensor, len(public_layers))
        found |= {f"{public}.{leaf}".lstrip("."): part for public, part in zip(public_layers, parts, strict=True)}
    return found


def under_own_names(tensors: Iterable[tuple[str, Tensor]], names: Names) -> Iterator[tuple[str, list[Tensor]]]:
    """(name in the model, the parts of the tensor in order) of what is stored, as soon as all parts are there."""
    origins = {public: (own, place) for own, given in names.items() for place, public in enumerate(given)}
    waiting: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, tensor in tensors:
        if name in origins:
            yield origins[name][0], [tensor]
            continue
        layer, _, leaf = name.rpartition(".")
        own_layer, place = origins.get(layer, (layer, 0))
        own = f"{own_layer}.{leaf}".lstrip(".")
        waiting[own][place] = tensor
        if len(waiting[own]) == len(names.get(own_layer, [layer])):
            parts = waiting.pop(own)
            yield own, [parts[place] for place in sorted(parts)]


def _parted(leaf: str, tensor: Tensor, count: int) -> Sequence[Tensor]:
    if count > 1 and leaf == SHAPE:
        return [torch.cat([tensor[:1] // count, tensor[1:]]) for _ in range(count)]
    return tensor.chunk(count) if count > 1 else [tensor]


def joined(name: str, parts: Sequence[Tensor]) -> Tensor:
    """The tensor of this name of which `parts` are stored; it is the part where there is but one."""
    if len(parts) > 1 and name.endswith(f".{SHAPE}"):
        return torch.cat([torch.stack(list(parts))[:, :1].sum(0), parts[0][1:]])
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]
