"""Smaller dense models: surgery that removes whole units (heads, feed-forward units, hidden dimensions, channels).

A pruned model is the model that its changed config describes, filled with slices of the old tensors, so whatever opens
such a config opens it. Which dimension of which tensor is cut follows from comparing the shapes of the two models: a
dimension that differs is one of attention's or the feed-forward's by its layer, else an inner channel of a
convolutional block, else the residual stream's. Whatever the config cannot say is thereby found out before anything
is cut. Dropping blocks is in depth.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.errors import LeanfitError
from pipeline.layers.experts import split_as_in
from pipeline.layers.sparsity import MASK
from pipeline.models.base import Architecture, Attention
from pipeline.models.unfilled import on_meta, to_be_filled

HIDDEN = ("hidden_size", "n_embd", "d_model")
FFN = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
HEADS = ("num_attention_heads", "n_head", "num_heads")
KEY_VALUE_HEADS = "num_key_value_heads"
HEAD_DIM = "head_dim"
EMBEDDING = "word_embed_proj_dim"
RATIOS = "expand_ratios"


class Axis(NamedTuple):
    """What runs along a dimension of a tensor.

    `kind`: `query` and `key_value` (heads times head size), `ffn`, `gate and up` (those of each, one after the other),
    `channels` (each of the block `block`), or `hidden`.
    """

    kind: str
    block: int | None


Cuts = dict[str, dict[int, Axis]]
"""By tensor, its dimensions that are cut."""


@dataclass(frozen=True)
class Kept:
    """Ascending indices of what stays. Per block: `heads` (units, see `head_units`), `ffn`, `channels`."""

    heads: Sequence[Tensor] = ()
    ffn: Sequence[Tensor] = ()
    channels: Mapping[int, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None


def head_units(attention: Attention) -> int:
    """How many units attention can be cut into: key/value heads, each with the queries that it serves.

    Where a single key/value head serves all queries, the units are the queries, and it stays.
    """
    return attention.heads if attention.key_value_heads == 1 else attention.key_value_heads


def config_key(config: Any, names: Sequence[str]) -> str | None:
    """The key of `names` under which `config` is written; None where it has none with a number."""
    written = config.to_dict()
    return next((name for name in names if isinstance(written.get(name), int)), None)


def stated_key(config: Any, names: Sequence[str]) -> str | None:
    """As `config_key`; without a number, the key that may have one and is null (four times the width, mostly)."""
    written = config.to_dict()
    return config_key(config, names) or next((name for name in names if name in written), None)


def changed_config(config: Any, changes: Mapping[str, Any]) -> Any:
    """A config like `config` but for `changes`, made as transformers makes one of what a config.json says.

    Raises:
        ValueError: the config's own checks refuse the numbers.
    """
    try:
        changed = type(config)(**{**config.to_dict(), **changes})
    except Exception as error:  # each transformers version checks with exceptions of its own
        raise ValueError(" ".join(str(error).split())) from error
    changed._attn_implementation = config._attn_implementation
    return changed


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Shapes of what is stored, by name; masks left out."""
    return {f"{prefix}{leaf}": tensor.shape for prefix, leaf, tensor in _stored(model) if leaf != MASK}


