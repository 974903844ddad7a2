"""Moving scales between layers without changing what they compute: what SmoothQuant and AWQ quantize better after.

Where one module's output channels go to linear layers and nowhere else, dividing channel j by s_j and multiplying the
column j of each of these layers by s_j leaves the model as it was (Nagel et al., 2019, arXiv:1906.04721, call it
equalization). A norm is divided in its weight and bias, a linear layer in the rows of its weight and its bias.

Which modules are such pairs is looked up in the architecture and then tried: scales that are powers of two (which round
nothing) are moved, and the outputs must stay. A norm whose output is a residual too (post-norm blocks), or a
nonlinearity that is not positively homogeneous (GELU; ReLU is), shows so.

Of a mixture of experts (experts.py) a norm's output goes to every expert's first layer and to what chooses among them:
that stays in float, and its columns are multiplied all the same. The way up of each expert and its second layer are a
pair of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pipeline.layers.blockwise import Segment, hidden_of
from pipeline.layers.constants import constant
from pipeline.layers.experts import DOWN, LinearExperts, gates, linear_experts
from pipeline.layers.quantize import wide
from pipeline.models.base import Architecture, Block

TOLERANCE = 1e-4
"""Relative change of the outputs below which a trial counts as exact, in float32 and wider."""
TRIAL = (1 / 16, 4.0, 16.0, 1 / 4)
"""Scales that are tried, channel by channel in turn."""


@dataclass(frozen=True)
class Pair:
    """`producer` (a norm or linear layer), whose output channels are the inputs of `consumers`: linear layers, and what
    chooses among experts.

    `heads` and `key_value_heads` differ between a value and an output projection with grouped queries: each value
    channel is then the input of several columns. `first`: the producer's first channel that is meant; those before it
    are a gate's. `mixtures`: those whose experts' first layers are among the consumers, all of them.
    """

    block: str
    producer: str
    consumers: tuple[str, ...]
    heads: int = 1
    key_value_heads: int = 1
    first: int = 0
    mixtures: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.producer} -> {', '.join(name.removeprefix(f'{self.block}.') for name in self.readers)}"

    @property
    def readers(self) -> tuple[str, ...]:
        """The modules that are given every token: consumers, and a mixture in the place of its experts."""
        inside = tuple(f"{mixture}." for mixture in self.mixtures)
        return (*(name for name in self.consumers if not name.startswith(inside)), *self.mixtures)

    def channels(self, root: nn.Module) -> int:
        """How many of the producer's are meant."""
        return len(root.get_submodule(self.producer).get_parameter("weight")) - self.first

    def to_columns(self, scales: Tensor) -> Tensor:
        """A value of each producer's channel -> of each consumer's column."""
        return scales.view(self.key_value_heads, 1, -1).expand(-1, self._repeats, -1).flatten()

    def from_columns(self, values: Tensor) -> Tensor:
        """A value of each consumer's column -> of each producer's channel, the largest where there are several."""
        return values.view(self.key_value_heads, self._repeats, -1).amax(1).flatten()

    @property
    def _repeats(self) -> int:
        return self.heads // self.key_value_heads


@dataclass
class Pairs:
    """`exact`: scales can move; `refused`: {pair: why not}."""

    exact: list[Pair] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def add(self, pair: Pair, reason: str | None) -> None:
        """`reason`: why its scales cannot move, None where they can."""
        if reason is None:
            self.exact.append(pair)
        else:
            self.refused[str(pair)] = reason


def find_pairs(segment: Segment, architecture: Architecture, layers: Iterable[str]) -> Pairs:
    """The pairs in `segment` with a consumer in `layers`, each tried on the first sample."""
    found, wanted = Pairs(), set(layers)
    if not segment.calls:
        return found
    shared = {name.rpartition(".")[0] for group in architecture.tied for name in group}
    for block in architecture.blocks:
        if segment.name not in (block.name, "") or not any(name.startswith(f"{block.name}.") for name in wanted):
            continue
        for pair in _candidates(segment, block, found.refused):
            if wanted & set(pair.consumers):
                found.add(pair, _unfit(segment.root, pair, shared) or _tried(segment, pair))
        for pair in _expert_pairs(segment, block, found.refused):
            if wanted & set(pair.consumers):
                found.add(pair, _unfit(segment.root, pair, shared))
    return found


