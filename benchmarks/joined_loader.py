"""The joined loader against its ceiling: decoding crops and copying rows, each measured alone with the same threads, one after
the other. With one layer and with five, and for comparison the loader without targets. `--dtype` chooses what the targets are.

    ceiling = 1 / (1 / decode + 1 / read)
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from pipelines.feed.loader import JoinedLoader
from teacher_cache.crops.beton import CropReader
from teacher_cache.store.reader import StoreReader

from . import made_up, measure


class Alone:
    """Decoding alone, and reading alone, into arrays that are there; a batch at a time, in one thread of Python."""

    def __init__(self, crops: CropReader, store: StoreReader, arrays: list[str], batch: int, workers: int):
        from teacher_cache.kernels.loops import use_threads

        self.crops, self.store, self.use_threads, self.workers = crops, store, use_threads, workers
        self.images = np.empty((batch, crops.size, crops.size, 3), "u1")
        self.rows = {array: np.empty((batch, *store.row_shape(array)), store.spec.row_dtype(array)) for array in arrays}

    def decode(self, order: np.ndarray) -> int:
        self.use_threads(self.workers)
        for rows in order:
            self.crops.read(rows, self.images)
        return order.size

    def read(self, order: np.ndarray) -> int:
        self.use_threads(self.workers)
        for rows in order:
            for array, out in self.rows.items():
                self.store.read(array, rows, out)
        return order.size


def require_equal(loader: JoinedLoader, crops: CropReader, store: StoreReader, rows: np.ndarray) -> None:
    """End the program unless a batch of the loader is what the readers give."""
    for raw in loader.batches(rows[None]):
        same = [np.array_equal(raw.images, crops.read(rows))]
        for part in loader.fields:
            expected = store.read(part.array, rows).reshape(len(rows), -1).view("u1")
            same.append(np.array_equal(raw.records[:, part.offset : part.offset + part.n_bytes], expected))
    if not all(same):
        raise click.ClickException("The joined loader gives other bytes than the readers.")


def consume(loader: JoinedLoader, order: np.ndarray) -> int:
    """Take all batches and drop them; returns rows."""
    return sum(len(raw.rows) for raw in loader.batches(order))


@click.command()
@click.option(
    "--images", type=click.Path(path_type=Path, exists=True), help="Take crops of these images. [default: made-up ones]"
)
@click.option("--threads", type=click.IntRange(1), help="[default: all processors]")
@click.option("--reader", type=click.Choice(["mmap", "pread"]), default="mmap", show_default=True)
@click.option("--dtype", default="int8", show_default=True, help="Of the targets.")
@measure.options
def main(images: Path | None, threads: int | None, reader: str, dtype: str, tiny: bool, rounds: int, scratch: Path | None):
    """Crops/s of the joined loader over what decoding and reading would allow, one after the other."""
    import numba

    where, workers = measure.environment(), threads or numba.config.NUMBA_NUM_THREADS
    teacher, n_rows, batch = (made_up.SMALL, 32, 8) if tiny else (made_up.VIT_B16, 1024, 64)
    with measure.scratch_folder(scratch, 0 if tiny else 1 << 30) as folder:
        cache = made_up.make_cache(folder, n_rows, teacher.image_size, images)
        crops = CropReader(cache.view(0).path)
        store = StoreReader(made_up.add_targets(cache, teacher, dtype=dtype, shard_rows=n_rows // 4), reader)
        five = store.spec.array_names
        one = [five[4], *five[5:]]
        order = np.random.default_rng(0).permutation(n_rows).reshape(-1, batch)
        runs, loaders = {}, {}
        for name, arrays in (("one layer", one), ("five layers", five)):
            alone = Alone(crops, store, arrays, batch, workers)
            loaders[name] = JoinedLoader(crops, [store], [arrays], batch, workers)
            require_equal(loaders[name], crops, store, order[0])
            runs |= {
                f"decode, {name}": lambda alone=alone: alone.decode(order),
                f"read, {name}": lambda alone=alone: alone.read(order),
                f"joined, {name}": lambda loader=loaders[name]: consume(loader, order),
            }
        loaders["none"] = JoinedLoader(crops, [], [], batch, workers)
        runs["loader without targets"] = lambda: consume(loaders["none"], order)
        found = measure.take_turns(runs, rounds)

    def share(name: str) -> list[float]:
        ceiling = lambda rates: 1 / (1 / rates[f"decode, {name}"] + 1 / rates[f"read, {name}"])  # noqa: E731
        return found.each(lambda rates: rates[f"joined, {name}"] / ceiling(rates))

    claims = [measure.claim(f"joined / ceiling, {name}", share(name), 0.9) for name in ("one layer", "five layers")]
    claims.append(
        measure.claim("joined / without targets, five layers", found.over("joined, five layers", "loader without targets"), None)
    )
    row_bytes = {
        name: sum(store.spec.row_bytes(array, store.teacher) for array in arrays)
        for name, arrays in (("one", one), ("five", five))
    }
    conditions = [
        f"{n_rows} crops of {crops.size} px (JPEG, {crops.sizes.mean():,.0f} bytes), {dtype} targets of {row_bytes['one']:,} "
        f"bytes (one layer) and {row_bytes['five']:,} (five), random order, batches of {batch}, {workers} threads, {reader}",
        "warm page cache, crc first (rows were checked before the timed rounds); bytes compared for equality before",
    ]  # fmt: skip
    measure.report(
        "joined-loader" + f"-{dtype.partition(':')[0]}" * (dtype != "int8"), claims, found.figures("crops/s"), conditions, where
    )


if __name__ == "__main__":
    main()
