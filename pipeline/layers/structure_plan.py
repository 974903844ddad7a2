"""How small a model gets: the sizes nearest to the shares asked for that its config can say. Shapes alone are read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pipeline.layers.depth import depth_problem, described, droppable_problem, heaviest
from pipeline.layers.structure import (
    EMBEDDING,
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KEY_VALUE_HEADS,
    RATIOS,
    Cuts,
    changed_config,
    config_key,
    described_shapes,
    empty_twin,
    find_cuts,
    head_units,
    shapes_of,
    stated_key,
)
from pipeline.models.base import Architecture, Attention

KINDS = ("ffn", "heads", "hidden", "depth", "channels")


@dataclass(frozen=True)
class Plan:
    """What is left of each kind (None: not cut). `heads` counts units (see `head_units`); `channels` by block.

    `protected`: places of blocks that stay. `changes`: the keys of the config that change, the number of blocks aside.
    `sizes`: (before, after) by kind, in heads for heads, as reported. `empty`: the model as changed, all its blocks
    there, without weights; None where the config stays.
    """

    heads: int | None = None
    ffn: int | None = None
    hidden: int | None = None
    blocks: int | None = None
    protected: frozenset[int] = frozenset()
    channels: dict[int, int] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    cuts: Cuts = field(default_factory=dict)
    empty: nn.Module | None = None
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Layout:
    """What the config says of widths, and why each kind cannot be cut (no entry: it can)."""

    hidden: int
    heads: int
    key_value_heads: int
    units: int
    head_dim: int
    ffn: int
    keys: dict[str, str]
    own_head_dim: bool
    refused: dict[str, str]


def plan(
    model: nn.Module,
    architecture: Architecture,
    shares: Mapping[str, float | None],
    round_to: int,
    protected: frozenset[int],
    key: str,
) -> tuple[Plan, list[str]]:
    """The plan for these `shares` (by kind, see `KINDS`), and what is wrong with them: messages that begin with `key`.

    No more is removed than the share, as near to it as `round_to` (feed-forward, hidden size) and the config allow; not
    to remove anything is a problem. `protected`: places of blocks that stay, whole where blocks can differ.
    """
    asked = {kind: share for kind in KINDS if (share := shares.get(kind))}
    if not hasattr(model, "config") or not hasattr(model.config, "to_dict"):
        return Plan(), [f"{key}: {type(model).__name__} has no config that says its sizes; only transformers models do"]
    convolutional = any(block.inverted_bottleneck for block in architecture.blocks)
    asked.pop("ffn" if convolutional else "channels", None)
    if not asked:
        kind = "channels" if convolutional else "ffn, heads, hidden or depth"
        return Plan(), [f"{key}: nothing of a {type(model).__name__} is removed; set {kind}"]
    if protected and not {"depth", "channels"} & set(asked):
        return Plan(), [
            f"{key}.ignore keeps blocks from being dropped (depth) or their channels; the config has one size of "
            f"{', '.join(asked)} for all blocks; leave `ignore` out"
        ]
    if convolutional:
        return _convolutional(model, architecture, asked, protected, key)
    return _transformer(model, architecture, asked, round_to, protected, key)


def planned(model: Any, architecture: Architecture, made: Plan) -> nn.Module:
    """What `made` leaves of `model`, on the meta device: sizes do not depend on which units will go.

    Nor on which blocks, where all are of one kind; elsewhere it is the most that can be left.
    """
    total = len(architecture.blocks)
    config = changed_config(model.config, made.changes)
    kept = range(total) if made.blocks is None else heaviest(model, architecture, made.blocks, made.protected)
    return described(model, architecture, kept, config)


def least(size: int, share: float) -> int:
    """The smallest number left of `size` when no more than `share` of it may go."""
    return max(1, math.ceil(size * (1 - share) - 1e-9))


def _smallest(share: float) -> str:
    """Rounded up, so that what is printed has an effect when it is asked for."""
    return f"{math.ceil(share * 1e4 - 1e-9) / 1e4:g}"


def _transformer(
    model: Any,
    architecture: Architecture,
    asked: dict[str, float],
    round_to: int,
    protected: frozenset[int],
    key: str,
) -> tuple[Plan, list[str]]:
    layout = _layout(model, architecture)
    kind = type(model).__name__
    problems = [
        f"{key}.{name}={share:g}: {layout.refused[name]}{_instead(layout, asked, f'{key}.{name}')}"
        for name, share in asked.items()
        if name in layout.refused
    ]
    if problems:
        return Plan(), problems
    made: dict[str, Any] = {"changes": {}, "sizes": {}}
    if "depth" in asked:
        problems += _plan_depth(model, architecture, asked["depth"], protected, key, made)
    if "ffn" in asked:
        problems += _plan_ffn(layout, asked["ffn"], round_to, key, made)
    if {"heads", "hidden"} & set(asked):
        problems += _plan_stream(model, layout, asked, round_to, key, made)
    if problems or not made["changes"]:
        return Plan(**made), problems
    try:
        made["empty"] = empty_twin(model, changed_config(model.config, made["changes"]))
        made["cuts"] = find_cuts(model, architecture, shapes_of(made["empty"]))
    except ValueError as error:
        said = ", ".join(f"{name}={share:g}" for name, share in asked.items() if name != "depth")
        return Plan(), [f"{key}: {said}: the config of {kind} cannot say this: {error}; try other kinds"]
    return Plan(**made), []


def _instead(layout: _Layout, asked: Mapping[str, float], setting: str) -> str:
    """What to use for a share that is refused: others, or none where one of those is asked for beside it."""
    left = [kind for kind in KINDS[:4] if kind not in layout.refused]
    if set(left) & set(asked):
        return f"; use {setting}=null"
    return f"; use {' or '.join(left)}" if left else ""


def _layout(model: Any, architecture: Architecture) -> _Layout:
    config, kind, blocks = model.config, type(model).__name__, architecture.blocks
    refused: dict[str, str] = {"channels": "channels are those of convolutional blocks"}
    keys = {"hidden": config_key(config, HIDDEN), "ffn": stated_key(config, FFN), "heads": config_key(config, HEADS)}
    known = {name: found for name, found in keys.items() if found}
    value = {name: int(getattr(config, found)) for name, found in known.items() if name != "ffn"}
    pairs = [block.feed_forward for block in blocks if block.feed_forward and _linear(model, block.feed_forward.down)]
    ffn = 0
    attention = blocks[0].attention if blocks else None
    if not blocks or depth_problem(model, architecture, (0,)):
        refused["depth"] = f"the config of {kind} does not count blocks that can be dropped"
    if not blocks or len(pairs) < len(blocks):
        refused["ffn"] = f"{kind} has no feed-forward layers of a known layout"
    elif "ffn" not in known:
        refused["ffn"] = f"the config of {kind} does not state the size of its feed-forward layers"
    else:
        ffn = model.get_submodule(pairs[0].down).weight.shape[1]
        stated = getattr(config, known["ffn"])
        if isinstance(stated, int) and stated != ffn:  # RecurrentGemma's is twice as much
            refused["ffn"] = f"the config of {kind} states {stated} feed-forward units, its layers have {ffn}"
    if "hidden" not in value:
        refused["hidden"] = f"the config of {kind} has no hidden size"
    own = False
    head_dim = 0
    if "heads" not in value or not all(b.attention for b in blocks) or attention is None:
        refused["heads"] = f"{kind} has no attention of a known layout"
    elif attention.query == attention.key or not _linear(model, attention.query):
        refused["heads"] = f"{kind} fuses queries, keys and values"
    else:
        head_dim = model.get_submodule(attention.query).weight.shape[0] // attention.heads
        own = _own_head_dim(model, attention, head_dim)
        if not own:
            refused["heads"] = (
                f"the config of {kind} cannot say this: its heads share the hidden size, which shrinks with them under "
                "`hidden`"
            )
    if not own and head_dim * value.get("heads", 0) != value.get("hidden", -1):
        refused.setdefault("hidden", f"{kind} has no attention whose heads could shrink with the hidden size")
    return _Layout(
        hidden=value.get("hidden", 0),
        heads=attention.heads if attention else 0,
        key_value_heads=attention.key_value_heads if attention else 0,
        units=head_units(attention) if attention else 0,
        head_dim=head_dim,
        ffn=ffn,
        keys=known,
        own_head_dim=own,
        refused=refused,
    )


def _linear(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), nn.Linear)


def _own_head_dim(model: Any, attention: Attention, head_dim: int) -> bool:
    """Whether the model's class goes by a head size that the config states: tried with twice the size.

    On both sides of the heads: Helium's output layer goes by the hidden size all the same.
    """
    try:
        shapes = described_shapes(model, changed_config(model.config, {HEAD_DIM: 2 * head_dim}))
    except ValueError:
        return False
    wide = 2 * head_dim * attention.heads
    return shapes[f"{attention.query}.weight"][0] == shapes[f"{attention.output}.weight"][1] == wide


def _plan_depth(
    model: Any, architecture: Architecture, share: float, protected: frozenset[int], key: str, made: dict[str, Any]
) -> list[str]:
    total = len(architecture.blocks)
    left = max(least(total, share), len(protected))
    if left == total:
        if least(total, share) < total:
            return [f"{key}.depth={share:g}: all {total} blocks are in `ignore`; leave some of them out of it"]
        if total == 1:
            return [f"{key}.depth={share:g}: the model has a single block; leave depth out"]
        return [f"{key}.depth={share:g} removes none of {total} blocks; choose at least {_smallest(1 / total)}"]
    if told := droppable_problem(model, architecture, protected):
        return [f"{key}.depth={share:g}: {told}"]
    made["blocks"], made["protected"] = left, protected
    made["sizes"]["depth"] = (total, left)
    return []


def _plan_ffn(layout: _Layout, share: float, round_to: int, key: str, made: dict[str, Any]) -> list[str]:
    left = round_to * -(-least(layout.ffn, share) // round_to)
    if left >= layout.ffn:
        nearest = (layout.ffn - 1) // round_to * round_to
        return [_no_effect(f"{key}.ffn={share:g}", "feed-forward units", layout.ffn, nearest, round_to)]
    made["ffn"] = left
    made["changes"][layout.keys["ffn"]] = left
    made["sizes"]["ffn"] = (layout.ffn, left)
    return []


def _no_effect(said: str, what: str, size: int, nearest: int, round_to: int) -> str:
    told = f"{said} removes none of {size} {what}"
    if nearest < 1:
        return f"{told}, whose number stays a multiple of round_to={round_to}; choose a smaller round_to"
    rounded = f" (a multiple of round_to={round_to} is left)" if round_to > 1 else ""
    return f"{told}{rounded}; choose at least {_smallest((size - nearest) / size)}"


def _plan_stream(
    model: Any, layout: _Layout, asked: Mapping[str, float], round_to: int, key: str, made: dict[str, Any]
) -> list[str]:
    """Heads and hidden size, which some configs tie to each other."""
    shares = {kind: asked[kind] for kind in ("heads", "hidden") if kind in asked}
    said = " and ".join(f"{key}.{kind}={share:g}" for kind, share in shares.items())
    pairs = list(_pairs(layout, shares, round_to))
    within = next((p for p in pairs if _at_most(layout, shares, *p) and _valid(model, layout, *p)), None)
    if within is None:
        beyond = [pair for pair in pairs if not _at_most(layout, shares, *pair)]
        beyond.sort(key=lambda pair: -pair[0] / layout.units - pair[1] / layout.hidden)
        nearest = next((pair for pair in beyond if _valid(model, layout, *pair)), None)
        if nearest is None:
            rounding = f" with round_to={round_to}" if "hidden" in shares and layout.own_head_dim else ""
            what = f"{layout.units} heads (or groups) and hidden size {layout.hidden}"
            return [f"{said}: the config of {type(model).__name__} allows no less than {what}{rounding}"]
        units, hidden = nearest
        needed = {"heads": (layout.units - units) / layout.units, "hidden": (layout.hidden - hidden) / layout.hidden}
        fix = " and ".join(f"{kind}={_smallest(needed[kind])}" for kind in shares)
        return [f"{said} removes nothing that the config of {type(model).__name__} can say; choose at least {fix}"]
    units, hidden = within
    made["changes"] = _stream_changes(model, layout, units, hidden) | made["changes"]
    if units < layout.units:
        made["heads"] = units
        made["sizes"]["heads"] = (layout.heads, units * layout.heads // layout.units)
    if hidden < layout.hidden:
        made["hidden"] = hidden
        made["sizes"]["hidden"] = (layout.hidden, hidden)
    return []


def _pairs(layout: _Layout, shares: Mapping[str, float], round_to: int) -> Iterator[tuple[int, int]]:
    """(head units, hidden size) that are smaller where asked, smallest first."""
    if not layout.own_head_dim:
        wide = layout.hidden // layout.units  # of a unit: a head, or those that share a key and a value
        yield from ((units, units * wide) for units in range(1, layout.units))
        return
    units = range(1, layout.units) if "heads" in shares else [layout.units]
    hidden = range(round_to, layout.hidden, round_to) if "hidden" in shares else [layout.hidden]
    yield from sorted(
        itertools.product(units, hidden), key=lambda pair: (pair[0] / layout.units + pair[1] / layout.hidden, pair)
    )


def _at_most(layout: _Layout, shares: Mapping[str, float], units: int, hidden: int) -> bool:
    """Whether a pair removes no more than was asked."""
    if not layout.own_head_dim:
        return units >= least(layout.units, shares["hidden"])
    return all(
        left >= least(size, shares.get(kind, 0.0))
        for kind, left, size in (("heads", units, layout.units), ("hidden", hidden, layout.hidden))
    )


def _valid(model: Any, layout: _Layout, units: int, hidden: int) -> bool:
    try:
        changed_config(model.config, _stream_changes(model, layout, units, hidden))
    except ValueError:
        return False
    return True


def _stream_changes(model: Any, layout: _Layout, units: int, hidden: int) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    written = model.config.to_dict()
    if units < layout.units:
        changes[layout.keys["heads"]] = units * layout.heads // layout.units
        if KEY_VALUE_HEADS in written and layout.key_value_heads > 1:
            changes[KEY_VALUE_HEADS] = units * layout.key_value_heads // layout.units
    if hidden < layout.hidden:
        changes[layout.keys["hidden"]] = hidden
        if written.get(EMBEDDING) == layout.hidden:
            changes[EMBEDDING] = hidden
        if "ffn" in layout.keys and written[layout.keys["ffn"]] is None:
            changes[layout.keys["ffn"]] = layout.ffn  # null would follow the hidden size
    if layout.own_head_dim:
        changes[HEAD_DIM] = layout.head_dim
    return changes


def _convolutional(
    model: Any, architecture: Architecture, asked: dict[str, float], protected: frozenset[int], key: str
) -> tuple[Plan, list[str]]:
    kind = type(model).__name__
    problems = [
        f"{key}.{name}={share:g}: the config of {kind} cannot say this; use channels"
        for name, share in asked.items()
        if name != "channels"
    ]
    ratios = getattr(model.config, RATIOS, None)
    stages = _stages(model.config, len(architecture.blocks))
    if ratios is None or stages is None:
        problems.append(f"{key}: the config of {kind} does not state the channels inside of its blocks")
    if problems or "channels" not in asked or ratios is None or stages is None:
        return Plan(), problems
    share = asked["channels"]
    left = list(ratios)
    for stage, ratio in enumerate(ratios):
        whole = any(block in protected for block in stages[stage])
        if ratio > 1 and not whole:
            left[stage] = max(2, least(ratio, share))  # at 1 the class leaves the expansion out
    if left == list(ratios):
        free = [r for s, r in enumerate(ratios) if r > 2 and not any(block in protected for block in stages[s])]
        fix = f"choose at least {_smallest(1 / max(free))}" if free else "no stage is left whose ratio could fall to 2"
        return Plan(), [
            f"{key}.channels={share:g} removes nothing: the config states whole expansion ratios, {ratios}; {fix}"
        ]
    changes = {RATIOS: left}
    try:
        empty = empty_twin(model, changed_config(model.config, changes))
        cuts = find_cuts(model, architecture, shapes_of(empty))
    except ValueError as error:
        return Plan(), [f"{key}.channels={share:g}: the config of {kind} cannot say this: {error}"]
    channels: dict[int, int] = {}
    before = 0
    for stage, blocks in enumerate(stages):
        for index in blocks:
            inner = architecture.blocks[index].inverted_bottleneck
            size = model.get_submodule(inner.project).weight.shape[1] if inner else 0
            before += size
            if inner and left[stage] != ratios[stage]:
                channels[index] = size // ratios[stage] * left[stage]
    after = before - sum(
        model.get_submodule(block.inverted_bottleneck.project).weight.shape[1] - channels[index]
        for index, block in enumerate(architecture.blocks)
        if index in channels and block.inverted_bottleneck
    )
    return Plan(channels=channels, changes=changes, cuts=cuts, sizes={"channels": (before, after)}, empty=empty), []


def _stages(config: Any, blocks: int) -> list[Sequence[int]] | None:
    """Places of the blocks of each stage of an EfficientNet; None where the config does not say."""
    repeats = getattr(config, "num_block_repeats", None)
    depth = getattr(config, "depth_coefficient", None)
    if repeats is None or depth is None:
        return None
    counts = [math.ceil(depth * repeat) for repeat in repeats]
    if sum(counts) != blocks:
        return None
    ends = list(itertools.accumulate(counts))
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]
