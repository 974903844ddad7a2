"""A shallower transformer: some blocks of a model, in order, with a config that says so.

Which blocks: evenly spaced, the first and the last among them, as DistilBERT takes them (Sanh et al., 2019,
arXiv:1910.01108). Blocks can go where a block's output has the shape of its input and the config counts the blocks;
whether that is so is found out by building the model that the new config describes, on the meta device. Blocks may
differ in kind, dense ones and mixtures of experts say, where the config tells which are which in a way known here.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from pipeline.errors import LeanfitError
from pipeline.layers.experts import linear_experts, split_named
from pipeline.layers.structure import shapes_of
from pipeline.models.base import Architecture
from pipeline.models.unfilled import on_meta

COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
"""Names by which configs count their blocks."""
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers")
"""Names of configs' lists with one entry a block."""
LEADING = ("first_k_dense_replace", "num_dense_layers")
"""Names by which configs count the blocks at the beginning that are dense, before others that are mixtures."""
PLACES = ("mlp_only_layers", "moe_layers")
"""Names of configs' lists of the places of blocks of one kind."""
STEP, DENSE = "decoder_sparse_step", "mlp_only_layers"
"""Qwen's: every so manieth block is a mixture, if it is not in the list."""
STAGES = "stage_names"
"""Names of the stem and of each block, in configs of models that may be a backbone of others (BEiT, DINOv2)."""
INDICES = ("layer_idx", "layer_index", "layer_id")
"""Attributes in which a block's modules keep its place in the stack: the key-value cache goes by it."""


