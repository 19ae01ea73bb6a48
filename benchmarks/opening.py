"""What opening and inspecting a cache costs as it grows: 1,000, 100,000 and 1,000,000 rows of five layers, in sparse files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import numpy as np

from pipelines.feed.cached_source import CachedSource
from student.batch import Needs
from teacher_cache.cache import Cache
from teacher_cache.store.reader import StoreReader
from teacher_cache.words import human

from . import made_up, measure, sparse


def inspect(cache: Cache) -> int:
    """`teacher-cache inspect`, as a user starts it; returns 1."""
    command = [sys.executable, "-m", "teacher_cache", "inspect", "--json", str(cache.path)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, cwd=measure.ROOT).stdout)
    assert found["views"][0]["stores"][0]["rows_done"] == cache.n_images
    return 1


def open_store(cache: Cache, n_times: int = 20) -> int:
    """Open the store for reading, and read its first row's attention; returns how often."""
    for _ in range(n_times):
        reader = StoreReader(cache.view(0).store_path(made_up.NAME))
        reader.read("attention", np.zeros(1, "int64"))
        reader.close()
    return n_times


def first_batch(cache: Cache) -> int:
    """What a training waits for before its first batch, without compiling the loader; returns 1."""
    source = CachedSource(cache, [made_up.NAME], [Needs((-1,), attention=True)], batch_size=8)
    next(source.order.steps(0, 1))
    source._open(source.views[0])
    return 1


@click.command()
@measure.options
def main(tiny: bool, rounds: int, scratch: Path | None):
    """Time to open and to inspect a cache of 10^6 rows over that of 10^3."""
    where = measure.environment()
    sizes = (64, 256, 1024) if tiny else (1_000, 100_000, 1_000_000)
    teacher, shard_rows = (made_up.SMALL, 16) if tiny else (made_up.VIT_B16, 2048)
    with measure.scratch_folder(scratch, 0 if tiny else 2 << 30) as folder:
        runs, apparent = {}, {}
        for n_rows in sizes:
            cache = sparse.sparse_cache(folder / str(n_rows), n_rows, 8)
            path = sparse.add_sparse_targets(cache.view(0), teacher, shard_rows=shard_rows, readable=[0])
            apparent[n_rows] = human(sum(file.stat().st_size for file in path.rglob("c.*")))
            runs |= {
                f"inspect, {n_rows:,} rows": lambda cache=cache: inspect(cache),
                f"open, {n_rows:,} rows": lambda cache=cache: open_store(cache),
                f"to the first batch, {n_rows:,} rows": lambda cache=cache: first_batch(cache),
            }
        found = measure.take_turns(runs, rounds)
    smallest, largest = f"{sizes[0]:,} rows", f"{sizes[-1]:,} rows"
    claims = []
    for what, goal in (("inspect", 1.5), ("open", 1.5), ("to the first batch", 5.0)):
        times = found.over(f"{what}, {smallest}", f"{what}, {largest}")
        claims.append(measure.claim(f"{what}: {largest} / {smallest}", times, goal, at_most=True))
    figures = {
        name: {"unit": "s", "median": 1 / rate["median"], "lowest": 1 / rate["highest"], "highest": 1 / rate["lowest"]}
        for name, rate in found.figures().items()
    }
    conditions = [
        f"stores of {', '.join(apparent.values())} by their file sizes, five int8 layers, shards of {shard_rows}; warm",
        "inspect: the command, start of Python included. open: StoreReader, records checked, one row read. To the first batch: "
        "the source, tables of crops with their labels, 64 decoded crops compared, the order of an epoch",
    ]
    measure.report("opening", claims, figures, conditions, where)


if __name__ == "__main__":
    main()
