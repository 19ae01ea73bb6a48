"""Extraction on Ray Core: a worker for each GPU of a cluster, or each CPU slot, that is told the numbers of shards.

Ray finds nodes, starts workers on them, starts them again and passes calls; what is done is on the disk, and no data goes through
Ray. The process that gives the orders, the driver, holds a claim on no shards, which is how a node sees that it sees the same
file system. It may die: its workers end with it, and a second one goes on from the disk.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..errors import NoSpaceError, ShardsLeftError, TeacherCacheError, UsageError
from ..extraction.cropping import CropJob
from ..extraction.make import TargetRequest, make_missing_crops
from ..extraction.planning import CropRequest
from ..files import guard
from ..files.range_claims import claimed_range
from ..format.layout import CACHE_JSON, RECORDS, store_claims, view_path
from ..store.folding import is_folded
from ..store.store import Store, is_begun
from ..terminal.progress import note, progress, waiting
from .dealing import TRIES, Block, Dealer, Piece
from .ray_workers import Cutter, Extractor, Plan, Receipt

POLL_S = 2.0
WAIT_S = 30.0
"""After so long without a worker one says what is waited for."""
AGAIN = {"max_restarts": TRIES - 1, "max_task_retries": TRIES - 1}
"""How often Ray starts a worker again that died, and makes it do its call again. Not one whose arguments lie in its store."""


def extract_on_ray(path: Path, crops: CropRequest, request: TargetRequest, address: str = "auto", skip_bad: bool = False,
                   dry_run: bool = False) -> bool:  # fmt: skip
    """Make a cache, or what is missing of one, with the workers of a Ray cluster; returns whether anything was missing.

    address: as ray.init takes it: `auto` for the cluster that this machine belongs to, `local` for one of this machine alone.
    Raises UsageError without a cluster, or if no worker fits; ShardsLeftError if some were left behind three failures.
    """
    if request.device.startswith("cuda:"):
        raise UsageError(f"--device {request.device}: Ray gives each worker a GPU of its own. Give auto, cuda or cpu.")
    _said.clear()
    path, request = path.absolute(), replace(request, weights=_absolute(request.weights))
    crops = replace(crops, images=crops.images and crops.images.absolute())
    with _connected(address) as ray:
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        resource = "GPU" if request.device.startswith("cuda") or request.device == "auto" and has_gpus else "CPU"
        pool = _Pool(ray, resource, AGAIN, Extractor, path, crops, request)
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


class _FirstLines(io.StringIO):
    """Where Ray prints what happens to nodes and workers, with pages of its logs: their first lines are said, on stderr."""

    def write(self, text: str) -> int:
        if line := re.sub(r"\x1b\[[0-9;]*m", "", text).strip().partition("\n")[0]:
            _say(line)
        return len(text)


@contextmanager
def _connected(address: str) -> Iterator:
    """Ray, connected to a cluster while the block runs. One of this machine alone leaves nothing in anybody's home."""
    for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}.items():  # the latter says things at the very end
        os.environ.setdefault(name, value)
    if address == "local" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one to ~/.ray/auth_token
    import ray

    before = signal.getsignal(signal.SIGTERM)
    options = {"include_dashboard": False} if address == "local" else {}
    with contextlib.redirect_stdout(_FirstLines()):
        try:
            ray.init(address, log_to_driver=False, logging_level="ERROR", **options)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            why = str(error).strip().partition("\n")[0]
            raise UsageError(
                f"--address {address}: no Ray cluster answers ({why}). Start one with: ray start --head, and on every other node "
                "ray start --address HOST:6379; or give --address local for this machine alone."
            ) from error
        try:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)  # Ray has put its own in the place of ours
            yield ray
        except ray.exceptions.RayError as error:
            raise TeacherCacheError(f"The Ray cluster fails: {_last_line(error)} What is made is kept.") from error
        finally:
            ray.shutdown()  # and with it the workers


# --- workers ---------------------------------------------------------------------------------------------------------


