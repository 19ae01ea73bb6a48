"""What a store of 100 million rows costs to open, to read and to look through, beside one of a million: sparse files.

One layer of int8 tokens and their scales, 65,536 rows a shard: 15 TB by the sizes of its files. Real are headers, the indices of
all shards and the rows that are read. There are no crops beside it. Each step runs in a process of its own, whose peak memory
is taken above what it has when everything is imported.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from teacher_cache.checking.policy import draw_rows, in_threads
from teacher_cache.checking.shard_check import ArrayCheck
from teacher_cache.store.folding import fold
from teacher_cache.store.reader import StoreReader
from teacher_cache.store.store import Store
from teacher_cache.words import human

from . import made_up, measure, sparse
from .fit_memory import _memory

N_READABLE = 4096
"""Rows that have contents, spread evenly."""
TOKENS = "tokens/12"
WARM = "warm.zarr"
"""A store of a few rows, beside those that are measured."""


def readable_rows(n_rows: int) -> np.ndarray:
    return np.unique(np.linspace(0, n_rows - 1, min(n_rows, N_READABLE)).astype("int64"))


def unfinished(store: Path) -> None:
    """Which shards are missing, from names: what everybody asks who takes the next ones."""
    assert Store.open(store).unfinished() == []


def records(store: Path) -> None:
    """Which shards are missing, with every commit record read: once by whoever completes a store."""
    assert Store.open(store).missing_shards() == []


def opened(store: Path) -> None:
    StoreReader(store).close()


def random_rows(store: Path, n_rows: int = 512) -> None:
    """Rows out of as many shards as there are, in random order."""
    reader = StoreReader(store)
    rows = np.random.default_rng(0).permutation(readable_rows(len(reader)))[:n_rows]
    for batch in np.array_split(rows, 8):
        assert not reader.read(TOKENS, batch).any()
    reader.close()


def verified(store: Path) -> None:
    """As `verify --sample 64` does with a store: header, length and index of every shard file, and 64 rows."""
    opened = Store.open(store)
    files, finished = opened.read_commits()
    rows = readable_rows(opened.spec.n_rows)
    sample = rows[draw_rows(len(rows), 64, np.random.default_rng(0))]
    arrays = [ArrayCheck(opened, array, sample) for array in opened.spec.array_names]
    places = [(shard, column) for shard in np.flatnonzero(finished).tolist() for column in range(len(arrays))]
    assert not any(in_threads(lambda place: arrays[place[1]].fault(place[0], files[place]), places))


def drawn(store: Path) -> None:
    """What `verify --sample 64` draws its rows from."""
    n_rows, spec = Store.open(store).spec.n_rows, Store.open(store).spec
    rows = np.flatnonzero(np.ones(spec.n_shards, bool)[np.arange(n_rows) // spec.shard_rows])
    assert len(draw_rows(len(rows), 64, np.random.default_rng(0))) == 64


BEFORE: dict[str, Callable[[Path], None]] = {"missing shards, by names": unfinished, "missing shards, by records": records}
"""Of a store whose shards are made and that is not yet declared complete."""
BEHIND: dict[str, Callable[[Path], None]] = {
    "open": opened, "open and read 512 rows": random_rows,
    "verify all shards and 64 rows": verified, "draw 64 rows to verify": drawn,
}  # fmt: skip


def alone(step: str, store: Path) -> tuple[float, int]:
    """Seconds and bytes of memory that a step takes, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale", "--step", step, "--store", str(store)]
    return tuple(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=measure.ROOT).stdout))


def measured(step: str, store: Path) -> None:
    """Print the seconds and bytes of a step that is run here."""
    if step.endswith("512 rows"):
        random_rows(store.with_name(WARM), 64)  # what compiled code takes to be there is not counted
    before, began = _memory("VmHWM"), time.perf_counter()
    (BEFORE | BEHIND)[step](store)
    click.echo(json.dumps([time.perf_counter() - began, _memory("VmHWM") - before]))


@click.command()
@click.option("--step", hidden=True)
@click.option("--store", type=click.Path(path_type=Path), hidden=True)
@measure.options
def main(tiny: bool, rounds: int, scratch: Path | None, step: str | None, store: Path | None):
    """Seconds and memory to open, read and verify a store of 10^8 rows over those of 10^6. Takes 3.4 GB of disk."""
    if step:
        measured(step, store)
        return
    where = measure.environment()
    sizes, shard_rows = ((256, 4096), 64) if tiny else ((1_000_000, 100_000_000), 65_536)
    teacher = replace(made_up.SMALL if tiny else made_up.VIT_B16, attention_source=None)
    with measure.scratch_folder(scratch, 0 if tiny else 4 << 30) as folder:
        found: dict[str, list[tuple[float, int]]] = {}
        conditions = []
        for n_rows in (64, *sizes):
            path = folder / (WARM if n_rows == 64 else f"{n_rows}.zarr")
            made_up.begin_store(path, teacher, made_up.store_spec(teacher, n_rows, "last", shard_rows=shard_rows))
            sparse.fill_sparse(path, readable_rows(n_rows))
            if n_rows == 64:
                fold(Store.open(path))
                continue
            for steps in (BEFORE, BEHIND):
                if steps is BEHIND:
                    fold(Store.open(path))
                for name in steps:
                    found[f"{name}, {n_rows:,} rows"] = [alone(name, path) for _ in range(rounds)]
            files = [file.stat() for file in path.rglob("*") if file.is_file()]
            conditions.append(
                f"{n_rows:,} rows, {Store.open(path).spec.n_shards:,} shards of {shard_rows:,}: {len(files):,} files, "
                f"{human(sum(f.st_size for f in files))} by their sizes, {human(sum(512 * f.st_blocks for f in files))} on disk"
            )
    small, large = (f", {n_rows:,} rows" for n_rows in sizes)
    seconds = {name: [s for s, _ in times] for name, times in found.items()}
    claims = [
        measure.claim(f"{name}: {sizes[1]:,} / {sizes[0]:,} rows",
                      [b / a for a, b in zip(seconds[name + small], seconds[name + large], strict=True)], None)
        for name in (*BEFORE, *BEHIND)
    ]  # fmt: skip
    figures = {
        name: {"unit": "s", "median": float(np.median(of)), "lowest": min(of), "highest": max(of),
               "memory": human(int(np.median([n_bytes for _, n_bytes in found[name]])))}
        for name, of in seconds.items()
    }  # fmt: skip
    measure.report("scale", claims, figures, conditions, where)


if __name__ == "__main__":
    main()
