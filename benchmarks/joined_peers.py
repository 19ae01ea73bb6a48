"""The joined loader against three ways of feeding a student that its users would otherwise take: torch's DataLoader over zarr,
webdataset and litdata, all holding the same crops and rows (peer_loaders.py says how each was set up).

Ours and the DataLoader read in random order. The streaming formats read in the order of their files, which is their best.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import click
import numpy as np

from pipelines.feed.loader import JoinedLoader
from teacher_cache.crops.beton import CropReader
from teacher_cache.store.reader import StoreReader

from . import made_up, measure, peer_loaders


def rate(batches: Iterable) -> float:
    """Crops/s between the first batch and the last; starting an epoch is not counted. Negative: see measure.take_turns."""
    n_crops, started = 0, None
    for batch in batches:
        if started is None:
            started = time.perf_counter()
        else:
            n_crops += len(batch["row"]) if isinstance(batch, dict) else len(batch.rows)
    return -n_crops / (time.perf_counter() - started)


def require_equal(name: str, batches: Iterable, crops: CropReader, store: StoreReader, arrays: list[str]) -> None:
    """End the program unless a peer's first batch holds the very pixels and bytes of its rows."""
    batch = next(iter(batches))
    rows = batch["row"].numpy()
    stored = [store.read(array, rows).reshape(len(rows), -1).view("u1") for array in arrays]
    same = np.array_equal(batch["image"].numpy(), crops.read(rows))
    if not same or not np.array_equal(batch["record"].numpy(), np.concatenate(stored, 1)):
        raise click.ClickException(f"{name} gives other pixels or rows than the cache holds.")


@click.command()
@click.option(
    "--images", type=click.Path(path_type=Path, exists=True), help="Take crops of these images. [default: made-up ones]"
)
@click.option("--workers", type=click.IntRange(1), help="Threads of ours, processes of the others. [default: all processors]")
@measure.options
def main(images: Path | None, workers: int | None, tiny: bool, rounds: int, scratch: Path | None):
    """Crops/s of the joined loader over those of DataLoader + zarr, webdataset and litdata."""
    import numba

    where, workers = measure.environment(), workers or numba.config.NUMBA_NUM_THREADS
    teacher, n_rows, batch = (made_up.SMALL, 64, 8) if tiny else (made_up.VIT_B16, 1024, 64)
    with measure.scratch_folder(scratch, 0 if tiny else 4 << 30) as folder:
        cache = made_up.make_cache(folder, n_rows, teacher.image_size, images)
        store_path = made_up.add_targets(cache, teacher, shard_rows=n_rows // 4)
        view, store = cache.view(0).path, StoreReader(store_path)
        crops, arrays = CropReader(view), store.spec.array_names
        samples = peer_loaders.Samples(crops, store, arrays)
        tars = peer_loaders.write_webdataset(folder / "webdataset", samples, 2 * workers)
        peer_loaders.write_litdata(folder / "litdata", samples)

        order = np.random.default_rng(0).permutation(n_rows).reshape(-1, batch)
        few = order[: 4 if tiny else 8]  # zarr-python takes long
        ours = JoinedLoader(crops, [store], [arrays], batch, workers)
        peers = {
            "DataLoader + zarr": peer_loaders.zarr_loader(view, store_path, arrays, batch, workers, few),
            "webdataset": peer_loaders.webdataset_loader(tars, crops.size, batch, workers),
            "litdata": peer_loaders.litdata_loader(folder / "litdata", crops.size, batch, workers),
        }
        for name, loader in peers.items():
            require_equal(name, loader, crops, store, arrays)
        runs = {"ours": lambda: rate(ours.batches(order))}
        runs |= {name: lambda loader=loader: rate(loader) for name, loader in peers.items()}
        found = measure.take_turns(runs, rounds)
    goals = {"DataLoader + zarr": 2.5, "webdataset": 2.0, "litdata": 1.5}
    claims = [measure.claim(f"ours / {name}", found.over("ours", name), goal) for name, goal in goals.items()]
    row_bytes = sum(store.spec.row_bytes(array, store.teacher) for array in arrays)
    conditions = [
        f"{n_rows} crops of {crops.size} px (JPEG, {crops.sizes.mean():,.0f} bytes) with targets of {row_bytes:,} bytes "
        f"({', '.join(arrays)}), batches of {batch}, {workers} workers each, warm page cache",
        "pixels and rows compared for equality before; all decode with FFCV's decoder. Ours and DataLoader in random order, the "
        "others in the order of their files; prefetch 4 batches a worker",
    ]
    measure.report("joined-peers", claims, found.figures("crops/s"), conditions, where)


if __name__ == "__main__":
    main()
