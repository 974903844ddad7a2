"""What torch's CUDA pool takes from the device for the tensors that live in it: a simulation of its caching allocator.

The rules and their constants are those of c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h (torch
2.11, `PYTORCH_CUDA_ALLOC_CONF` unset), for one stream: sizes are rounded up to 512 B; up to 1 MiB comes from segments
of 2 MiB, less than 10 MiB from segments of 20 MiB, more from one of its own, rounded up to 2 MiB. The free block that
fits best is taken and split; what is freed joins its free neighbours, and stays reserved.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.planner.live import Event

MIN_BLOCK = 512
SMALL = 1 << 20
"""The largest block of the pool of small ones, `kSmallSize`."""
SMALL_SEGMENT = 2 << 20
LARGE_SEGMENT = 20 << 20
MIN_LARGE = 10 << 20
"""From here on a segment is made for the block, `kMinLargeAlloc`."""
ROUND_LARGE = 2 << 20


@dataclass
class Piece:
    """A part of a segment, of so many `bytes` from `start`; `before` and `after`: its neighbours there."""

    start: int
    bytes: int
    small: bool
    free: bool = False
    before: Piece | None = None
    after: Piece | None = None


def rounded(size: int) -> int:
    """Bytes of the block that is given for a tensor of `size` bytes."""
    return max(MIN_BLOCK, -(-size // MIN_BLOCK) * MIN_BLOCK)


def segment_bytes(size: int) -> int:
    """Bytes that are taken from the device for a block, of `rounded` size, that fits nowhere."""
    if size <= SMALL:
        return SMALL_SEGMENT
    if size < MIN_LARGE:
        return LARGE_SEGMENT
    return -(-size // ROUND_LARGE) * ROUND_LARGE


class Pool:
    """`allocated`: bytes of the blocks in use; `reserved`: of all segments. Segments are never given back."""

    def __init__(self) -> None:
        self.allocated = self.reserved = 0
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        """(bytes, start) of free pieces of the small and the large pool, in order."""
        self._pieces: dict[int, Piece] = {}
        self._end = 0

    def allocate(self, size: int) -> Piece:
        """A block for a tensor of `size` bytes, at least 1."""
        size = rounded(size)
        small = size <= SMALL
        fitting = self._free[small]
        at = bisect.bisect_left(fitting, (size, -1))
        if at < len(fitting):
            piece = self._pieces[fitting[at][1]]
            self._take(piece)
        else:
            piece = Piece(self._end, segment_bytes(size), small)
            self._end += piece.bytes
            self._pieces[piece.start] = piece
            self.reserved += piece.bytes
        left = piece.bytes - size
        if left >= MIN_BLOCK if small else left > SMALL:
            rest = Piece(piece.start + size, left, small, before=piece, after=piece.after)
            if rest.after is not None:
                rest.after.before = rest
            piece.bytes, piece.after = size, rest
            self._pieces[rest.start] = rest
            self._give(rest)
        self.allocated += piece.bytes
        return piece

    def release(self, piece: Piece) -> None:
        """Free a block: it joins its free neighbours in its segment."""
        self.allocated -= piece.bytes
        if piece.after is not None and piece.after.free:
            self._take(piece.after)
            self._join(piece, piece.after)
        if piece.before is not None and piece.before.free:
            self._take(piece.before)
            self._join(piece.before, piece)
            piece = piece.before
        self._give(piece)

    def empty(self) -> None:
        """Give segments of which nothing is in use back to the device, as `torch.cuda.empty_cache` does."""
        for free in self._free.values():
            for _, start in list(free):
                piece = self._pieces[start]
                if piece.before is None and piece.after is None:
                    self._take(piece)
                    del self._pieces[start]
                    self.reserved -= piece.bytes

    def _join(self, first: Piece, second: Piece) -> None:
        """`second`, which comes after it, becomes part of `first`."""
        del self._pieces[second.start]
        first.bytes += second.bytes
        first.after = second.after
        if first.after is not None:
            first.after.before = first

    def _take(self, piece: Piece) -> None:
        free = self._free[piece.small]
        del free[bisect.bisect_left(free, (piece.bytes, piece.start))]
        piece.free = False

    def _give(self, piece: Piece) -> None:
        bisect.insort(self._free[piece.small], (piece.bytes, piece.start))
        piece.free = True


def pooled(events: Iterable[Event]) -> Iterator[tuple[int, int]]:
    """(bytes of the blocks in use, bytes taken from the device) after each event, of a pool that is empty at first.

    One block of a timeline may be there several times, as those of layers that are alike.
    """
    pool, pieces = Pool(), dict[int, list[Piece]]()
    for block, sign, _ in events:
        if sign > 0 and block.bytes:
            pieces.setdefault(id(block), []).append(pool.allocate(block.bytes))
        elif sign < 0 and pieces.get(id(block)):
            pool.release(pieces[id(block)].pop())
        yield pool.allocated, pool.reserved


def reserved(events: Iterable[Event]) -> int:
    """The most that a pool takes from the device for what is allocated and released in order."""
    return max((taken for _, taken in pooled(events)), default=0)
