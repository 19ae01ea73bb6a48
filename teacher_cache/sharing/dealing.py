"""Which pieces of the work are handed out next. What is missing is what the disk says: a piece is made when its commit is there.

So nothing is lost with whoever deals, a piece that is made twice is harmless, and one that was handed out and does not come back
is handed out again when there is nothing else to do.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from .blocks import TRIES, run_from

MOST = 16
"""Pieces of a block."""
SPLIT = 4
"""Blocks, for each worker, that what is missing is cut into at least: the last ones are small."""
AGAIN_S = 20.0
"""For so long nobody else is asked for a piece that is handed out, or that somebody else holds."""

Piece = tuple[int, int]
"""(view, shard), or (0, part of the crop stage)."""


class Block(NamedTuple):
    """Pieces first, ..., last - 1 of a group."""

    group: int
    first: int
    last: int

    def pieces(self) -> list[Piece]:
        return [(self.group, number) for number in range(self.first, self.last)]


class Dealer:
    """Deals the pieces that are missing in blocks; one that has failed comes last, alone.

    look: gives the pieces that are missing on the disk, ascending. left: piece -> why it was given up.
    """

    def __init__(self, look: Callable[[], Iterable[Piece]], now: Callable[[], float] = time.monotonic):
        self.look, self.now = look, now
        self.missing = list(look())
        self.left: dict[Piece, str] = {}
        self._out: dict[Piece, float] = {}
        self._given: Counter[Piece] = Counter()
        self._failures: Counter[Piece] = Counter()

    def refresh(self) -> bool:
        """Look at the disk again; returns whether anything is still to be made."""
        self.missing = list(self.look())
        return any(piece not in self.left for piece in self.missing)

    def take(self, n_workers: int) -> Block | None:
        """A block for a worker that has nothing to do; None if all is handed out."""
        wanted = [piece for piece in self.missing if piece not in self.left]
        fresh = [piece for piece in wanted if piece not in self._out]
        late = [piece for piece in wanted if self.now() - self._out.get(piece, self.now()) >= AGAIN_S]
        among = [piece for piece in fresh if piece not in self._failures] or (fresh or late)[:1]
        if not among:
            return None
        group, first = among[0]
        run = run_from(first, {number for of, number in among if of == group}, min(MOST, len(fresh) // (SPLIT * n_workers)))
        block = Block(group, run.start, run.stop)
        self._given.update(block.pieces())
        self.came_back(block)
        return block

    def is_first(self, block: Block) -> bool:
        """Whether none of a block was handed out before."""
        return all(self._given[piece] == 1 for piece in block.pieces())

    def came_back(self, block: Block) -> None:
        """A block was made, or is somebody else's: for a while nobody is asked for what is missing of it."""
        self._out |= dict.fromkeys(block.pieces(), self.now())

    def failed(self, block: Block, why: str) -> None:
        """Pieces are made in order, so it was the first that is missing; behind TRIES failures it is left."""
        self.refresh()
        missing = [piece for piece in block.pieces() if piece in self.missing]
        for piece in missing:
            self._out.pop(piece, None)
        for piece in missing[:1]:
            self._failures[piece] += 1
            if self._failures[piece] >= TRIES:
                self.left[piece] = why

    def put_back(self, block: Block) -> None:
        """Nobody has begun with a block."""
        for piece in block.pieces():
            self._out.pop(piece, None)
