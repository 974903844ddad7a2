"""AWQ's two searches in one part of a model: scales of input channels, then ranges of weights (arXiv:2306.00978).

Weights that meet large activations matter most. Multiplied by s > 1 before rounding (and their inputs divided by it,
in the module before), they lose less; how much is searched on a grid, by the error of the output. Squared errors of one
linear layer's output need no pass over tokens: they are quadratic in the weights' error, with the matrix X^T X.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.layers.blockwise import Call, Segment, hidden_of, hooked, run_calls
from pipeline.layers.equalize import ChannelRange, Pair, find_pairs, fold, reached, restored
from pipeline.layers.hessian import InputSums, collect
from pipeline.layers.pulse import alike
from pipeline.layers.quantize import Grid, Quantized, quantize_rows, wide
from pipeline.models.base import Architecture

SEARCH_TOKENS = 2048
"""How many tokens, about, each trial runs that is a forward pass: the first ones. Hessians and means take them all."""


@dataclass
class Found:
    """What was found for a segment: integers by layer, pairs that were scaled, and facts for the report.

    `errors`: (with AWQ, rounded to nearest), squared, of the segment's output over that output's squared norm.
    """

    integers: dict[str, Quantized]
    scaled: list[Pair] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    errors: tuple[float, float] = (0.0, 0.0)
    clipped: bool = False


def search(
    segment: Segment, architecture: Architecture, grid: Grid, n_grid: int, duo_scaling: bool, max_shrink: float
) -> Found:
    """Integers for the layers of `segment`, whose modules are left with the scales folded in.

    Both searches look at parts of the segment. Scales, ranges, both or none of them are what is taken, whichever leaves
    the segment's output closest to what it was: never further off than with integers rounded to nearest.
    """
    root, layers = segment.root, segment.layers
    nearest = _integers(segment, grid, {})
    if not segment.calls:
        return Found(nearest)
    pairs = find_pairs(segment, architecture, layers)
    sample, outputs = _sample(segment)
    grams, ranges = _statistics(segment, pairs.exact)
    pairs = reached(pairs, ranges)
    chosen: list[tuple[Pair, Tensor]] = []
    for pair in pairs.exact:
        inputs = ranges[pair.producer].mean
        scales = _search_scales(sample, pair, pair.from_columns(inputs), grid, n_grid, duo_scaling, grams)
        if scales is not None:
            chosen.append((pair, scales))
    nearest_error = _error_with(sample, nearest, outputs)
    best = Found(nearest, [], pairs.refused, (nearest_error, nearest_error))
    del nearest  # so that never more is held than the best integers and those that are tried
    parameters = list(_parameters(root, [*layers, *(name for pair, _ in chosen for name in _names(pair))]))
    best_values = [parameter.data for parameter in parameters]
    unclipped = _unclipped(architecture)
    for scaled in ([], chosen) if chosen else ([],):
        own = dict(grams)
        for pair, scales in scaled:
            fold(root, pair, scales)
            columns = pair.to_columns(scales)
            own |= {name: own[name] / (columns.view(-1, 1) * columns) for name in pair.consumers if name in own}
        shrinks = {
            name: search_ranges(_rows(root, name), _grid_of(root, name, grid), own[name], n_grid, max_shrink)
            for name in layers
            if name not in unclipped and name in own
        }
        for clipped in (False, True):
            integers = _integers(segment, grid, shrinks if clipped else {})
            error = _error_with(sample, integers, outputs)
            if error < best.errors[0]:
                done = [pair for pair, _ in scaled]
                best = Found(integers, done, pairs.refused, (error, nearest_error), clipped)
                best_values = [parameter.data for parameter in parameters]
            del integers
    for parameter, data in zip(parameters, best_values, strict=True):
        parameter.data = data
    return best


def _integers(segment: Segment, grid: Grid, shrinks: dict[str, Tensor]) -> dict[str, Quantized]:
    root = segment.root
    return {
        name: quantize_rows(_rows(root, name), _grid_of(root, name, grid), shrinks.get(name, 1.0))
        for name in segment.layers
    }


def awq_scales(inputs: Tensor, weights: Sequence[Tensor], grid: Grid, ratio: float, duo_scaling: bool) -> Tensor:
    """s = mean|x|^ratio [columns], over the root of its largest times its smallest, so that the middle stays at 1.

    `duo_scaling`: over mean|w|^(1 - ratio) as well, each weight relative to the largest of its group.
    """
    scales = inputs.pow(ratio)
    if duo_scaling:
        relative = []
        for weight in weights:
            groups = grid.grouped(wide(weight)).abs()
            relative.append((groups / (groups.amax(-1, keepdim=True) + 1e-6)).view(weight.shape))
        scales = scales / (torch.cat(relative).mean(0).to(scales).pow(1 - ratio) + 1e-4)
    scales = scales.clamp_min(1e-4)
    return scales / (scales.max() * scales.min()).sqrt()


def _search_scales(
    segment: Segment,
    pair: Pair,
    inputs: Tensor,
    grid: Grid,
    n_grid: int,
    duo_scaling: bool,
    grams: dict[str, Tensor],
) -> Tensor | None:
    """The best scales [channels] of the producer; None where none is better than no scales."""
    root = segment.root
    quantized = [name for name in pair.consumers if name in segment.layers]
    rows = {name: _rows(root, name) for name in quantized}
    error_of = _error_function(segment, pair, rows, grams)
    best, best_error = None, error_of({name: quantize_rows(rows[name], grid).dequantized() for name in quantized})
    for step in alike(range(n_grid)):
        ratio = step / n_grid
        if ratio == 0 and not duo_scaling:
            continue  # no scales: done already
        columns = awq_scales(pair.to_columns(inputs), list(rows.values()), grid, ratio, duo_scaling)
        scales = pair.from_columns(columns)
        columns = pair.to_columns(scales)
        tried = {
            name: (quantize_rows((wide(row) * columns).to(row.dtype), grid).dequantized() / columns).to(row.dtype)
            for name, row in rows.items()
        }
        error = error_of(tried)
        if error < best_error:
            best, best_error = scales, error
    return best


def _error_function(
    segment: Segment, pair: Pair, rows: dict[str, Tensor], grams: dict[str, Tensor]
) -> Callable[[dict[str, Tensor]], float]:
    """{layer: weight to try} -> squared error of what the consumers' module gives (one consumer: the layer itself)."""
    if len(rows) == 1:
        ((name, row),) = rows.items()

        def of_layer(tried: dict[str, Tensor]) -> float:
            return float(squared_errors(wide(tried[name]) - wide(row), grams[name]).sum())

        return of_layer
    inspected = _common_parent(pair)
    calls = _calls(segment, inspected)
    module = segment.root.get_submodule(inspected)
    expected = [hidden_of(output).cpu() for output in run_calls(module, calls, segment.device, kept=True)]

    def of_module(tried: dict[str, Tensor]) -> float:
        with restored(segment.root, tried):
            for name, weight in tried.items():
                segment.root.get_submodule(name).get_parameter("weight").data = weight
            return _squared_distance(run_calls(module, calls, segment.device), expected)

    return of_module