def evenly_spaced(total: int, kept: int) -> tuple[int, ...]:
    """Places of `kept` of `total` blocks: 12 -> 6 gives 0, 2, 4, 7, 9, 11. A single one is the first.

    Raises:
        ValueError: `kept` is not from 1 to `total`.
    """
    if not 1 <= kept <= total:
        raise ValueError(f"{kept} of {total} blocks")
    if kept == 1:
        return (0,)
    gaps = kept - 1
    return tuple((2 * place * (total - 1) + gaps) // (2 * gaps) for place in range(kept))


def keep_blocks(model: nn.Module, architecture: Architecture, kept: Sequence[int]) -> nn.Module:
    """`model` with only the blocks at the places `kept` (ascending), in place; its config counts and lists them.

    Weights, masks and all that is outside of the blocks (embeddings, norms, a tied head) stay as they are.

    Raises:
        LeanfitError: places that are none, not ascending, or all there are (no effect); or a model whose blocks cannot
            go: see `depth_problem`.
    """
    total = len(architecture.blocks)
    ordered = all(one < other for one, other in itertools.pairwise(kept))
    if not kept or not ordered or kept[0] < 0 or kept[-1] >= total:
        raise LeanfitError(f"blocks {list(kept)} are not some of {total}, in order")
    if len(kept) == total:
        raise LeanfitError(f"all {total} blocks are kept: no effect")
    if told := depth_problem(model, architecture, kept):
        raise LeanfitError(told)
    name = _stack(architecture)
    parent, _, leaf = name.rpartition(".")
    blocks = list(model.get_submodule(name).children())
    twins = list(described(model, architecture, kept).get_submodule(name).children())
    for place, old in enumerate(kept):
        for module, twin in zip(blocks[old].modules(), twins[place].modules(), strict=True):
            for attribute in INDICES:
                if getattr(module, attribute, None) == old:
                    setattr(module, attribute, place)
            # Numbers that follow from the place (`lambda_init` of DiffLlama) as they will when the config is opened.
            vars(module).update({key: value for key, value in vars(twin).items() if isinstance(value, float)})
    stack: Any = nn.ModuleList if isinstance(model.get_submodule(name), nn.ModuleList) else nn.Sequential
    chosen = [blocks[old] for old in kept]
    setattr(model.get_submodule(parent), leaf, stack(chosen) if stack is nn.ModuleList else stack(*chosen))
    _count(model.config, total, kept)
    return model


def depth_problem(model: nn.Module, architecture: Architecture, kept: Sequence[int]) -> str | None:
    """Why `model` cannot be reduced to the blocks `kept`; None where it can. Nothing is changed or allocated."""
    total, kind = len(architecture.blocks), type(model).__name__
    if total == 0:
        return f"{kind} has no stack of equal blocks"
    if not _count(copy.deepcopy(getattr(model, "config", None)), total, kept):
        return f"the config of {kind} does not count its {total} blocks, so none can be dropped"
    try:
        twin = described(model, architecture, kept)
    except Exception as error:  # whatever a model's class makes of a config it was not meant for
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"{kind} cannot be built with {len(kept)} blocks: {first}"
    if shapes_of(twin) != _kept_shapes(model, _stack(architecture), kept):
        return f"{kind} with {len(kept)} blocks has other layers than those of its blocks {list(kept)}"
    return None


def described(model: nn.Module, architecture: Architecture, kept: Sequence[int], config: Any = None) -> nn.Module:
    """The model that `config` (default: the model's own) describes once it counts the blocks `kept` alone.

    It is of the class and the data type of `model`, on the meta device, and its experts are as those of `model` are.
    """
    total = len(architecture.blocks)
    config = copy.deepcopy(getattr(model, "config", None) if config is None else config)
    mixtures = linear_experts(model)
    if len(kept) < total:
        _count(config, total, kept)
        mixtures = list(_renumbered(mixtures, _stack(architecture), kept).values())
    twin = split_named(on_meta(type(model), config), mixtures)
    dtypes = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return twin.to(next(dtypes, torch.float32)).train(model.training)


def _stack(architecture: Architecture) -> str:
    return architecture.blocks[0].name.rpartition(".")[0]


def _count(config: Any, total: int, kept: Sequence[int]) -> bool:
    """Make `config` count the blocks that are kept; False where it does not count them."""
    counts = [name for name in COUNTS if getattr(config, name, None) == total]
    for name in counts:
        setattr(config, name, len(kept))
    for name in PER_LAYER:
        listed = getattr(config, name, None)
        if isinstance(listed, list | tuple) and len(listed) == total:
            setattr(config, name, [listed[place] for place in kept])
    for name in LEADING:
        leading = getattr(config, name, None)
        if isinstance(leading, int):
            setattr(config, name, sum(place < leading for place in kept))
    step = getattr(config, STEP, None)
    if isinstance(step, int) and step > 1:  # what is left follows no step: all in the list
        setattr(config, DENSE, [at for at in range(total) if (at + 1) % step or at in getattr(config, DENSE)])
        setattr(config, STEP, 1)
    for name in PLACES:
        places = getattr(config, name, None)
        if isinstance(places, list | tuple):
            setattr(config, name, [new for new, old in enumerate(kept) if old in places])
    stages = getattr(config, STAGES, None)
    if isinstance(stages, list) and len(stages) == total + 1:
        setattr(config, STAGES, stages[: len(kept) + 1])
        config.out_features = stages[len(kept) : len(kept) + 1]
    return bool(counts)


def droppable_problem(model: nn.Module, architecture: Architecture, protected: Collection[int] = ()) -> str | None:
    """Why `model` cannot be left without just any of the blocks that are not `protected`; None where it can.

    Tried are the first and the last block of each kind: those of one kind can stand in for one another.
    """
    total = len(architecture.blocks)
    kinds: dict[Any, list[int]] = {}
    for place in range(total):
        if place not in protected:
            kinds.setdefault(_kind(model, architecture, place), []).append(place)
    for place in sorted({end for places in kinds.values() for end in (places[0], places[-1])}):
        kept = [other for other in range(total) if other != place]
        if kept and depth_problem(model, architecture, kept):
            name = architecture.blocks[place].name
            return (
                f"the blocks of {type(model).__name__} differ, and its config cannot describe it without {name}; keep "
                f"such blocks with `ignore`, [{','.join(_alike_names(architecture, kinds, place))}]"
            )
    return None


def heaviest(
    model: nn.Module, architecture: Architecture, number: int, protected: Collection[int] = ()
) -> tuple[int, ...]:
    """Places of so many blocks, ascending: the `protected` ones, and of the others those with most parameters."""
    blocks = [model.get_submodule(block.name) for block in architecture.blocks]
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    order = sorted(range(len(blocks)), key=lambda place: (place not in protected, -sizes[place], place))
    return tuple(sorted(order[:number]))


def _kind(model: nn.Module, architecture: Architecture, place: int) -> tuple[tuple[str, torch.Size], ...]:
    """What tells a block from those of another kind: names and shapes of what is stored."""
    return tuple(shapes_of(model.get_submodule(architecture.blocks[place].name)).items())


def _alike_names(architecture: Architecture, kinds: dict[Any, list[int]], place: int) -> list[str]:
    places = next(places for places in kinds.values() if place in places)
    return [architecture.blocks[other].name for other in places]


def _kept_shapes(model: nn.Module, stack: str, kept: Sequence[int]) -> dict[str, torch.Size]:
    """Shapes of what is stored with the blocks `kept` alone, numbered anew."""
    found = shapes_of(model)
    return {new: found[old] for old, new in _renumbered(found, stack, kept).items()}


def _renumbered(names: Iterable[str], stack: str, kept: Sequence[int]) -> dict[str, str]:
    """{name: what it is called with the blocks `kept` of `stack` alone}; those in other blocks are left out."""
    places = {str(old): str(new) for new, old in enumerate(kept)}
    renamed = {}
    for name in names:
        old, _, rest = name.removeprefix(f"{stack}.").partition(".")
        if not name.startswith(f"{stack}."):
            renamed[name] = name
        elif old in places:
            renamed[name] = f"{stack}.{places[old]}.{rest}"
    return renamed
