"""Where things are in a model: one description that pruning, quantization, checkpointing and sharding plans read.

`describe` knows layouts, not models: the names that attention and feed-forward projections go by, tried in turn in each
block. So Llama, Mistral and Qwen are one layout, and a quantized copy of a model, whose linears were replaced in place,
is described as the model was. Nothing but names, shapes and the config is read: the meta device will do.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

from torch import nn

from pipeline.models.base import Architecture, Attention, Block, FeedForward, InvertedBottleneck


class _AttentionLayout(NamedTuple):
    query: str
    key: str
    value: str
    output: str


class _FeedForwardLayout(NamedTuple):
    up: str
    down: str
    gate: str | None = None


ATTENTION_LAYOUTS = (
    _AttentionLayout("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama, Mistral, Qwen
    _AttentionLayout("q_proj", "k_proj", "v_proj", "out_proj"),  # OPT, BART, GPT-J, GPT-Neo
    _AttentionLayout("q_proj", "k_proj", "v_proj", "dense"),  # Phi
    _AttentionLayout("qkv_proj", "qkv_proj", "qkv_proj", "o_proj"),  # Phi-3
    _AttentionLayout("query_key_value", "query_key_value", "query_key_value", "dense"),  # GPT-NeoX, BLOOM, Falcon
    _AttentionLayout("c_attn", "c_attn", "c_attn", "c_proj"),  # GPT-2
    _AttentionLayout("self.query", "self.key", "self.value", "output.dense"),  # BERT
)
"""Projections by their names below the attention module; equal names are one fused projection."""

FEED_FORWARD_LAYOUTS = (
    _FeedForwardLayout("up_proj", "down_proj", "gate_proj"),  # Llama, Mistral, Qwen
    _FeedForwardLayout("gate_up_proj", "down_proj", "gate_up_proj"),  # Phi-3, GLM
    _FeedForwardLayout("fc1", "fc2"),  # OPT, BART, Phi
    _FeedForwardLayout("dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, BLOOM, Falcon
    _FeedForwardLayout("c_fc", "c_proj"),  # GPT-2, GPT-Neo, Starcoder2
    _FeedForwardLayout("fc_in", "fc_out"),  # GPT-J, CodeGen
    _FeedForwardLayout("up_proj", "down_proj"),  # Nemotron, MPT
    _FeedForwardLayout("intermediate.dense", "output.dense"),  # BERT
)
"""Linears by their names below the feed-forward module, or below the block where they stand in it directly; equal names
are one fused layer."""

INVERTED_BOTTLENECK_LAYOUTS = (("expansion.expand_conv", "projection.project_conv"),)  # EfficientNet
"""1x1 convolutions to and from the inner channels, by their names below the block."""


def describe(model: nn.Module) -> Architecture:
    """The architecture of `model`; every name in it is one of `model.named_modules()` (`tied`: `named_parameters()`).

    Blocks are those of the model's main stack: the `ModuleList` or `Sequential` with most parameters whose members have
    one class. Parts of a block that follow no known layout are left None; a model without such a stack has no blocks.
    """
    modules = list(model.named_modules())
    stack = _main_stack(modules)
    members = {} if stack is None else dict(model.get_submodule(stack).named_children())
    named = {_join(stack or "", child): module for child, module in members.items()}
    blocks = tuple(_block(name, module, getattr(model, "config", None)) for name, module in named.items())
    inside = tuple(f"{name}." for name in named)
    outside = [(n, m) for n, m in modules if n and n not in named and not n.startswith(inside)]
    return Architecture(
        blocks=blocks,
        embeddings=tuple(name for name, module in outside if _is_embedding(module)),
        final_norm=_final_norm(outside) if blocks else None,
        head=_head(model, outside),
        tied=_tied(model),
    )


def positions(model: nn.Module) -> int | None:
    """The longest sequence that `model` takes; None where it has no limit."""
    return _config_value(getattr(model, "config", None), "max_position_embeddings")


def _members(module: nn.Module) -> list[nn.Module]:
    return [child for _, child in module.named_children()]


def _main_stack(modules: list[tuple[str, nn.Module]]) -> str | None:
    """Name of the container of the blocks; None where the model repeats nothing."""
    found: dict[str, nn.Module] = {}
    for name, module in modules:
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        children = _members(module)
        # A leaf is a layer, not a block: Sequential(Linear, Linear) is a multilayer perceptron.
        if not children or any(not _members(child) for child in children):
            continue
        if len({type(child) for child in children}) == 1:
            found[name] = module
    if len(found) < 2:
        return next(iter(found), None)
    # The first of equals is the outer one, as a module comes before what it holds.
    return max(found, key=lambda name: sum(parameter.numel() for parameter in found[name].parameters()))


def _block(name: str, block: nn.Module, config: Any) -> Block:
    modules = dict(block.named_modules())
    attention = _attention(name, modules, config)
    feed_forward = _feed_forward(name, modules, attention)
    # Registered in the order of the forward pass in every layout above; norms inside an attention are its own.
    norms = tuple(f"{name}.{child}" for child, module in block.named_children() if _is_norm(module))
    bottleneck = next(
        (
            InvertedBottleneck(f"{name}.{expand}", f"{name}.{project}")
            for expand, project in INVERTED_BOTTLENECK_LAYOUTS
            if expand in modules and project in modules
        ),
        None,
    )
    return Block(name=name, attention=attention, feed_forward=feed_forward, norms=norms, inverted_bottleneck=bottleneck)


def _attention(name: str, modules: dict[str, nn.Module], config: Any) -> Attention | None:
    for layout in ATTENTION_LAYOUTS:
        for parent in modules:
            if _join(parent, layout.query) in modules and all(_join(parent, part) in modules for part in layout):
                heads = _config_value(config, "num_attention_heads", "n_head", "num_heads")
                if heads is None:
                    return None
                groups = _config_value(config, "num_key_value_heads", "num_kv_heads") or heads
                query, key, value, output = (f"{name}.{_join(parent, part)}" for part in layout)
                return Attention(query, key, value, output, heads=heads, key_value_heads=groups)
    return None


def _feed_forward(name: str, modules: dict[str, nn.Module], attention: Attention | None) -> FeedForward | None:
    taken = {attention.output} if attention else set()
    for layout in FEED_FORWARD_LAYOUTS:
        fitting = []
        for parent in modules:
            if _join(parent, layout.up) not in modules:  # of nearly all
                continue
            parts = [_join(parent, part) for part in layout if part is not None]
            found = [f"{name}.{part}" for part in parts]
            if all(part in modules for part in parts) and not taken & set(found):
                fitting.append(found)
        if fitting:  # several are the experts of a mixture, of which none is the block's own
            up, down, *gate = fitting[0]
            return FeedForward(up, down, *gate) if len(fitting) == 1 else None
    return None


def _final_norm(outside: list[tuple[str, nn.Module]]) -> str | None:
    """The norm between the last block and the head: the last one outside the blocks that is no embedding's.

    Batch norms end convolutions and are not what is asked for.
    """
    norms = [
        name
        for name, module in outside
        if _is_norm(module) and not isinstance(module, nn.modules.batchnorm._BatchNorm) and "embed" not in name
    ]
    return norms[-1] if norms else None


def _head(model: nn.Module, outside: list[tuple[str, nn.Module]]) -> str | None:
    names = {id(module): name for name, module in outside}
    output = getattr(model, "get_output_embeddings", None)
    if callable(output) and id(found := output()) in names:
        return names[id(found)]
    for name in ("lm_head", "classifier", "score", "head", "fc"):
        if name in names.values() and not _members(model.get_submodule(name)):
            return name
    return None


def _tied(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    groups: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _config_value(config: Any, *names: str) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and not _members(module)


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(getattr(module, "num_embeddings", None), int)


def _join(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child