def _candidates(segment: Segment, block: Block, refused: dict[str, str]) -> Iterator[Pair]:
    """Pairs that the architecture and the tensors of one sample suggest."""
    root = segment.root
    mixtures = [name for name in linear_experts(root) if name.startswith(f"{block.name}.")]
    readers = _readers(root, block, mixtures)
    with watched(root, block) as reads:
        inputs, outputs = _first_call(segment, [*block.norms, *readers])
    for norm in block.norms:
        fed = [name for name in readers if name in inputs and _same(inputs[name], outputs.get(norm))]
        if not fed:
            refused[norm] = "no linear layer of its block reads its output as it is"
            continue
        whole = [name for name in fed if name not in mixtures]
        several = [name for name in fed if name in mixtures]
        consumers = (*whole, *(layer for name in several for layer in readers[name]))
        pair = Pair(block.name, norm, consumers, mixtures=tuple(several))
        other = next((path for path in reads[norm] if not set(path) & set(fed)), None)
        if other is None:
            yield pair
        else:
            who = other[-1] if other else f"what follows {block.name}"
            refused[str(pair)] = f"moving scales changes the outputs: {who} reads the norm's too"
    attention, feed_forward = block.attention, block.feed_forward
    if attention and attention.value != attention.query:
        heads = attention.heads, attention.key_value_heads
        yield Pair(block.name, attention.value, (attention.output,), *heads)
    if feed_forward and not feed_forward.fused:
        pair = Pair(block.name, feed_forward.up, (feed_forward.down,))
        between = None if feed_forward.gate else activation(root)
        if between is None or is_homogeneous(between):
            yield pair
        else:
            refused[str(pair)] = f"moving scales changes the outputs: {between} lies between"


