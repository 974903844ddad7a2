"""What quantized layers decode is counted once for all layers alike, and then written down again.

To decode a weight of few bits takes some twenty operators, in each layer, each pass, and once more in each backward
pass: most of what a plan of QLoRA waited for. Layers of one shape and format hold the same bytes in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from pipeline.layers import quantized
from pipeline.layers.nf4 import NF4Layer
from pipeline.layers.quantized import IntegerLayer, QuantizedLayer
from pipeline.planner.live import Block, Live

Decode = Callable[[Any, int, int], Tensor]
Pattern = list[tuple[int, int, str]]
"""(place of a block among those of the pattern, +1 or -1, what ran then)."""


@contextmanager
def replaying(live: Live) -> Iterator[None]:
    """While `live` counts: the methods that decode a layer's weight run once for all layers alike."""
    with ExitStack() as stack:
        for cls in (NF4Layer, IntegerLayer):
            decoding = _Decoding(live, cls.decoded_rows)
            run = lambda layer, begin, end, decoding=decoding: decoding(layer, begin, end)  # noqa: E731
            stack.enter_context(mock.patch.object(cls, "decoded_rows", run))
        stack.enter_context(few_parts())
        yield


def few_parts() -> AbstractContextManager[Any]:
    """Of a large weight that is decoded in parts, the first two: all others hold what the second does, or less."""
    every = quantized.parts
    return mock.patch.object(quantized, "parts", new=lambda rows, step: every(rows, step)[:2])


class _Decoding:
    def __init__(self, live: Live, decode: Decode) -> None:
        self.live, self.decode = live, decode
        self.patterns: dict[Any, tuple[list[int], Pattern, int, Tensor]] = {}
        """By what layers have in common: bytes of the blocks, their course, the weight's place, a tensor like it."""

    def __call__(self, layer: QuantizedLayer, begin: int, end: int) -> Tensor:
        stored = tuple((name, tensor.shape, tensor.dtype) for name, tensor in layer.named_buffers())
        key = (type(layer), repr(layer.settings()), layer.weight_dims, stored, end - begin, torch.is_grad_enabled())
        if key in self.patterns:
            return self._again(*self.patterns[key])
        events = self.live.timeline.events
        start = len(events)
        weight = self.decode(layer, begin, end)
        whole = events[start:]
        blocks = list({id(block): block for block, _, _ in whole}.values())
        places = {id(block): place for place, block in enumerate(blocks)}
        pattern = [(places[id(block)], sign, operator) for block, sign, operator in whole]
        left = [place for place in range(len(blocks)) if sum(sign for at, sign, _ in pattern if at == place)]
        # One block stays, the weight's own, and none that was there before goes; else each layer is run.
        if len(left) == 1 and blocks[left[0]].bytes == weight.untyped_storage().nbytes():
            like = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta")
            self.patterns[key] = [block.bytes for block in blocks], pattern, left[0], like
        return weight

    def _again(self, sizes: list[int], pattern: Pattern, kept: int, like: Tensor) -> Tensor:
        blocks = [Block(size, self.live.phase) for size in sizes]
        events, weight = self.live.timeline.events, None
        for place, sign, operator in pattern:
            if place != kept:
                events.append((blocks[place], sign, operator))
            else:
                weight = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
                events[-1] = events[-1][0], sign, operator
        assert weight is not None
        return weight
