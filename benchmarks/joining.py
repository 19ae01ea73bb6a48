"""Processes that join (`extract --join`) against one alone: how near n come to n times one, whether one that is added in mid-run
helps at once, and what the claim of a block costs.

What the machine lets two processes do together is measured beside it: `apart` are two that fill a cache each and know nothing of
each other. A compute-bound teacher on random weights; each process has one core and one thread, for decoding, teacher and disk
together. The processes wait with everything loaded, the store is begun and its quantiser fitted; timed is from the word to join
until the store is complete, with claims, commits and the last blocks, for which all but one wait.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click

from teacher_cache.cache import Cache
from teacher_cache.extraction.extract import Filling
from teacher_cache.extraction.planning import ExtractPlan
from teacher_cache.format.crop_plan import CropPlan
from teacher_cache.sharing.blocks import Blocks
from teacher_cache.store.store import Store
from teacher_cache.teachers import load_teacher

from . import made_up, measure

WORKER = """
import os, sys
name, core, shard_rows = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
os.sched_setaffinity(0, {core})
import torch
torch.set_num_threads(1)
from pathlib import Path
from teacher_cache.cache import Cache
from teacher_cache.extraction.planning import ExtractPlan
from teacher_cache.sharing.joining import join_views
from teacher_cache.teachers import load_teacher
teacher = load_teacher(name, None if name == "demo" else "random:0", None, "cpu", "fp32")
size = teacher.spec.image_size
teacher(torch.zeros(shard_rows, size, size, 3, dtype=torch.uint8), (teacher.spec.depth,))
print("ready", flush=True)
for line in sys.stdin:
    plan = ExtractPlan("last", shard_rows=shard_rows, batch_size=shard_rows)
    join_views([Cache(Path(line.strip())).view(0)], name, teacher, plan)
    print("done", flush=True)
"""
NAMED_SHARD = 2048
"""Rows of a shard by default: what the cost of a claim is compared with."""
MOST_ROUNDS = 3


class Workers:
    """Processes with one core and one thread each that have a teacher and wait for the word. A context manager."""

    def __init__(self, name: str, cores: list[int], shard_rows: int):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "PYTHONPATH": str(measure.ROOT)}
        self._processes = [
            subprocess.Popen([sys.executable, "-c", WORKER, name, str(core), str(shard_rows)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
            for core in cores
        ]  # fmt: skip

    def __enter__(self) -> Workers:
        for number in range(len(self._processes)):
            self.wait(number, "ready")
        return self

    def __exit__(self, *_) -> None:
        for process in self._processes:
            process.communicate()

    def join(self, number: int, cache: Path) -> None:
        print(cache, file=self._processes[number].stdin, flush=True)

    def wait(self, number: int, word: str = "done") -> None:
        if self._processes[number].stdout.readline().strip() != word:
            raise click.ClickException(f"Process {number} ended early.")


def until_complete(store: Store) -> float:
    """The moment at which a store is complete; those that had no more to do notice it a little later."""
    while not store.is_complete:
        time.sleep(0.005)
    return time.perf_counter()


def timed(workers: Workers, caches: Sequence[Path], name: str) -> float:
    """Crops a second of one process for each of `caches`, together; those that are given the same one join."""
    stores, begin = [Cache(cache).view(0).store(name) for cache in dict.fromkeys(caches)], time.perf_counter()
    for number, cache in enumerate(caches):
        workers.join(number, cache)
    seconds = max(map(until_complete, stores)) - begin
    for number in range(len(caches)):
        workers.wait(number)
    return sum(store.spec.n_rows for store in stores) / seconds


def added(workers: Workers, store: Store, cache: Path, n_before: int) -> float:
    """The rate behind the moment at which a process is added to `n_before` over that before it, over what it should be."""
    begin = time.perf_counter()
    for number in range(n_before):
        workers.join(number, cache)
    while len(store.unfinished()) > 0.6 * store.spec.n_shards:
        time.sleep(0.005)
    n_before_rows, added_at = store.spec.shard_rows * (store.spec.n_shards - len(store.unfinished())), time.perf_counter()
    workers.join(n_before, cache)
    after = (store.spec.n_rows - n_before_rows) / (until_complete(store) - added_at)
    for number in range(n_before + 1):
        workers.wait(number)
    return after / (n_before_rows / (added_at - begin)) * n_before / (n_before + 1)


def claim_seconds(store: Store, n: int = 30) -> float:
    """To take a block and to give it back, median."""
    seconds = []
    with Blocks(store) as blocks:
        for _ in range(n):
            begin = time.perf_counter()
            with blocks.next():
                seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


@click.command()
@click.option("--teacher", help="[default: timm:vit_tiny_patch16_224]")
@click.option("--crops", type=click.IntRange(1), help="Of a run. [default: 480]")
@measure.options
def main(teacher: str | None, crops: int | None, tiny: bool, rounds: int, scratch: Path | None):
    """Crops/s of joined processes over as many times that of one; at most three rounds."""
    cores = sorted(os.sched_getaffinity(0))[:3]
    if len(cores) < 2:
        measure.not_run("joining", "one core alone here")
        return
    where, name = measure.environment(), teacher or ("demo" if tiny else "timm:vit_tiny_patch16_224")
    n_rows, shard_rows = crops or (24 if tiny else 480), 2 if tiny else 8
    loaded = load_teacher(name, None if name == "demo" else "random:0", None, "cpu", "fp32")
    size = loaded.spec.image_size
    alone, joined, apart, helps, claims = [], [], [], [], []
    with measure.scratch_folder(scratch) as folder:
        begun = made_up.make_cache(folder / "begun", n_rows, size, plan=CropPlan(size=size, scale=(0.2, 1.0))).path
        plan = ExtractPlan("last", shard_rows=shard_rows, batch_size=shard_rows)
        Filling(Cache(begun).view(0), name, loaded, plan, wait=None).begin()

        def fresh(called: str = "run") -> Path:
            shutil.rmtree(folder / called, ignore_errors=True)
            return shutil.copytree(begun, folder / called)

        with Workers(name, cores, shard_rows) as workers:
            timed(workers, [fresh()] * len(cores), name)  # each compiles its loops
            for _ in range(min(rounds, MOST_ROUNDS)):
                alone.append(timed(workers, [fresh()], name))
                joined.append(timed(workers, [fresh()] * 2, name))
                apart.append(timed(workers, [fresh(), fresh("other")], name))
                cache = fresh()
                store = Cache(cache).view(0).store(name)
                claims.append(claim_seconds(store))
                helps.append(added(workers, store, cache, len(cores) - 1))
    found = measure.Rounds({"one process": alone, "two joined": joined, "two apart": apart})
    measure.report(
        "joining",
        [
            measure.claim("two joined / twice one", found.each(lambda r: r["two joined"] / (2 * r["one process"])), 0.95),
            measure.claim("two joined / two apart", found.over("two joined", "two apart"), 0.95),
            measure.claim(f"rate with a process added to {len(cores) - 1} in mid-run / in proportion", helps, 0.9),
            measure.claim(f"a claim / {NAMED_SHARD:,} rows by one process",
                          [s * r / NAMED_SHARD for s, r in zip(claims, alone, strict=True)], 0.01, at_most=True),
        ],
        found.figures("crops/s") | {"a claim, ms": 1000 * statistics.median(claims)},
        [f"{name} on random weights, {n_rows} crops of {size} px in shards of {shard_rows}, one core and one thread a process"],
        where,
    )  # fmt: skip


if __name__ == "__main__":
    main()