class _Pool:
    """A worker for each GPU, or each CPU slot, of the cluster as it is now.

    A worker that does not fit is kept and given nothing, so that no other one is started in its place.
    """

    def __init__(self, ray, resource: str, options: dict, kind: type, *arguments):
        self.ray, self.resource = ray, resource
        slot = {"num_gpus": 1} if resource == "GPU" else {"num_cpus": 1}
        n_beside = max((int(node["Resources"].get(resource, 0)) for node in ray.nodes() if node["Alive"]), default=1)
        self._start = lambda: ray.remote(**slot, **options)(kind).remote(*arguments, n_beside=max(1, n_beside))
        self.workers: list = []
        self.idle: list = []
        self.refused: list[str] = []
        self.calls: dict = {}
        self.n_calls, self.n_deaths, self._began = 0, 0, time.monotonic()

    def end(self) -> None:
        for worker in self.workers:
            self.ray.kill(worker)
        self.workers, self.idle, self.refused, self.calls = [], [], [], {}

    def grow(self, *orders, most: int | None = None) -> None:
        """Start a worker in every slot that has none, or until `most` may fit. orders: what they are started with."""
        n_slots = int(self.ray.cluster_resources().get(self.resource, 0))
        while len(self.workers) < (n_slots if most is None else min(n_slots, most + len(self.refused))):
            self.workers.append(worker := self._start())
            self.calls[worker.start.remote(*orders)] = worker, None
        if self.refused and len(self.refused) == len(self.workers) >= n_slots:
            raise UsageError(f"No worker fits. {self.refused[0]}")
        if not self.idle and not self.n_calls and time.monotonic() - self._began > WAIT_S:
            _say(f"No worker is ready yet: the {n_slots} {self.resource} slots of the cluster are taken, or it is still loading.")

    def give(self, block: Block, *more) -> None:
        worker = self.idle.pop(0)
        self.calls[worker.make.remote(*block, *more)] = worker, block

    def outcomes(self) -> Iterator[tuple[Block | None, Receipt]]:
        """Calls that have ended since, or do within POLL_S; block: None for a worker that has started, or has not."""
        calls = list(self.calls)
        if not calls or not self.ray.wait(calls, timeout=POLL_S)[0]:
            return
        for call in self.ray.wait(calls, num_returns=len(calls), timeout=0)[0]:
            worker, block = self.calls.pop(call)
            try:
                receipt = self.ray.get(call)
            except self.ray.exceptions.RayActorError as error:
                self.workers.remove(worker)
                self.n_deaths += 1
                if self.n_deaths > TRIES * (1 + len(self.workers)):
                    raise
                receipt = Receipt("A worker", "failed", _last_line(error))
            except self.ray.exceptions.RayTaskError as error:
                self.idle.append(worker)
                receipt = Receipt("A worker", "failed", f"{type(error.cause).__name__}: {error.cause}")
            else:
                self.n_calls, self.n_deaths = self.n_calls + 1, 0
                if receipt.outcome == "refused":
                    self.refused.append(f"{receipt.who} is given no work: {receipt.words}")
                else:
                    self.idle.append(worker)
            if receipt.outcome == "failed":
                _say(f"{receipt.who} failed: {receipt.words}")
            for line in (*receipt.lines, *self.refused):
                _say(line)
            if receipt.outcome == "stop":
                raise NoSpaceError(receipt.words)
            yield block, receipt


_said: set[str] = set()


def _say(line: str) -> None:
    """Say what was not said before: every worker has the same lines."""
    if line not in _said:
        _said.add(line)
        note(line)


def _last_line(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2]


def _run(pool: _Pool, dealer: Dealer, orders: tuple, what: str, unit: str, total: int, size: Callable[[Piece], int],
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


def _planned(pool: _Pool, path: Path) -> Plan:
    """What there is to make, by the first worker that fits; what it says is said."""
    there = path / CACHE_JSON if (path / CACHE_JSON).exists() else None
    while not pool.idle:
        pool.grow(None, there, most=1)
        if not list(pool.outcomes()):
            time.sleep(POLL_S)
    plan = pool.ray.get(pool.idle[0].plan.remote())
    for line in plan.lines:
        _say(line)
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

    pool = _Pool(ray, "CPU", {}, Cutter, ray.put(replace(job)), witness)
    _run(pool, Dealer(missing), (), "cropping on Ray", "images", len(job.images.names),
         lambda piece: len(job.images.names[job.work.rows_of(piece[1])]))  # fmt: skip
    pool.end()
