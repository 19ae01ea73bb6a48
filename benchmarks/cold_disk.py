"""The joined loader while nothing is in the page cache: what telling the kernel of coming batches is worth (`announced`), and
what the order of rows is worth. And what announcing costs when everything is in the page cache.

Pages are dropped by posix_fadvise(DONTNEED), file by file, after they were written to the disk and are mapped no more; mincore
says how many are left. A virtual disk may have a cache behind it: this ranks ways to read, and forecasts no storage.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import resource
import statistics
from pathlib import Path

import click
import numpy as np

from pipelines.feed.loader import JoinedLoader
from pipelines.feed.order import Order
from teacher_cache.crops.beton import CropReader
from teacher_cache.store.reader import StoreReader

from . import made_up, measure
from .joined_loader import consume


def drop(crops: CropReader, stores: list[StoreReader]) -> None:
    """Drop what is read from the page cache. Pages that any of the readers has mapped would stay: all have to be given."""
    for store in stores:
        store.close()
    crops._map.madvise(mmap.MADV_DONTNEED)
    for path in [crops.path, *stores[0].path.rglob("c.*")]:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_rows(store: StoreReader, batches: np.ndarray, announced: int, outs: dict[str, np.ndarray]) -> int:
    """Read all arrays of batch after batch, with `announced` batches announced before; returns rows."""
    for index, rows in enumerate(batches):
        for coming in batches[index and index + announced : index + announced + 1] if announced else ():
            store.announce(list(outs), coming)
        for array, out in outs.items():
            store.read(array, rows, out)
    return batches.size


def waits_so_far() -> int:
    """How often this process has waited: for a page of a map, or in a system call."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_majflt + usage.ru_nvcsw


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
        spec = stores["mmap"].spec
        arrays = spec.array_names
        readers = list(stores.values())
        loaders = {n: JoinedLoader(crops, readers[:1], [arrays], batch, workers, announced=n) for n in (0, announced)}
        orders = {
            "random": np.random.default_rng(0).permutation(n_rows),
            "blocks": Order(n_rows, batch, seed=0, block_rows=n_rows // 16, window_blocks=4).epoch(0),
            "ascending": np.arange(n_rows),
        }
        batches = {name: order.reshape(-1, batch) for name, order in orders.items()}
        outs = {array: np.empty((batch, *stores["mmap"].row_shape(array)), spec.row_dtype(array)) for array in arrays}

        def joined(order: str, n: int, cold: bool = True) -> float:
            loader = loaders[n]
            if cold:
                drop(crops, readers)
            else:
                consume(loader, batches[order])  # what was cold becomes warm
            return -measure.rate_of(lambda: consume(loader, batches[order]))

        waits: dict[str, list[int]] = {}

        def rows_alone(reader: str, n: int) -> float:
            drop(crops, readers)
            before = waits_so_far()
            rate = measure.rate_of(lambda: read_rows(stores[reader], batches["random"], n, outs))
            name = f"waits a thousand rows, rows alone by {reader}, {'announced' if n else 'not'}"
            waits.setdefault(name, []).append((waits_so_far() - before) * 1000 / n_rows)
            return -rate

        runs = {}
        words = (("announced", announced), ("not", 0))
        for reader, (word, n) in itertools.product(stores, words):
            runs[f"rows alone by {reader}, random, {word}"] = lambda reader=reader, n=n: rows_alone(reader, n)
        for order, (word, n) in itertools.product(orders, words):
            runs[f"joined, {order}, {word}"] = lambda order=order, n=n: joined(order, n)
        for word, n in words:
            runs[f"joined, warm, {word}"] = lambda n=n: joined("random", n, cold=False)
        drop(crops, readers)
        left = max(resident(file) for file in path.rglob("c.*"))
        found = measure.take_turns(runs, rounds)
    pairs = sorted({name.rpartition(", ")[0] for name in runs})
    claims = [measure.claim(f"announced / not, {pair}", found.over(f"{pair}, announced", f"{pair}, not"), None) for pair in pairs]
    for order in ("blocks", "ascending"):
        claims.append(measure.claim(f"joined: {order} / random order, announced",
                                    found.over(f"joined, {order}, announced", "joined, random, announced"), None))  # fmt: skip
    row_bytes = sum(spec.row_bytes(array, teacher) for array in arrays)
    conditions = [
        f"{n_rows} crops of {crops.size} px with targets of {row_bytes:,} bytes, "
        f"batches of {batch}, {workers} threads, {announced} batches announced; blocks of {n_rows // 16} rows, windows of 4",
        f"after dropping, at most {left:.1%} of a shard's pages were left in the page cache",
    ]
    counted = {name: round(statistics.median(counts)) for name, counts in waits.items()}
    measure.report("cold-disk", claims, found.figures("crops/s") | counted, conditions, where)


if __name__ == "__main__":
    main()
