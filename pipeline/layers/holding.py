"""What methods hold while they work, by formula, from shapes alone: for plans in which nothing is run.

Terms are bytes by kind at one moment; the largest of several moments counts. Of models whose layers follow no known
layout (convolutions) nothing is claimed: None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.layers import kernels
from pipeline.layers.quantized import FloatLayer
from pipeline.layers.schemes import empty_layer
from pipeline.models.base import Architecture, Block

Terms = dict[str, int]


def largest(moments: Iterable[Terms]) -> Terms:
    return max(moments, key=lambda terms: sum(terms.values()))


def held(model: nn.Module) -> int:
    """Bytes of parameters and buffers; tied ones count once."""
    return sum({id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}.values())


def layer_work(
    model: nn.Module,
    layers: Sequence[str],
    octets: Callable[[int], float],
    form: tuple[str, Mapping[str, Any]] | None = None,
) -> Terms:
    """The model, and what one of `layers`, the most demanding, takes: `octets` of its item size, for each weight.

    `form`: (scheme, settings) of what each becomes, whose room is there while it is worked on, and stays.
    """
    there = held(model)
    moments = [{"weights": there}]
    for name in layers:
        layer = model.get_submodule(name)
        weight = layer.get_parameter("weight")
        work = int(weight.numel() * octets(weight.itemsize))
        if form is not None:
            made = empty_layer(form[0], cast(FloatLayer, layer), **form[1])
            room = sum(tensor.nbytes for tensor in made.buffers())
            moments.append({"weights": there, "working set": work + room})
            there += room - weight.nbytes - sum(tensor.nbytes for tensor in layer.buffers())
        else:
            moments.append({"weights": there, "working set": work})
    return largest([*moments, {"weights": there}])


def rounded(itemsize: int) -> float:
    """Octets a weight to round it: steps, in float32 at least, and integers; beside a float32 copy of fewer bits."""
    return max(4, itemsize) + (5 if itemsize < 4 else 1)


def masks(model: nn.Module, layers: Sequence[str]) -> int:
    """Bytes of new masks on `layers`."""
    return sum(model.get_submodule(name).get_parameter("weight").numel() for name in layers)


class Calibrated:
    """Moments of a method that goes block by block over calibration `batches` (blockwise.py), these on meta too.

    A GPU has of what waits between blocks the states that a block is given, and those that it gave for the last batch.
    """

    def __init__(
        self, model: nn.Module, architecture: Architecture, batches: Sequence[Mapping[str, Tensor]], device: str
    ) -> None:
        self.model, self.blocks = model, architecture.blocks
        first = next(model.parameters())
        self.itemsize, self.dtype = first.itemsize, first.dtype
        self.wide = max(4, self.itemsize)
        """Of what is worked on: float32 at least."""
        self.widened = self.wide if self.itemsize < self.wide else 0
        ids = [batch["input_ids"] for batch in batches]
        self.tokens = max(rows.numel() for rows in ids)
        self.several = len(ids) > 1
        """Then the output for one batch is still there while the block runs on the next."""
        self.hidden, self.feed_forward = self._weight(self._block.feed_forward.down).shape  # type: ignore[union-attr]
        self.on_cpu, self.all_tokens = device == "cpu", sum(rows.numel() for rows in ids)
        there = self.all_tokens if self.on_cpu else self.tokens * min(2, len(self.blocks))
        self.base = {
            "weights": held(model),
            "calibration": sum(rows.nbytes for rows in ids) if self.on_cpu else 0,
            "hidden states": there * self.hidden * self.itemsize,
        }

    @property
    def _block(self) -> Block:
        return self.blocks[0]

    def _weight(self, name: str) -> Tensor:
        return self.model.get_submodule(name).get_parameter("weight")

    @property
    def gated(self) -> bool:
        return bool(self._block.feed_forward and self._block.feed_forward.gate)

    @property
    def _inner(self) -> int:
        """Feed-forward rows that are there at once while a block runs."""
        return 3 if self.gated else 2

    def running(self, gathered: int = 0, copied: int = 0, kept: bool = True, extra: int = 0) -> Terms:
        """A block runs on a batch, and its layers' inputs are looked at.

        `gathered`: bytes of statistics. `copied`: octets beside an element of an input, for a moment. `kept`: the input
        of the layer before stays meanwhile, as `hessian.collect` keeps it. `extra`: more rows of hidden states.
        """
        stream = 1 + self.several + (kept or self.gated) + extra
        most = max(self._inner * self.itemsize, self.itemsize + copied) * self.feed_forward
        rows = self.tokens * (stream * self.hidden * self.itemsize + most)
        return {**self.base, "activations": rows, "statistics": gathered}

    def integers(self, layers: Sequence[str], held: int) -> list[Terms]:
        """The first block runs in int8 for the next one: on exact integers, or on their values in float. Not the last.

        `layers`: those that are rounded. `held`: copies of a layer's inputs that stay while it multiplies in float.
        """
        if len(self.blocks) == 1:
            return []
        weight = self._weight(self._block.feed_forward.down)  # type: ignore[union-attr]
        rounded = sum(inside.numel() for inside in self.inside(layers).values())
        base = {**self.base, "weights": self.base["weights"] - rounded * (self.itemsize - 1)}
        given = self.itemsize + self.widened
        gate = self.itemsize if self.gated else 0
        stream = 2 * self.hidden * self.itemsize
        if kernels.choose(torch.device("cpu"), self.dtype, self.tokens) in kernels.FBGEMM:
            quotient = self.wide * self.hidden  # of what a layer is given
            wide = [gate + 8, given + 4]  # the result and its sums; the feed-forward's inner rows over their step
            return [{**base, "activations": self.tokens * (stream + quotient + max(wide) * self.feed_forward)}]
        quotients = self.tokens * (stream + (given + 2 * self.wide) * self.feed_forward)
        product = self.tokens * (stream + (given + held * self.wide) * self.feed_forward)
        return [
            {**base, "activations": quotients},
            {**base, "activations": product, "working set": 2 * weight.numel() * self.wide},
        ]

    def nearest(self, layers: Sequence[str], sample: int) -> Terms:
        """What AWQ has from its beginning on: integers rounded to nearest, what a block gives for so many tokens."""
        tokens = min(-(-sample // self.tokens) * self.tokens, self.all_tokens) if self.on_cpu else 0
        rounded = sum(weight.numel() for weight in self.inside(layers).values())
        return {"activations": tokens * self.hidden * self.itemsize, "working set": rounded}

    def trying(self, layers: Sequence[str], homogeneous: bool, sample: int, group_size: int | None) -> list[Terms]:
        """AWQ has its statistics; and with scales moved ranges of the largest layer are narrowed, and a block runs with
        integers that are tried, beside the best ones so far.

        `layers`: those to be rounded. `homogeneous`: whether scales pass from the feed-forward's first layer to its
        last; where there is a gate they do. `sample`: tokens of a trial, whose expected outputs are held.
        """
        attention, feed_forward = self._block.attention, self._block.feed_forward
        assert feed_forward is not None
        weights = self.inside(layers)
        scaled = {name for name in weights if name != feed_forward.down or homogeneous or self.gated}
        if attention and attention.value == attention.query:
            scaled.discard(attention.output)
        first = self.nearest(layers, sample)
        rounded, expected = first["working set"], first["activations"]
        moved = sum(weights[name].nbytes for name in scaled)
        squares = sum(weights[name].shape[1] ** 2 for name in scaled) * self.wide
        whole = self.hessians() + (0 if self.several else self.feed_forward**2 * self.wide)
        before = {**self.base, "statistics": whole + squares}
        down = self._weight(feed_forward.down)
        share = 1.0 if group_size is None else group_size / down.shape[1]
        copies = 2 + (self.widened > 0) + 7 * share  # the error and its product, and of a group seven more
        inner = self.tokens * (2 * self.hidden + self._inner * self.feed_forward) * self.itemsize
        means = self.feed_forward**2 * (2 * self.wide + 3)  # of the largest matrix, and whether they are finite
        return [
            {
                **self.base,
                "activations": expected,
                "statistics": whole + means,
                "working set": rounded,
            },
            {
                **before,
                "activations": expected,
                "working set": rounded + moved + int(copies * down.numel() * self.wide),
            },
            {
                **before,
                "activations": inner + expected,
                "working set": 2 * rounded + moved + rounded * self.itemsize,
            },
        ]

    def shrunk(self, layers: Sequence[str], bits: int) -> float:
        """Octets that the first block is smaller by once all of its `layers` but the last have integers of `bits`."""
        down = self._block.feed_forward.down  # type: ignore[union-attr]
        weights = (weight.numel() for name, weight in self.inside(layers).items() if name != down)
        return sum(weights) * (self.itemsize - bits / 8)

    def masks(self, layers: Sequence[str]) -> tuple[int, int]:
        """Bytes of new masks on `layers`, while the last block runs and while its largest layer is worked on."""
        whole = masks(self.model, layers)
        last = masks(self.model, [name for name in layers if name.startswith(f"{self.blocks[-1].name}.")])
        return whole - last, whole - self._weight(self._block.feed_forward.down).numel()  # type: ignore[union-attr]

    def ranking(self, octets: int) -> Terms:
        """The weights of the largest layer are ranked: `octets` for each."""
        weight = self._weight(self._block.feed_forward.down)  # type: ignore[union-attr]
        return {**self.base, "working set": weight.numel() * octets}

    def inside(self, layers: Sequence[str]) -> dict[str, Tensor]:
        """Weights of those of `layers` that are in the first block."""
        return {name: self._weight(name) for name in layers if name.startswith(f"{self._block.name}.")}

    def hessians(self) -> int:
        """Bytes of one block's, in float32 at least; layers that read the same tensor share one."""
        attention = self._block.attention
        columns = [self.hidden, *([self.feed_forward] if self.several else [])]  # the last is made after a block ran
        if attention is not None:
            columns += [self.hidden, self._weight(attention.output).shape[1]]
        return sum(column**2 for column in columns) * self.wide

    def solving(self, copies: int, layers: int = 0, gone: float = 0) -> Terms:
        """The layer with the most inputs is solved: so many matrices of its inputs' size, so many copies of its own.

        `gone`: octets of weights that were made integers before.
        """
        weight = self._weight(self._block.feed_forward.down)  # type: ignore[union-attr]
        return {
            **self.base,
            "weights": self.base["weights"] - int(gone),
            "statistics": copies * self.feed_forward**2 * self.wide,
            "working set": layers * weight.numel() * self.wide,
        }


def calibrated(
    model: nn.Module, architecture: Architecture, batches: Iterable[Mapping[str, Tensor]] | None, device: str
) -> Calibrated | None:
    """None where nothing is known of such a model, or of its calibration set."""
    held_out = list(batches or ())
    feed_forward = architecture.blocks[0].feed_forward if architecture.blocks else None
    known = feed_forward is not None and not feed_forward.fused
    return (
        Calibrated(model, architecture, held_out, device) if known and held_out and "input_ids" in held_out[0] else None
    )