def _stored(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """(prefix, name, tensor) of what is stored: as `state_dict`, in half the time."""
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and leaf not in module._non_persistent_buffers_set:
                yield prefix, leaf, tensor


def described_shapes(model: nn.Module, config: Any) -> dict[str, torch.Size]:
    """Shapes of a model of the class of `model` with `config`; nothing is allocated.

    Raises:
        ValueError: the class cannot be built with it.
    """
    return shapes_of(empty_twin(model, config))


def empty_twin(model: nn.Module, config: Any) -> nn.Module:
    """A model of the class of `model` with `config`, on the meta device.

    Raises:
        ValueError: the class cannot be built with it.
    """
    return _built(on_meta, model, config)


def _built(build: Callable[[Any, Any], nn.Module], model: nn.Module, config: Any) -> nn.Module:
    try:
        return split_as_in(model, build(type(model), config))
    except Exception as error:  # whatever a class makes of a config it was not meant for
        raise ValueError(" ".join(str(error).split())) from error


def find_cuts(model: nn.Module, architecture: Architecture, shapes: Mapping[str, torch.Size]) -> Cuts:
    """Which dimensions of the tensors of `model` are cut to reach `shapes`, and what runs along them.

    Raises:
        ValueError: a tensor is added, lost or reshaped, or a dimension differs whose meaning is not known.
    """
    old = shapes_of(model)
    if old.keys() != shapes.keys():
        first = sorted(old.keys() ^ shapes.keys())[0]
        raise ValueError(f"{first} is in only one of the two models")
    known = dict(_known_axes(model, architecture))
    hidden: int | None = None
    cuts: Cuts = {}
    for name, before in old.items():
        after = shapes[name]
        differing = [dim for dim in range(len(before)) if len(after) != len(before) or before[dim] != after[dim]]
        for dim in differing:
            if len(after) != len(before) or after[dim] > before[dim]:
                raise ValueError(f"{name} would change from {list(before)} to {list(after)}")
            axis = known.get((name, dim)) or _channel_axis(architecture, name)
            if axis is None and before[dim] == (hidden := hidden or _hidden_size(model)):
                axis = Axis("hidden", None)
            if axis is None:
                raise ValueError(f"{name} would change from {list(before)} to {list(after)}")
            cuts.setdefault(name, {})[dim] = axis
    return cuts


def _hidden_size(model: nn.Module) -> int:
    """0 where the config states none."""
    config: Any = model.config
    key = config_key(config, HIDDEN)
    return getattr(config, key) if key else 0


def _known_axes(model: nn.Module, architecture: Architecture) -> Iterator[tuple[tuple[str, int], Axis]]:
    """((tensor, dimension), axis) of attention's and the feed-forward's linears, whose weights are [out, in]."""
    for index, block in enumerate(architecture.blocks):
        attention, feed_forward = block.attention, block.feed_forward
        outer: list[tuple[str | None, str]] = []
        inner: list[tuple[str, str]] = []
        if attention and attention.query != attention.key:
            outer += [(attention.query, "query"), (attention.key, "key_value"), (attention.value, "key_value")]
            inner.append((attention.output, "query"))
            around = attention.query.rpartition(".")[0]
            # Norms of all heads together (OLMo 2), or with a row for each (Cohere).
            yield (f"{around}.q_norm.weight", 0), Axis("query", index)
            yield (f"{around}.k_norm.weight", 0), Axis("key_value", index)
        if feed_forward:
            ways = [(feed_forward.up, "ffn"), (feed_forward.gate, "ffn")]
            outer += [(feed_forward.up, "gate and up")] if feed_forward.fused else ways
            inner.append((feed_forward.down, "ffn"))
        ends = [(layer, 0, kind) for layer, kind in outer] + [(layer, 1, kind) for layer, kind in inner]
        for layer, dim, kind in ends:
            if layer is None or not isinstance(model.get_submodule(layer), nn.Linear):
                continue
            yield (f"{layer}.weight", dim), Axis(kind, index)
            if dim == 0:
                yield (f"{layer}.bias", 0), Axis(kind, index)


def _channel_axis(architecture: Architecture, tensor: str) -> Axis | None:
    for index, block in enumerate(architecture.blocks):
        if block.inverted_bottleneck and tensor.startswith(f"{block.name}."):
            return Axis("channels", index)
    return None


def axis_indices(axis: Axis, length: int, architecture: Architecture, kept: Kept) -> Tensor:
    """Indices that stay of a dimension of `length` elements along `axis`."""
    if axis.block is None:
        assert kept.hidden is not None
        return kept.hidden
    if axis.kind == "ffn":
        return kept.ffn[axis.block]
    if axis.kind == "gate and up":
        units = kept.ffn[axis.block]
        return torch.cat([units, units + length // 2])
    if axis.kind == "channels":
        return kept.channels[axis.block]
    attention = architecture.blocks[axis.block].attention
    assert attention is not None
    size = length // head_units(attention)
    units = kept.heads[axis.block]
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


def rebuild(model: nn.Module, architecture: Architecture, config: Any, kept: Kept) -> nn.Module:
    """A new model of the class of `model`, described by `config`, filled with what is `kept` of its tensors.

    Data types, tied weights, `requires_grad`, masks of pruned weights, device and mode are those of `model`, which is
    left as it is.

    Raises:
        ValueError: `config` cannot be had by cutting `model`.
        LeanfitError: `kept` does not fit `config`.
    """
    empty = empty_twin(model, config)
    return filled(empty, model, architecture, find_cuts(model, architecture, shapes_of(empty)), kept)


@torch.no_grad()
def filled(empty: nn.Module, model: nn.Module, architecture: Architecture, cuts: Cuts, kept: Kept) -> nn.Module:
    """`empty`, as `empty_twin` makes it, with what `cuts` of the tensors of `model` leave: see `rebuild`."""
    made: Any = empty
    modules = dict(made.named_modules(remove_duplicate=False))
    transient = any(module._non_persistent_buffers_set for module in modules.values())
    if transient:  # which are nobody's to fill in
        made = _built(to_be_filled, model, made.config)
        modules = dict(made.named_modules(remove_duplicate=False))
    for prefix, leaf, stored in _stored(model):
        tensor = stored.detach()
        axes = cuts.get(f"{prefix}{'weight' if leaf == MASK else leaf}", {})
        for dim, axis in axes.items():
            indices = axis_indices(axis, tensor.shape[dim], architecture, kept)
            tensor = tensor.index_select(dim, indices.to(tensor.device))
        module = modules[prefix[:-1]]
        learned = isinstance(stored, nn.Parameter)
        tensors = module._parameters if learned else module._buffers
        wanted = tensors.get(leaf)  # a mask is not there yet
        if wanted is not None and tensor.shape != wanted.shape:
            raise LeanfitError(f"{prefix}{leaf}: {list(tensor.shape)} was kept, the config says {list(wanted.shape)}")
        tensor = tensor if axes else tensor.clone()
        if learned:
            module._parameters[leaf] = nn.Parameter(tensor, stored.requires_grad)
        else:
            module.register_buffer(leaf, tensor)
    for group in architecture.tied:
        for alias in group[1:]:
            layer, _, leaf = alias.rpartition(".")
            setattr(modules[layer], leaf, made.get_parameter(group[0]))
    if transient:
        _place_transient_buffers(model, made)
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    for module in modules.values():  # as `train`, in a tenth of the time
        module.training = model.training
    return made  # type: ignore[no-any-return]


def _place_transient_buffers(model: nn.Module, made: nn.Module) -> None:
    """Buffers that are not stored (rotary frequencies, an embedding's scale) follow from the config of `made`, as they
    will when it is opened; where they lie and in which dtype is as in `model`."""
    for name, module in made.named_modules():
        for leaf in module._non_persistent_buffers_set:
            old = getattr(model.get_submodule(name), leaf, None)
            if isinstance(old, Tensor):
                setattr(module, leaf, getattr(module, leaf).to(old))


def parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """As `module.parameters()`, in a third of the time: each parameter once."""
    held = [p for inner in module.modules() for p in inner._parameters.values() if p is not None]
    return list({id(parameter): parameter for parameter in held}.values())


def parameter_count(model: nn.Module) -> int:
    """Elements of all parameters, tied ones once."""
    return sum(parameter.numel() for parameter in parameters_of(model))
