"""The next free block of a store's shards: who asks gets one that nobody makes, and holds it.

    with Blocks(store) as blocks:
        with blocks.next() as shards:      # range, or None if nothing is free now
            ...                            # make them

A block is a claim (files/range_claims.py): no process needs to know of any other, nor how many there are. Blocks shrink with what
is left, so that the last ones are single shards and all end at about the same time. What fails is tried again, up to TRIES times
by whoever comes next, and then left.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..files.claim_file import Found
from ..files.claims import extent_of
from ..files.range_claims import OwnRange, RangeClaims
from ..format.layout import store_claims
from ..store import failures
from ..store.failures import Failure, utc_now
from ..store.store import Store

TRIES = 3
"""Failures of one shard behind which it is left."""
FRESH_FAILURES = 3
"""So many shards that nobody has failed on before, failing here one after the other, are this machine's fault and not theirs."""
THIS_MACHINE = f"{FRESH_FAILURES} shards in a row failed here that had not failed before: it is this machine, or all are bad."
MOST_SHARDS = 32
"""Of a block: what waits, when a node dies, until its claim is dead."""
SHARE = 2
"""A block is at most what is free, shared out among all who work, SHARE times over."""


@dataclass(frozen=True)
class Look:
    """The shards of a store at one moment."""

    missing: tuple[int, ...]
    held: tuple[range, ...]
    """What others hold, each by one claim."""
    failed: dict[int, list[Failure]]
    """Shard -> those of its failures that count."""

    @cached_property
    def left(self) -> list[int]:
        """Missing shards that failed TRIES times."""
        return [shard for shard in self.missing if len(self.failed.get(shard, ())) >= TRIES]

    @cached_property
    def in_work(self) -> list[int]:
        """Missing shards that somebody holds."""
        is_held = np.zeros(max(self.missing, default=-1) + 1, bool)
        for block in self.held:
            is_held[block.start : block.stop] = True
        return [shard for shard in self.missing if is_held[shard]]

    @cached_property
    def free(self) -> list[int]:
        """Missing shards that whoever asks may have."""
        taken = {*self.left, *self.in_work}
        return [shard for shard in self.missing if shard not in taken]

    def next_block(self, avoid: Container[int] = ()) -> range | None:
        """The block that is next: a run of free shards; one alone if it has failed before. avoid: these come last."""
        free = self.free
        if not free:
            return None
        first = next((shard for shard in free if shard not in avoid), free[0])
        if first in self.failed:
            return range(first, first + 1)
        n_most = min(MOST_SHARDS, -(-len(free) // (SHARE * (len(self.held) + 1))))
        return run_from(first, set(free) - self.failed.keys(), n_most)


class Blocks:
    """The shards of `store` that are still to be made, a block at a time. A context manager.

    look, holders: how things stood when `next` was asked last, and who works on the store beside this process, in words.
    failed: what failed in its block, and how often that shard has by now; None if nothing did.
    """

    def __init__(self, store: Store):
        self.store = store
        self.look, self.holders = Look((), (), {}), list[str]()
        self.failed: tuple[Failure, int] | None = None
        self._claims = RangeClaims(store_claims(store.path), f"The store {store.path}")
        self._own: OwnRange | None = None
        self._failed_here: set[int] = set()

    def __enter__(self) -> Blocks:
        self._claims.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._claims.__exit__(*error)

    @contextmanager
    def next(self) -> Iterator[range | None]:
        """Hold the next free block of shards while the block of code runs, which makes them all; None if nothing is free now.

        Then `look` says whether others are at work (in_work), whether shards were given up (left), or nothing is missing. An
        exception leaves a record of what failed, the first shard of the block that is not finished, and goes on its way; an
        interrupt only gives the block back. The claims of the dead are removed, and what they had not finished is free.
        """
        self.failed = None
        held, dead = self._claims.look()
        if not dead and self._see(held).next_block() is None:
            yield None  # without a word to the disk: many may be waiting
            return
        with self._claims.claimed(self._choose) as own:
            if own is None:
                yield None
                return
            shards, self._own = range(own.first, own.last), own
            try:
                yield shards
                failures.forget(self.store.path, shards)
            except Exception as error:
                self.failed = failures.blame(self.store, shards, error)
                if self.failed is not None and self.failed[0].counts:
                    self._failed_here.add(self.failed[0].shard)
                raise
            finally:
                self._own = None

    def report(self, rate: float) -> None:
        """Say with how many crops a second this process works; its claims tell it to others."""
        self._claims.rate = rate
        if self._own is not None:
            self._own.report(rate)

    def see(self) -> Look:
        """How things stand now; nothing is written."""
        return self._see(self._claims.look()[0])

    def _see(self, held: list[Found]) -> Look:
        """What is missing is read behind the claims: who has let go since then had finished before."""
        missing, failed = tuple(self.store.unfinished()), failures.by_shard(failures.read(self.store.path))
        self.holders = [found.who for found in held]
        self.look = Look(missing, tuple(range(*extent_of(found.path)) for found in held), failed)
        return self.look

    def _choose(self, held: list[Found], dead: list[Found]) -> range | None:
        missing = self.store.unfinished() if dead else []
        for found in dead:
            shard = next((shard for shard in missing if shard in range(*extent_of(found.path))), None)
            if shard is not None and found.holder:
                error = f"{found.who} died while it worked on it"
                died = Failure(shard, error, found.holder["host"], found.holder["pid"], utc_now())
                failures.record(self.store.path, died)
        return self._see(held).next_block(avoid=self._failed_here)


def run_from(first: int, free: Container[int], n_most: int) -> range:
    """`first`, and the numbers behind it that are free too: at most `n_most` together."""
    last = first + 1
    while last in free and last - first < n_most:
        last += 1
    return range(first, last)


def runs(numbers: Sequence[int]) -> list[range]:
    """Ascending numbers as the runs they are made of."""
    found: list[range] = []
    for number in numbers:
        if found and found[-1].stop == number:
            found[-1] = range(found[-1].start, number + 1)
        else:
            found.append(range(number, number + 1))
    return found