def squared_errors(difference: Tensor, gram: Tensor) -> Tensor:
    """Mean over tokens of (d x)^2 of each row: `difference` [rows, columns], `gram` [blocks, columns, columns].

    Blocks share the rows out among them (grouped convolutions), in order.
    """
    parts = difference.view(len(gram), -1, difference.shape[1])
    return (torch.bmm(parts, gram) * parts).sum(-1).flatten()


def search_ranges(rows: Tensor, grid: Grid, gram: Tensor, n_grid: int, max_shrink: float) -> Tensor:
    """By how much to narrow the range of each group of weights: [rows, groups], from 1 down to 1 - `max_shrink`.

    Group by group, what is minimised is the error of the row's whole output, the other groups being as they are by
    then: so it never rises. (The paper looks at each group's own part alone, where errors of groups whose inputs go
    together add up.) The first of equals, the widest, wins.
    """
    wanted, gram = wide(rows), wide(gram)
    groups = grid.grouped(wanted).shape[1]
    size = rows.shape[1] // groups
    narrow = replace(grid, group_size=None)

    def by_block(difference: Tensor) -> Tensor:
        return difference.view(len(gram), -1, difference.shape[1])

    shrinks = torch.ones(rows.shape[0], groups, dtype=wanted.dtype, device=rows.device)
    difference = by_block(wide(quantize_rows(rows, grid).dequantized()) - wanted)
    product = torch.bmm(difference, gram)
    for group in alike(range(groups)):
        part = slice(group * size, (group + 1) * size)
        own, before = gram[:, part, part], difference[..., part].clone()
        others = product[..., part] - torch.bmm(before, own)
        best, best_error = before, _partial_error(before, own, others)
        for step in alike(range(1, int(max_shrink * n_grid + 1e-6) + 1)):
            shrink = 1 - step / n_grid
            found = quantize_rows(rows[:, part], narrow, shrink).dequantized()
            tried = by_block(wide(found) - wanted[:, part])
            error = _partial_error(tried, own, others)
            better = error < best_error
            best, best_error = torch.where(better.unsqueeze(-1), tried, best), torch.where(better, error, best_error)
            shrinks[:, group] = torch.where(better.flatten(), shrink, shrinks[:, group])
        product += torch.bmm(best - before, gram[:, part])
    return shrinks


