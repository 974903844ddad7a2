"""Moving scales between layers without changing what they compute: what SmoothQuant and AWQ quantize better after.

Where one module's output channels go to linear layers and nowhere else, dividing channel j by s_j and multiplying the
column j of each of these layers by s_j leaves the model as it was (Nagel et al., 2019, arXiv:1906.04721, call it
equalization). A norm is divided in its weight and bias, a linear layer in the rows of its weight and its bias.

Which modules are such pairs is looked up in the architecture and then tried: scales that are powers of two (which round
nothing) are moved, and the outputs must stay. A norm whose output is a residual too (post-norm blocks), or a
nonlinearity that is not positively homogeneous (GELU; ReLU is), shows so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.layers.blockwise import Segment, hidden_of
from pipeline.layers.constants import constant
from pipeline.layers.quantize import wide
from pipeline.models.base import Architecture, Block

TOLERANCE = 1e-4
"""Relative change of the outputs below which a trial counts as exact, in float32 and wider."""
TRIAL = (1 / 16, 4.0, 16.0, 1 / 4)
"""Scales that are tried, channel by channel in turn."""


@dataclass(frozen=True)
class Pair:
    """`producer` (a norm or linear layer), whose output channels are the inputs of the linear layers `consumers`.

    `heads` and `key_value_heads` differ between a value and an output projection with grouped queries: each value
    channel is then the input of several columns.
    """

    block: str
    producer: str
    consumers: tuple[str, ...]
    heads: int = 1
    key_value_heads: int = 1

    def __str__(self) -> str:
        return f"{self.producer} -> {', '.join(name.removeprefix(f'{self.block}.') for name in self.consumers)}"

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
            if not wanted & set(pair.consumers):
                continue
            reason = _unfit(segment.root, pair, shared) or _tried(segment, pair)
            if reason is None:
                found.exact.append(pair)
            else:
                found.refused[str(pair)] = reason
    return found


def _candidates(segment: Segment, block: Block, refused: dict[str, str]) -> Iterator[Pair]:
    """Pairs that the architecture and the tensors of one sample suggest."""
    linears = [f"{block.name}.{n}" for n, m in segment.root.get_submodule(block.name).named_modules() if _linear(m)]
    inputs, outputs = _first_call(segment, [*block.norms, *linears])
    for norm in block.norms:
        fed = tuple(name for name in linears if name in inputs and _same(inputs[name], outputs.get(norm)))
        if fed:
            yield Pair(block.name, norm, fed)
        else:
            refused[norm] = "no linear layer of its block reads its output as it is"
    attention, feed_forward = block.attention, block.feed_forward
    if attention and attention.value != attention.query:
        heads = attention.heads, attention.key_value_heads
        yield Pair(block.name, attention.value, (attention.output,), *heads)
    if feed_forward and not feed_forward.fused:
        pair = Pair(block.name, feed_forward.up, (feed_forward.down,))
        between = None if feed_forward.gate else activation(segment.root)
        if between is None or is_homogeneous(between):
            yield pair
        else:
            refused[str(pair)] = f"moving scales changes the outputs: {between} lies between"


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
    producer, *consumers = (root.get_submodule(name) for name in (pair.producer, *pair.consumers))
    tied = [name for name in (pair.producer, *pair.consumers) if name in shared]
    if tied:
        return f"{tied[0]} shares its parameters with another module"
    if not isinstance(getattr(producer, "weight", None), nn.Parameter):
        return f"{pair.producer} has no float weight"
    if not all(map(_linear, consumers)):
        return "not linear layers in float"
    channels = len(cast(Tensor, producer.weight))
    columns = channels // pair.key_value_heads * pair.heads
    if pair.heads % pair.key_value_heads or any(cast(nn.Linear, c).in_features != columns for c in consumers):
        return f"{channels} outputs do not match the inputs"
    return None


def _tried(segment: Segment, pair: Pair) -> str | None:
    """Why moving scales changes what the segment computes; None where it does not."""
    producer = cast(Tensor, segment.root.get_submodule(pair.producer).weight)
    scales = torch.tensor(TRIAL, device=producer.device).repeat(-(-len(producer) // len(TRIAL)))[: len(producer)]
    _, before = _first_call(segment, ["", *pair.consumers])
    with restored(segment.root, (pair.producer, *pair.consumers)):
        fold(segment.root, pair, scales)
        _, after = _first_call(segment, ["", *pair.consumers])
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
    """Divide the producer's output channels by `scales` [channels] > 0, and multiply the consumers' columns, in place.

    Products are rounded once, from float32 at least, to the weights' dtype. Zeros stay zeros.
    """
    producer = root.get_submodule(pair.producer)
    scales = wide(scales)
    for tensor in (producer.weight, getattr(producer, "bias", None)):
        if isinstance(tensor, Tensor):
            rows = wide(tensor)
            tensor.data = (rows / scales.to(rows).view(-1, *[1] * (rows.ndim - 1))).to(tensor.dtype)
    columns = pair.to_columns(scales)
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
    segment.observe({pair.consumers[0]: ranges[pair.producer] for pair in pairs})
    return ranges


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
    pairs = find_pairs(segment, architecture, layers)
    ranges = channel_ranges(segment, pairs.exact)
    for pair in pairs.exact:
        weights = [segment.root.get_submodule(name).get_parameter("weight") for name in pair.consumers]
        scales = smoothing_scales(cast(Tensor, ranges[pair.producer].peak), weights, alpha)
        fold(segment.root, pair, pair.from_columns(scales))
    return pairs


def pairs_detail(smoothed: Sequence[Pair], refused: Mapping[str, str], word: str) -> dict[str, Any]:
    """JSON facts: how many pairs were `word` ('smoothed'), which were, and which were not and why."""
    return {f"pairs_{word}": len(smoothed), word: [str(pair) for pair in smoothed], f"not_{word}": dict(refused)}