def _readers(root: nn.Module, block: Block, mixtures: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """{module of the block that may read a norm's output: whose columns are then multiplied}, mixtures last."""
    inside = tuple(f"{mixture}." for mixture in mixtures)
    named = root.get_submodule(block.name).named_modules(prefix=block.name)
    alone = [name for name, module in named if _linear(module) and not name.startswith(inside)]
    alone += [name for mixture in mixtures for name in gates(root, mixture)]
    readers: dict[str, tuple[str, ...]] = {name: (name,) for name in alone}
    for mixture in mixtures:
        experts = cast(LinearExperts, root.get_submodule(mixture))
        readers[mixture] = tuple(f"{mixture}.{place}.{experts.first}" for place in range(experts.number))
    return readers


def _expert_pairs(segment: Segment, block: Block, refused: dict[str, str]) -> Iterator[Pair]:
    """The way up and the second layer of each expert. They are not tried on a sample, which reaches some experts alone,
    but by what lies between (see `LinearExperts.passes_scales`): the rest is linear."""
    for mixture in linear_experts(segment.root):
        if not mixture.startswith(f"{block.name}."):
            continue
        experts = cast(LinearExperts, segment.root.get_submodule(mixture))
        if not experts.passes_scales():
            pair = f"{mixture}.*.{experts.first} -> {mixture.removeprefix(f'{block.name}.')}.*.{DOWN}"
            refused[pair] = "moving scales changes the outputs, by what lies between"
            continue
        for place in range(experts.number):
            up, down = (f"{mixture}.{place}.{name}" for name in (experts.first, DOWN))
            yield Pair(block.name, up, (down,), first=experts.up_begins or 0)


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Which modules read what `owners` (norms) give: {owner: paths of modules, the innermost last}.

    Views and copies of it are it. What is seen has no values, so a plan sees the same.
    """

    def __init__(self, owners: Iterable[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[str, list[tuple[str, ...]]] = {owner: [] for owner in owners}
        self.path: list[str] = []
        self._held: list[Tensor] = []  # a storage's number is its own while the storage is there
        self._owners: dict[int, str] = {}

    def follow(self, tensor: Tensor, owner: str) -> None:
        self._held.append(tensor)
        self._owners[_storage(tensor)] = owner

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_storage(leaf) for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)}
        made = {_storage(leaf) for leaf in tree_iter(out) if isinstance(leaf, Tensor)}
        for owner in dict.fromkeys(self._owners[key] for key in given & self._owners.keys()):
            if func in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
                self.follow(out, owner)
            elif made - given or func._schema.is_mutable:  # not a view
                self.found[owner].append(tuple(self.path))
        return out


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def watched(root: nn.Module, block: Block) -> Iterator[dict[str, list[tuple[str, ...]]]]:
    """Within the context it is noted which modules of `block` read the outputs of its norms: {norm: their paths}."""
    mode, handles = _Reads(block.norms), []
    for name, module in root.get_submodule(block.name).named_modules(prefix=block.name):

        def enter(module: nn.Module, args: Any, name: str = name) -> None:
            mode.path.append(name)

        def leave(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            mode.path.pop()
            if name in mode.found:
                mode.follow(hidden_of(output), name)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with mode:
            yield mode.found
    finally:
        for handle in handles:
            handle.remove()


def activation(root: nn.Module) -> str | None:
    """What lies between a feed-forward's two layers, by transformers' name; None where the config does not say."""
    config = getattr(root, "config", None)
    said = (getattr(config, name, None) for name in ("activation_function", "hidden_act"))
    return next((name for name in said if isinstance(name, str)), None)


@constant
def is_homogeneous(name: str) -> bool:
    """Whether f(s x) = s f(x) for s > 0, of an activation that transformers knows by this name.

    Tried here and not on the model alone, so that a plan, which has no values, knows it too.
    """
    from transformers.activations import ACT2FN

    function, x = ACT2FN[name], torch.linspace(-3, 3, 13)
    return bool(torch.allclose(function(4 * x), 4 * function(x)))


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _same(one: Tensor, other: Tensor | None) -> bool:
    if other is None or one.shape[-1] != other.shape[-1] or one.numel() != other.numel():
        return False
    return torch.equal(one.reshape(-1, one.shape[-1]), other.reshape(-1, other.shape[-1]))


def _unfit(root: nn.Module, pair: Pair, shared: set[str]) -> str | None:
    """Why scales cannot be folded into these modules at all; None where they can."""
    producer, *consumers = (
        getattr(root.get_submodule(name), "weight", None) for name in (pair.producer, *pair.consumers)
    )
    tied = [name for name in (pair.producer, *pair.consumers) if name in shared]
    if tied:
        return f"{tied[0]} shares its parameters with another module"
    if not isinstance(producer, nn.Parameter):
        return f"{pair.producer} has no float weight"
    if not all(isinstance(weight, nn.Parameter) and weight.ndim == 2 for weight in consumers):
        return "not linear layers in float"
    channels = pair.channels(root)
    columns = channels // pair.key_value_heads * pair.heads
    if pair.heads % pair.key_value_heads or any(cast(Tensor, weight).shape[1] != columns for weight in consumers):
        return f"{channels} outputs do not match the inputs"
    return None


def _tried(segment: Segment, pair: Pair) -> str | None:
    """Why moving scales changes what the segment computes; None where it does not."""
    producer = cast(Tensor, segment.root.get_submodule(pair.producer).weight)
    scales = torch.tensor(TRIAL, device=producer.device).repeat(-(-len(producer) // len(TRIAL)))[: len(producer)]
    _, before = _first_call(segment, ["", *pair.readers])
    with restored(segment.root, (pair.producer, *pair.consumers)):
        fold(segment.root, pair, scales)
        _, after = _first_call(segment, ["", *pair.readers])
    change = max(relative(after[name], before[name]) for name in before)
    limit = max(TOLERANCE, 32 * torch.finfo(producer.dtype).eps if producer.dtype.itemsize < 4 else 0)
    # Not `change > limit`: it may be NaN.
    return None if change <= limit else f"moving scales changes the outputs, by {change:.1g} of them in a trial"


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    difference = (found.double() - expected.double()).norm()
    return 0.0 if not difference else float(difference / expected.double().norm())


def _first_call(segment: Segment, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of ({module: its input}, {module: its output}) for the first sample; '' is the segment's own."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor):
                inputs[name] = args[0].detach().clone()
            outputs[name] = hidden_of(output).detach().clone()

        return hook

    handles = [segment.root.get_submodule(n).register_forward_hook(keep(n)) for n in names if n]
    try:
        result = segment.run_first_row()
    finally:
        for handle in handles:
            handle.remove()
    if "" in names:
        outputs[""] = hidden_of(result)
    return inputs, outputs


@torch.no_grad()
def fold(root: nn.Module, pair: Pair, scales: Tensor) -> None:
    """Divide the producer's output channels by `scales` > 0, one each, and multiply the consumers' columns, in place.

    Products are rounded once, from float32 at least, to the weights' dtype. Zeros stay zeros.
    """
    producer = root.get_submodule(pair.producer)
    scales = wide(scales)
    columns = pair.to_columns(scales)
    scales = torch.cat([scales.new_ones(pair.first), scales]) if pair.first else scales
    for tensor in (producer.weight, getattr(producer, "bias", None)):
        if isinstance(tensor, Tensor):
            rows = wide(tensor)
            tensor.data = (rows / scales.to(rows).view(-1, *[1] * (rows.ndim - 1))).to(tensor.dtype)
    for name in pair.consumers:
        weight = root.get_submodule(name).get_parameter("weight")
        weight.data = (wide(weight) * columns.to(weight.device)).to(weight.dtype)


@contextmanager
def restored(root: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Within the context the parameters of the named modules may be changed; afterwards they are as before."""
    kept = [(p, p.data) for name in names for p in root.get_submodule(name).parameters()]
    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


class ChannelRange:
    """Largest and mean magnitude of each input channel [columns], float32 at least, over all that it is given."""

    def __init__(self) -> None:
        self.peak: Tensor | None = None
        self.sum: Tensor | None = None
        self.tokens = 0

    def __call__(self, x: Tensor) -> None:
        rows = wide(x).reshape(-1, x.shape[-1]).abs()
        peak, total = rows.amax(0), rows.sum(0)
        self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)
        self.sum = total if self.sum is None else self.sum + total
        self.tokens += rows.shape[0]

    @property
    def mean(self) -> Tensor:
        assert self.sum is not None
        return self.sum / self.tokens