def _partial_error(difference: Tensor, own: Tensor, others: Tensor) -> Tensor:
    """What the columns of one group add to the squared error of each row: [blocks, rows]."""
    return ((torch.bmm(difference, own) + 2 * others) * difference).sum(-1)


def _unclipped(architecture: Architecture) -> set[str]:
    """Queries and keys: their errors multiply, and what one layer's output says about a range does not hold."""
    return {name for block in architecture.blocks if (a := block.attention) for name in (a.query, a.key)}


def _error_with(segment: Segment, integers: dict[str, Quantized], outputs: Sequence[Tensor]) -> float:
    """Squared error of the segment's output with these weights, over the squared norm of `outputs`."""
    with restored(segment.root, integers):
        for name, quantized in integers.items():
            weight = segment.root.get_submodule(name).get_parameter("weight")
            weight.data = quantized.dequantized().view(weight.shape)
        distance = _squared_distance(segment.run(), outputs)
    return distance / max(sum(float(wide(output).square().sum()) for output in outputs), 1e-30)


def _squared_distance(found: Iterator[Any], expected: Sequence[Tensor]) -> float:
    total = 0.0
    for output, wanted in zip(found, alike(expected), strict=True):
        got = wide(hidden_of(output))
        total += float((got - wanted.to(got)).square().sum())
    return total


def _sample(segment: Segment) -> tuple[Segment, list[Tensor]]:
    """`segment` with its first calls alone, of SEARCH_TOKENS or a little more, and what it gives for them, on the CPU.

    Samples count as tokens where a segment gives one row each.
    """
    outputs: list[Tensor] = []
    for output in segment.run(kept=True):
        outputs.append(hidden_of(output).cpu())
        if sum(seen.numel() // seen.shape[-1] for seen in outputs) >= SEARCH_TOKENS:
            break
    return replace(segment, calls=segment.calls[: len(outputs)]), outputs


def _calls(segment: Segment, name: str) -> list[Call]:
    """How the module `name` is called, on the CPU."""
    calls: list[Call] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(args, kwargs).on("cpu"))

    handle = segment.root.get_submodule(name).register_forward_pre_hook(record, with_kwargs=True)
    try:
        for _ in segment.run(kept=True):
            pass
    finally:
        handle.remove()
    return calls


def _common_parent(pair: Pair) -> str:
    """The innermost module that holds all consumers."""
    parents = [name.split(".")[:-1] for name in pair.consumers]
    shared = [parts[0] for parts in zip(*parents, strict=False)]
    depth = next((at for at, parts in enumerate(zip(*parents, strict=False)) if len(set(parts)) > 1), len(shared))
    return ".".join(shared[:depth])


def _statistics(segment: Segment, pairs: Sequence[Pair]) -> tuple[dict[str, Tensor], dict[str, ChannelRange]]:
    """({layer: X^T X over the tokens' number, by blocks}, {producer: ranges of its channels}), in one pass, of layers
    that it reached."""
    ranges = {pair.producer: ChannelRange() for pair in pairs}
    with hooked(segment.root, {pair.readers[0]: ranges[pair.producer] for pair in pairs}):
        sums = collect(segment, segment.layers, full=True)
    readers: dict[InputSums, list[str]] = {}
    for name in list(sums):
        readers.setdefault(sums.pop(name), []).append(name)
    grams: dict[str, Tensor] = {}
    while readers:  # layers that read the same tensor share one matrix
        one, names = readers.popitem()
        gram = one.mean()
        grams |= dict.fromkeys(names, _blocks(segment.root, names[0], gram))
    return grams, ranges


def _blocks(root: nn.Module, name: str, gram: Tensor) -> Tensor:
    """[columns, columns] -> [blocks, columns of a block, ...]: one block, or one a group of a convolution."""
    layer = root.get_submodule(name)
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    if groups == 1:
        return gram.unsqueeze(0)
    size = len(gram) // groups
    return torch.stack([gram[at : at + size, at : at + size] for at in range(0, len(gram), size)])


def _rows(root: nn.Module, name: str) -> Tensor:
    return root.get_submodule(name).get_parameter("weight").detach().flatten(1)


def _grid_of(root: nn.Module, name: str, grid: Grid) -> Grid:
    return grid.of(root.get_submodule(name).get_parameter("weight"))


def _names(pair: Pair) -> tuple[str, ...]:
    return pair.producer, *pair.consumers


def _parameters(root: nn.Module, names: Sequence[str]) -> Iterator[nn.Parameter]:
    return (p for name in dict.fromkeys(names) for p in root.get_submodule(name).parameters())
