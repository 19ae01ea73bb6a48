"""One of many processes that fill a cache together: it takes the next free block of shards, of any view, until all are made.

No process knows how many there are. They may start and stop at any time: whoever comes takes of what is free, who dies gives back
what it had not finished, and whoever makes a store's last shard completes it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..cache import Cache, View
from ..errors import ShardsLeftError
from ..files import claims
from ..format.layout import CROPS_CLAIM
from ..terminal.progress import Progress, note, progress, waiting
from .blocks import FRESH_FAILURES, THIS_MACHINE, TRIES, Blocks, runs

if TYPE_CHECKING:
    from ..extraction.extract import Filling
    from ..extraction.make import CacheWork, TargetRequest
    from ..extraction.planning import CropRequest, ExtractPlan
    from ..extraction.ranks import Process

LOOK_SHARE, MOST_PAUSE_S = 0.05, 10.0
"""Of its time that a process without work spends looking for some, at most; but it looks every so many seconds."""


@dataclass
class _Shared:
    """The store of one view, and the blocks of it that this process takes."""

    filling: Filling
    blocks: Blocks
    is_done: bool = False


def join_plan(path: Path, crops: CropRequest, request: TargetRequest, process: Process) -> CacheWork:
    """make.plan_cache for one of many processes. A crop stage that another one is at is waited for; nothing is written."""
    from ..extraction.make import plan_cache

    wait = waiting(f"The crop stage of {path}")
    observer = claims.Observer()
    while holder := observer.holder_of(path / CROPS_CLAIM):
        wait(holder)
        claims.sleep(claims.POLL_S)
    return plan_cache(path, crops, request, process=replace(process, rank=0, world_size=1))


def join_work(work: CacheWork, skip_bad: bool = False, workers: int | None = None) -> bool:
    """Make the crops that are missing, one process for all, and this process's share of the targets of every view.

    skip_bad, workers: as for make.make_cache. Returns whether anything was missing; raises as make_cache and `join_views`.
    """
    targets = work.targets
    assert targets is not None, "crops have one writer"
    work.make_crops(skip_bad, workers, waiting(f"The crop stage of {work.path}"))
    views = [Cache(work.path).finished_view(number) for number in range(work.crops.n_views)]
    return join_views(views, targets.name, targets.teacher, targets.plan)


def join_views(views: Sequence[View], name: str, teacher, plan: ExtractPlan) -> bool:
    """Make of the stores `name` of these views what nobody else makes, until nothing is missing; whether anything was.

    One process begins a store while the others wait; view 0 comes first, because the others share its quantiser. Returns when the
    last shard is made, by whomever. Raises ShardsLeftError, when all else is made, if shards failed TRIES times; what a process
    meets that is no shard's fault at once, and with it what fails on FRESH_FAILURES shards in a row.
    """
    from ..extraction.extract import Filling

    fillings = [Filling(view, name, teacher, plan, waiting(f"view {view.number}: {name}")) for view in views]
    if all(filling.is_done for filling in fillings):
        return False
    with ExitStack() as stack:
        stores = []
        for filling in fillings:
            filling.begin()
            stores.append(_Shared(filling, stack.enter_context(Blocks(filling.store))))
            stores[-1].blocks.see()
        n_rows, n_missing = sum(filling.spec.n_rows for filling in fillings), _n_missing_rows(stores)
        with progress(name, n_rows, "crops", n_rows - n_missing) as advance:
            _Worker(name, stores, advance).work()
    if any(shared.blocks.look.left for shared in stores):
        raise ShardsLeftError(_told(stores))
    return n_missing > 0


class _Worker:
    def __init__(self, name: str, stores: list[_Shared], advance: Progress):
        self.stores, self.advance = stores, advance
        self.wait = waiting(name)
        self.n_fresh_failures = 0

    def work(self) -> None:
        """Take blocks and make them, until nothing is free and nobody is at work."""
        while True:
            began = time.monotonic()
            if any(map(self._take, self.stores)):
                continue
            if not any(shared.blocks.look.in_work for shared in self.stores):
                return
            self.wait(" and ".join(sorted({who for shared in self.stores for who in shared.blocks.holders})))
            claims.sleep(max(claims.POLL_S, min((time.monotonic() - began) / LOOK_SHARE, MOST_PAUSE_S)))

    def _take(self, shared: _Shared) -> bool:
        """Make the next block of a store, and complete that if it was the last; False if there is none."""
        filling, blocks = shared.filling, shared.blocks
        if shared.is_done:
            return False
        try:
            with blocks.next() as shards:
                self._see_others()
                if shards is not None:
                    with filling.losses_explained(shards):
                        filling.make(list(shards), self.advance, blocks.report)
        except Exception as error:
            self._failed(shared, error)
            return True
        if shards is not None:
            self.n_fresh_failures = 0
        elif not blocks.look.missing:
            filling.complete()
            shared.is_done = True
        return shards is not None

    def _see_others(self) -> None:
        """Count what others have made since."""
        of = self.advance
        of.n_others = max(0, of.total - _n_missing_rows(self.stores) - of.done - of.n_new)

    def _failed(self, shared: _Shared, error: Exception) -> None:
        """Raise `error` unless other shards are worth trying."""
        if shared.blocks.failed is None or not shared.blocks.failed[0].counts:
            raise error
        failure, n_failures = shared.blocks.failed
        note(f"{shared.filling.path}: shard {failure.shard} failed ({n_failures} of {TRIES} times): {error}")
        self.n_fresh_failures += n_failures == 1
        if self.n_fresh_failures == FRESH_FAILURES:
            note(THIS_MACHINE)
            raise error


def _n_missing_rows(stores: list[_Shared]) -> int:
    """Rows, over all stores, of shards that were missing at the last look."""
    return sum(len(shared.filling.spec.rows_of(shard)) for shared in stores for shard in shared.blocks.look.missing)


def _told(stores: list[_Shared]) -> str:
    lines = []
    for shared in stores:
        look = shared.blocks.look
        for run in runs(look.left):
            failure = look.failed[run.start][-1]
            lines.append(f"{shared.filling.path}, shards {run.start}:{run.stop}: {failure.error} (process {failure.pid} on host "
                         f"{failure.host}, {failure.at})")  # fmt: skip
    return (
        f"These shards were left behind {TRIES} failures each; all others are made:\n  " + "\n  ".join(lines) +
        "\nMend what is said there. Then run the same command with --shards FIRST:LAST in the place of --join, for each of them."
    )  # fmt: skip