def channel_ranges(segment: Segment, pairs: Sequence[Pair]) -> dict[str, ChannelRange]:
    """{producer: range of what its consumers are given}, in one pass over the calibration set."""
    ranges = {pair.producer: ChannelRange() for pair in pairs}
    segment.observe({pair.readers[0]: ranges[pair.producer] for pair in pairs})
    return ranges


def reached(pairs: Pairs, ranges: Mapping[str, ChannelRange]) -> Pairs:
    """`pairs`, of which those of experts that the calibration set never reached are refused: nothing says by how much
    to scale."""
    found = Pairs(refused=dict(pairs.refused))
    for pair in pairs.exact:
        found.add(pair, None if ranges[pair.producer].tokens else "no token of the calibration set reaches it")
    return found


def smoothing_scales(inputs: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), [columns] (Xiao et al., 2023, arXiv:2211.10438, equation 4).

    `inputs`: max|X_j| [columns]; `weights`: [out, columns] each, of the layers that read X. A channel that is never
    used, or whose weights are all zero, keeps the scale 1.
    """
    peaks = torch.stack([wide(weight).abs().amax(0) for weight in weights]).amax(0).to(inputs)
    scales = inputs.pow(alpha) / peaks.pow(1 - alpha)
    return torch.where((inputs > 0) & (peaks > 0) & torch.isfinite(scales), scales, 1.0)


def smooth(segment: Segment, architecture: Architecture, layers: Iterable[str], alpha: float) -> Pairs:
    """Move outliers of activations into weights, in each pair of `segment` where that is exact."""
    wanted = set(layers)
    pairs = find_pairs(segment, architecture, wanted)
    ranges = channel_ranges(segment, pairs.exact)
    pairs = reached(pairs, ranges)
    for pair in pairs.exact:
        # What stays in float, as a router does, is as easy with large weights as with small ones.
        rounded = [name for name in pair.consumers if name in wanted]
        weights = [segment.root.get_submodule(name).get_parameter("weight") for name in rounded]
        scales = smoothing_scales(cast(Tensor, ranges[pair.producer].peak), weights, alpha)
        fold(segment.root, pair, pair.from_columns(scales))
    return pairs


def pairs_detail(smoothed: Sequence[Pair], refused: Mapping[str, str], word: str) -> dict[str, Any]:
    """JSON facts: how many pairs were `word` ('smoothed'), which were, and which were not and why."""
    return {f"pairs_{word}": len(smoothed), word: [str(pair) for pair in smoothed], f"not_{word}": dict(refused)}
