"""Rows of five int8 layers in random order, warm: this reader against zarr-python and tensorstore on the very same shards, and
LMDB with the same rows, one record each. And rows of the same layers as klt:3.2 by this reader, against the int8 ones in LMDB.

The rivals at their best here: zarr-python one index at a time (a list of indices is ten times slower), tensorstore with all reads
of a batch in flight, LMDB read in place (`buffers=True`, no locks), its rows copied by as many threads as the others have.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np

from teacher_cache.store.reader import StoreReader

from . import made_up, measure


class Ours:
    """StoreReader, into arrays that are there."""

    def __init__(self, store: Path, arrays: list[str], batch: int, check: str, n_threads: int, reader: str = "mmap"):
        from teacher_cache.kernels.loops import use_threads

        self.reader, self.use_threads, self.n_threads = StoreReader(store, reader, check), use_threads, n_threads
        dtypes = {array: self.reader.spec.row_dtype(array) for array in arrays}
        self.out = {array: np.empty((batch, *self.reader.row_shape(array)), dtypes[array]) for array in arrays}

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        self.use_threads(self.n_threads)
        return {array: self.reader.read(array, rows, out[: len(rows)]) for array, out in self.out.items()}


class ZarrPython:
    def __init__(self, store: Path, arrays: list[str]):
        import zarr

        self.arrays = {array: zarr.open_array(store / array, mode="r") for array in arrays}

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.stack([array[row] for row in rows.tolist()]) for name, array in self.arrays.items()}


class TensorStore:
    def __init__(self, store: Path, arrays: list[str], n_threads: int):
        import tensorstore as ts

        limits = {"data_copy_concurrency": {"limit": n_threads}, "file_io_concurrency": {"limit": n_threads}}
        self.arrays = {
            array: ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store / array)}},
                           context=ts.Context(limits), read=True).result()
            for array in arrays
        }  # fmt: skip

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        waiting = {name: [array[row].read() for row in rows.tolist()] for name, array in self.arrays.items()}
        return {name: np.stack([future.result() for future in futures]) for name, futures in waiting.items()}


class Lmdb:
    """All arrays of a row back to back in one record."""

    def __init__(self, path: Path, reader: StoreReader, arrays: list[str], batch: int, n_threads: int):
        import lmdb

        self.shapes = {array: (reader.row_shape(array), np.dtype(reader.spec.row_dtype(array))) for array in arrays}
        self.n_bytes = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self.shapes.values())
        options = {"map_size": 2 * len(reader) * (self.n_bytes + 8192) + (1 << 26), "subdir": False}
        with lmdb.open(str(path), **options) as written:
            for start in range(0, len(reader), 64):
                rows = np.arange(start, min(start + 64, len(reader)))
                values = [reader.read(array, rows).reshape(len(rows), -1).view("u1") for array in arrays]
                with written.begin(write=True) as transaction:
                    for row, record in zip(rows.tolist(), np.concatenate(values, 1), strict=True):
                        transaction.put(row.to_bytes(8, "big"), record.tobytes())
        self.environment = lmdb.open(str(path), readonly=True, lock=False, readahead=False, **options)
        self.pool, self.n_threads = ThreadPoolExecutor(n_threads), n_threads
        self.out = np.empty((batch, self.n_bytes), "u1")

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        list(self.pool.map(lambda first: self._copy(rows, first), range(self.n_threads)))
        return self._split(self.out[: len(rows)])

    def _copy(self, rows: np.ndarray, first: int) -> None:
        with self.environment.begin(buffers=True) as transaction:
            for i in range(first, len(rows), self.n_threads):
                self.out[i] = np.frombuffer(transaction.get(int(rows[i]).to_bytes(8, "big")), "u1")

    def _split(self, records: np.ndarray) -> dict[str, np.ndarray]:
        values, offset = {}, 0
        for array, (shape, dtype) in self.shapes.items():
            n_bytes = int(np.prod(shape)) * dtype.itemsize
            values[array] = records[:, offset : offset + n_bytes].view(dtype).reshape(len(records), *shape)
            offset += n_bytes
        return values


def require_equal(readers: dict, rows: np.ndarray) -> None:
    """End the program unless all readers give the same bytes."""
    found = {name: {array: values.copy() for array, values in read(rows).items()} for name, read in readers.items()}
    first = next(iter(found))
    for name, arrays in found.items():
        for array, values in arrays.items():
            if values.tobytes() != found[first][array].tobytes():
                raise click.ClickException(f"{name} reads other bytes of {array} than {first}.")


@click.command()
@click.option("--threads", type=click.IntRange(1), help="Of every reader. [default: all processors]")
@measure.options
def main(threads: int | None, tiny: bool, rounds: int, scratch: Path | None):
    """Rows/s of five int8 layers in random order, against zarr-python, tensorstore and LMDB."""
    import numba

    where, n_threads = measure.environment(), threads or numba.config.NUMBA_NUM_THREADS
    teacher, n_rows, batch = (made_up.SMALL, 64, 16) if tiny else (made_up.VIT_B16, 512, 64)
    with measure.scratch_folder(scratch, 0 if tiny else 1 << 30) as folder:
        spec = made_up.store_spec(teacher, n_rows, "last5", shard_rows=n_rows // 4)
        store = folder / "made-up.zarr"
        made_up.begin_store(store, teacher, spec)
        made_up.fill_store(store, teacher, spec)
        fewer_spec = made_up.store_spec(teacher, n_rows, "last5", "klt:3.2", shard_rows=n_rows // 4)
        fewer = folder / "fewer.zarr"
        made_up.begin_store(fewer, teacher, fewer_spec)
        made_up.fill_store(fewer, teacher, fewer_spec)
        arrays = spec.array_names
        readers = {
            "ours, first": Ours(store, arrays, batch, "first", n_threads),
            "ours, always": Ours(store, arrays, batch, "always", n_threads),
            "ours by pread, first": Ours(store, arrays, batch, "first", n_threads, "pread"),
            "LMDB": Lmdb(folder / "rows.lmdb", StoreReader(store), arrays, batch, n_threads),
            "tensorstore": TensorStore(store, arrays, n_threads),
            "zarr-python": ZarrPython(store, arrays),
        }
        order = np.random.default_rng(0).permutation(n_rows)
        require_equal(readers, order[:batch])

        def epoch(read, n_batches: int, n_times: int = 1) -> int:
            """Read the first `n_batches` of the order, `n_times`; returns rows."""
            for _ in range(n_times):
                for start in range(0, n_batches * batch, batch):
                    read(order[start : start + batch])
            return n_times * n_batches * batch

        readers["ours, klt:3.2, first"] = Ours(fewer, fewer_spec.array_names, batch, "first", n_threads)
        whole = n_rows // batch
        runs = {name: lambda read=read: epoch(read, whole, 1 if tiny else 4) for name, read in readers.items()}
        runs["tensorstore"] = lambda: epoch(readers["tensorstore"], whole)
        runs["zarr-python"] = lambda: epoch(readers["zarr-python"], 2)
        found = measure.take_turns(runs, rounds)
    row_bytes = sum(spec.row_bytes(array, teacher) for array in arrays)
    goals = {"zarr-python": 40, "tensorstore": 6, "LMDB": 1.3}
    claims = [measure.claim(f"ours / {name}, crc first", found.over("ours, first", name), goal) for name, goal in goals.items()]
    claims += [measure.claim(f"ours / {name}, crc always", found.over("ours, always", name), None) for name in goals]
    of_fewer = found.over("ours, klt:3.2, first", "LMDB")
    claims.append(measure.claim("ours, klt:3.2 / LMDB, int8, crc first", of_fewer, 1.8))
    fewer_bytes = sum(fewer_spec.row_bytes(array, teacher) for array in fewer_spec.array_names)
    conditions = [
        f"{n_rows} rows of {row_bytes:,} bytes ({', '.join(arrays)}), random order, batches of {batch}, {n_threads} threads; "
        f"of klt:3.2 {fewer_bytes:,} bytes",
        "warm page cache; bytes compared for equality before. zarr-python and tensorstore compare a CRC-32C at every read, LMDB "
        "none; ours at the first read of a row (crc first: before the timed rounds) or at each (always)",
    ]
    measure.report("random-rows", claims, found.figures(), conditions, where)


if __name__ == "__main__":
    main()
