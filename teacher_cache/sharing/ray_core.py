"""Extraction on Ray Core: workers are told the numbers of shards, and what is done is on the disk. No data goes through Ray.

The process that gives the orders, the driver, holds a claim on no shards, which is how a worker sees that it sees the same file
system. It may die: its workers end with it, and a second one goes on from the disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..errors import ShardsLeftError, UsageError
from ..extraction.cropping import CropJob
from ..extraction.make import TargetRequest, make_missing_crops
from ..extraction.planning import CropRequest
from ..files import guard
from ..files.range_claims import claimed_range
from ..format.layout import CACHE_JSON, RECORDS, store_claims, view_path
from ..store.folding import is_folded
from ..store.store import Store, is_begun
from ..terminal.progress import note, progress, waiting
from .blocks import TRIES
from .dealing import Dealer, Piece
from .ray_cluster import AGAIN, POLL_S, Pool, connected, said, say_once
from .ray_workers import Cutter, Extractor, Plan


def extract_on_ray(path: Path, crops: CropRequest, request: TargetRequest, address: str = "auto", skip_bad: bool = False,
                   dry_run: bool = False) -> bool:  # fmt: skip
    """Make a cache, or what is missing of one, with the workers of a Ray cluster; returns whether anything was missing.

    address: as ray.init takes it: `auto` for the cluster that this machine belongs to, `local` for one of this machine alone.
    Raises UsageError without a cluster, or if no worker fits; ShardsLeftError if some were left behind three failures.
    """
    if request.device.startswith("cuda:"):
        raise UsageError(f"--device {request.device}: Ray gives each worker a GPU of its own. Give auto, cuda or cpu.")
    said.clear()
    path, request = path.absolute(), replace(request, weights=_absolute(request.weights))
    crops = replace(crops, images=crops.images and crops.images.absolute())
    with connected(address) as ray:
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        resource = "GPU" if request.device.startswith("cuda") or request.device == "auto" and has_gpus else "CPU"
        pool = Pool(ray, resource, AGAIN, Extractor, path, crops, request)
        plan = _planned(pool, path)
        if dry_run:
            return False
        if plan.job is not None:
            pool.end()  # whoever cuts crops needs the slots
        wait = waiting(f"The crop stage of {path}")
        make_missing_crops(path, plan.job, skip_bad, None, wait, partial(_cut_all, ray))
        if plan.job is not None:
            plan = _planned(pool, path)
        is_new = any(_missing(plan))
        with _claim_on_nothing(plan) as witness:
            _run(pool, Dealer(lambda: _missing(plan)), (plan, witness), f"{request.store_name} on Ray", "crops",
                 plan.n_rows * len(plan.stores), lambda piece: min(plan.shard_rows, plan.n_rows - piece[1] * plan.shard_rows),
                 may_share=lambda: is_begun(plan.stores[0]))  # fmt: skip
    return is_new


def _absolute(weights: str | None) -> str | None:
    return weights if weights is None or weights.startswith("random:") else str(Path(weights).absolute())


def _run(pool: Pool, dealer: Dealer, orders: tuple, what: str, unit: str, total: int, size: Callable[[Piece], int],
         may_share: Callable[[], bool] = lambda: True) -> None:  # fmt: skip
    """Have everything made that is missing. orders: what a worker is told besides the block.

    size: units of a piece. may_share: False while one worker has to do something before the others.
    """
    n_left = sum(map(size, dealer.missing))
    with progress(what, total, unit, total - n_left) as advance:
        is_told = False
        while dealer.refresh():
            n_before, n_left = n_left, sum(map(size, dealer.missing))
            advance(n_before - n_left)
            pool.grow(*orders)
            n_given = sum(block is not None for _, block in pool.calls.values())
            while pool.idle and (may_share() or not n_given) and (block := dealer.take(len(pool.workers))):
                pool.give(block, *orders)
                n_given += 1
            if not pool.calls:
                time.sleep(POLL_S)  # all that is missing is held by others, or there is no slot
            for block, receipt in pool.outcomes():
                if block is None:
                    continue
                if receipt.outcome == "held" and dealer.is_first(block) and not is_told:
                    is_told = True
                    note(f"Others work on it too, and what they hold is left to them: {receipt.words.partition('. ')[0]}.")
                if receipt.outcome == "failed":
                    dealer.failed(block, receipt.words)
                elif receipt.outcome == "refused":
                    dealer.put_back(block)
                else:
                    dealer.came_back(block)
        advance(n_left - sum(map(size, dealer.missing)))
    if dealer.left:
        listed = "\n  ".join(f"{group}:{number}: {why}" for (group, number), why in sorted(dealer.left.items())[:20])
        raise ShardsLeftError(
            f"{len(dealer.left):,} pieces failed {TRIES} times and were left (view:shard, or 0:part of the crop stage):\n  "
            f"{listed}\nAll else is made. Mend what is wrong and run the same command again."
        )


# --- the two stages --------------------------------------------------------------------------------------------------


def _planned(pool: Pool, path: Path) -> Plan:
    """What there is to make, by the first worker that fits; what it says is said."""
    there = path / CACHE_JSON if (path / CACHE_JSON).exists() else None
    while not pool.idle:
        pool.grow(None, there, most=1)
        if not list(pool.outcomes()):
            time.sleep(POLL_S)
    plan = pool.ray.get(pool.idle[0].plan.remote())
    for line in plan.lines:
        say_once(line)
    return plan


@contextmanager
def _claim_on_nothing(plan: Plan) -> Iterator[Path]:
    """Hold a range without shards, in nobody's way; yields the file of the claim."""
    store = plan.stores[0]
    with claimed_range(store_claims(store), plan.n_shards, plan.n_shards, f"The store {store}"):
        yield guard.claims_on(store)[0].path


def _missing(plan: Plan) -> Iterator[Piece]:
    """What has no commit record, from names alone; of a store that only has to be completed its last shard."""
    for view, store in enumerate(plan.stores):
        if not is_begun(store):
            yield from ((view, shard) for shard in range(plan.n_shards))
        elif not is_folded(store):
            yield from ((view, shard) for shard in Store.open(store).unfinished() or [plan.n_shards - 1])


def _cut_all(ray, job: CropJob) -> None:
    """Have the missing parts of a crop stage cut, whose claim this process holds."""
    witness = guard.claims_on(job.cache_dir)[0].path
    pieces = {(0, part) for part in range(job.work.n_parts)}

    def missing() -> list[Piece]:
        made = [{int(file.stem) for file in view_path(job.work.path, view).glob(RECORDS)} for view in job.views]
        return sorted(pieces - {(0, part) for part in set.intersection(*made)})

    pool = Pool(ray, "CPU", {}, Cutter, ray.put(replace(job)), witness)
    _run(pool, Dealer(missing), (), "cropping on Ray", "images", len(job.images.names),
         lambda piece: len(job.images.names[job.work.rows_of(piece[1])]))  # fmt: skip
    pool.end()
