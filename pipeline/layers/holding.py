"""What methods hold while they work, by formula, from shapes alone: for plans in which nothing is run.

Terms are bytes by kind at one moment; the largest of several moments counts. Of models whose layers follow no known
layout (convolutions) nothing is claimed: None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.layers import kernels
from pipeline.models.base import Architecture, Block

Terms = dict[str, int]


def largest(moments: Iterable[Terms]) -> Terms:
    return max(moments, key=lambda terms: sum(terms.values()))


def held(model: nn.Module) -> int:
    """Bytes of parameters and buffers; tied ones count once."""
    return sum({id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}.values())


def layer_work(model: nn.Module, layers: Sequence[str], octets: Callable[[int], float]) -> Terms:
    """The model, and what the largest of `layers` takes to be worked on: `octets` of its item size, for each weight."""
    weights = [model.get_submodule(name).get_parameter("weight") for name in layers]
    return {
        "weights": held(model),
        "working set": max((int(w.numel() * octets(w.itemsize)) for w in weights), default=0),
    }


def checked(itemsize: int) -> float:
    """Octets a weight to see that all are finite (|w|, and three truths), or to round them, whichever is more."""
    return max(itemsize + 3, 9 if itemsize < 4 else 5)


def masks(model: nn.Module, layers: Sequence[str]) -> int:
    """Bytes of new masks on `layers`."""
    return sum(model.get_submodule(name).get_parameter("weight").numel() for name in layers)


class Calibrated:
    """Moments of a method that goes block by block over calibration `batches` (blockwise.py), these on meta too."""

    def __init__(self, model: nn.Module, architecture: Architecture, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.model, self.blocks = model, architecture.blocks
        first = next(model.parameters())
        self.itemsize = first.itemsize
        ids = [batch["input_ids"] for batch in batches]
        self.tokens = max(rows.numel() for rows in ids)
        self.several = len(ids) > 1
        """Then the output for one batch is still there while the block runs on the next."""
        self.hidden, self.feed_forward = self._weight(self._block.feed_forward.down).shape  # type: ignore[union-attr]
        self.base = {
            "weights": held(model),
            "calibration": sum(rows.nbytes for rows in ids),
            "hidden states": sum(rows.numel() for rows in ids) * self.hidden * self.itemsize,
        }

    @property
    def _block(self) -> Block:
        return self.blocks[0]

    def _weight(self, name: str) -> Tensor:
        return self.model.get_submodule(name).get_parameter("weight")

    @property
    def _inner(self) -> int:
        """Feed-forward rows that are there at once while a block runs."""
        gate = self._block.feed_forward.gate if self._block.feed_forward else None
        return 3 if gate else 2

    def running(self, gathered: int = 0, counted: int = 1, extra: int = 0) -> Terms:
        """A block runs on a batch, and `counted` more copies of its largest input are made; `gathered`: statistics."""
        stream, wide = 2 + self.several + extra, max(4, self.itemsize)
        widened = wide * counted + (wide if self.itemsize < wide else 0)
        most = max(self._inner * self.itemsize, self.itemsize + widened) * self.feed_forward
        rows = self.tokens * (stream * self.hidden * self.itemsize + most)
        return {**self.base, "activations": rows, "statistics": gathered}

    def integers(self) -> Terms:
        """A block runs in int8: on exact integers, or on their values in float."""
        floats = kernels.choose(torch.device("cpu"), torch.float32, self.tokens) == "float"
        rows = self.tokens * ((2 + self.several) * self.hidden + (3 if floats else self._inner) * self.feed_forward) * 4
        return {**self.base, "activations": rows}

    def hessians(self) -> int:
        """Bytes of one block's, in float32 at least; layers that read the same tensor share one."""
        attention = self._block.attention
        columns = [self.hidden, *([self.feed_forward] if self.several else [])]  # the last is made after a block ran
        if attention is not None:
            columns += [self.hidden, self._weight(attention.output).shape[1]]
        return sum(column**2 for column in columns) * max(4, self.itemsize)

    def solving(self, copies: int, layers: int = 0) -> Terms:
        """The layer with the most inputs is solved: so many matrices of its inputs' size, so many copies of its own."""
        wide = max(4, self.itemsize)
        weight = self._weight(self._block.feed_forward.down)  # type: ignore[union-attr]
        return {
            **self.base,
            "statistics": copies * self.feed_forward**2 * wide,
            "working set": layers * weight.numel() * wide,
        }


def calibrated(
    model: nn.Module, architecture: Architecture, batches: Iterable[Mapping[str, Tensor]] | None
) -> Calibrated | None:
    """None where nothing is known of such a model, or of its calibration set."""
    held_out = list(batches or ())
    known = architecture.blocks and architecture.blocks[0].feed_forward is not None
    return Calibrated(model, architecture, held_out) if known and held_out and "input_ids" in held_out[0] else None
