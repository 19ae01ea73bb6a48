"""The joined loader while nothing is in the page cache: what telling the kernel of coming batches is worth (`announced`), and
what the order of rows is worth. And what announcing costs when everything is in the page cache.

Pages are dropped by posix_fadvise(DONTNEED), file by file, after they were written to the disk and are mapped no more; mincore
says how many are left. A virtual disk may have a cache behind it: this ranks ways to read, and forecasts no storage.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import click
import numpy as np

from pipelines.ffcv_loader import JoinedLoader
from pipelines.order import Order
from teacher_cache.beton import CropReader
from teacher_cache.reader import StoreReader

from . import made_up, measure
from .joined_loader import consume


def drop(loader: JoinedLoader) -> None:
    """Drop what a loader reads from the page cache."""
    for store in loader.stores:
        store.close()
    crops = loader.decode.crops
    crops._map.madvise(mmap.MADV_DONTNEED)
    for path in [crops.path, *(path for store in loader.stores for path in store.path.rglob("c.*"))]:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def resident(path: Path) -> float:
    """Share of a file's pages that are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        found = np.zeros(-(-len(pages) // mmap.PAGESIZE), "u1")
        address = np.frombuffer(pages, "u1").ctypes.data
        libc.mincore(address, len(pages), found.ctypes.data)
    return float((found & 1).mean())


@click.command()
@click.option("--announced", type=click.IntRange(1), default=2, show_default=True, help="Batches that are announced.")
@measure.options
def main(announced: int, tiny: bool, rounds: int, scratch: Path | None):
    """Crops/s from a cold disk: coming batches announced over not, for random, block-shuffled and ascending order."""
    import numba

    where, workers = measure.environment(), numba.config.NUMBA_NUM_THREADS
    teacher, n_rows, batch = (made_up.SMALL, 64, 8) if tiny else (made_up.VIT_B16, 1024, 64)
    with measure.scratch_folder(scratch, 0 if tiny else 2 << 30) as folder:
        cache = made_up.make_cache(folder, n_rows, teacher.image_size)
        path = made_up.add_targets(cache, teacher, shard_rows=n_rows // 8)
        os.sync()
        crops = CropReader(cache.view(0).path)
        stores = {reader: StoreReader(path, reader) for reader in ("mmap", "pread")}
        arrays = stores["mmap"].spec.array_names
        loaders = {
            (reader, n): JoinedLoader(crops, [store], [arrays], batch, workers, announced=n)
            for reader, store in stores.items()
            for n in (0, announced)
        }
        orders = {
            "random": np.random.default_rng(0).permutation(n_rows),
            "blocks": Order(n_rows, batch, seed=0, block_rows=n_rows // 16, window_blocks=4).epoch(0),
            "ascending": np.arange(n_rows),
        }
        runs = {}

        def add(name: str, reader: str, order: str, n: int, cold: bool) -> None:
            loader, rows = loaders[reader, n], orders[order].reshape(-1, batch)

            def run() -> float:
                if cold:
                    drop(loader)
                elif reader == "mmap":
                    consume(loader, rows)  # what was cold becomes warm
                return -measure.rate_of(lambda: consume(loader, rows))

            runs[name] = run

        for order in orders:
            for n in (0, announced):
                add(f"cold, {order}, {'announced' if n else 'not'}", "mmap", order, n, True)
        for n in (0, announced):
            add(f"cold by pread, random, {'announced' if n else 'not'}", "pread", "random", n, True)
        for n in (0, announced):
            add(f"warm, random, {'announced' if n else 'not'}", "mmap", "random", n, False)
        drop(loaders["mmap", 0])
        left = max(resident(file) for file in path.rglob("c.*"))
        found = measure.take_turns(runs, rounds)
    pairs = [f"cold, {order}" for order in orders] + ["cold by pread, random", "warm, random"]
    claims = [measure.claim(f"announced / not, {pair}", found.over(f"{pair}, announced", f"{pair}, not"), None) for pair in pairs]
    for order in ("blocks", "ascending"):
        claims.append(measure.claim(f"{order} / random, cold, announced",
                                    found.over(f"cold, {order}, announced", "cold, random, announced"), None))  # fmt: skip
    row_bytes = sum(stores["mmap"].spec.row_bytes(array, teacher) for array in arrays)
    conditions = [
        f"{n_rows} crops of {crops.size} px with targets of {row_bytes:,} bytes, "
        f"batches of {batch}, {workers} threads, {announced} batches announced; blocks of {n_rows // 16} rows, windows of 4",
        f"after dropping, at most {left:.1%} of a shard's pages were left in the page cache",
    ]
    measure.report("cold-disk", claims, found.figures("crops/s"), conditions, where)


if __name__ == "__main__":
    main()
