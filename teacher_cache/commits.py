"""Which shards of a store are finished, and the size and checksum of each of their files.

The checksum of a shard file is CRC-32 (zlib's), not CRC-32C: every chunk in it ends with its own CRC-32C, and a CRC taken on
over data and their CRC of the same kind does not depend on the data. It would be the same for any two shards of equal sizes.

While work goes on there is one small sealed record a finished shard, `commits/000123.json`, written last by rename. When all
are there they are folded into `shards.npy`, and `complete.json` names its SHA-256. There is no other list of shards.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from .durable import npy_bytes, read_npy, read_sealed, seal, sha256_file, write_whole
from .errors import CacheCorruptError
from .spec import StoreSpec

FILE_DTYPE = np.dtype([("bytes", "<u8"), ("crc32", "<u4")])
"""One shard file: its length and the CRC-32 of all its bytes."""


def shard_file(store: Path, array: str, shard: int, n_dims: int) -> Path:
    """Path of a shard in a zarr v3 array with `.` between the chunk indices: tokens/08/c.123.0.0"""
    return store / array / ".".join(["c", str(shard), *["0"] * (n_dims - 1)])


def write_commit(store: Path, shard: int, files: np.ndarray) -> None:
    """Declare a shard finished. files: FILE_DTYPE [n_arrays], in the order of StoreSpec.array_names."""
    record = {"shard": shard, "files": [[int(file["bytes"]), int(file["crc32"])] for file in files]}
    write_whole(store / "commits" / f"{shard:06d}.json", seal(record))


def is_complete(store: Path) -> bool:
    return (store / "complete.json").exists()


def count_commits(store: Path, spec: StoreSpec) -> int:
    """Number of finished shards, from names alone (fast at any size)."""
    if is_complete(store):
        return spec.n_shards
    return sum(1 for path in (store / "commits").glob("*.json"))


def read_commits(store: Path, spec: StoreSpec) -> tuple[np.ndarray, np.ndarray]:
    """FILE_DTYPE [n_shards, n_arrays] and bool [n_shards]: the files, and which shards are finished.

    Raises CacheCorruptError for a damaged or foreign record.
    """
    shape = (spec.n_shards, len(spec.array_names))
    if is_complete(store):
        complete = read_sealed(store / "complete.json")
        table = store / "shards.npy"
        if not table.is_file() or sha256_file(table) != complete.get("shards_sha256"):
            raise CacheCorruptError(f"{table}: not the table that complete.json names.")
        files = read_npy(table, FILE_DTYPE)
        if files.shape != shape:
            raise CacheCorruptError(f"{table}: has shape {files.shape}, the store needs {shape}.")
        return files, np.ones(spec.n_shards, bool)

    files, finished = np.zeros(shape, FILE_DTYPE), np.zeros(spec.n_shards, bool)
    for path in sorted((store / "commits").glob("*.json")):
        record = read_sealed(path)
        shard = record.get("shard")
        named = isinstance(shard, int) and 0 <= shard < spec.n_shards and path.name == f"{shard:06d}.json"
        if not named or len(record.get("files", ())) != shape[1]:
            raise CacheCorruptError(f"{path}: not a commit record of this store.")
        files[shard] = [tuple(file) for file in record["files"]]
        finished[shard] = True
    return files, finished


def fold(store: Path, spec: StoreSpec) -> None:
    """Turn the records of a store whose shards are all finished into one table, and declare it complete.

    On a complete store it only removes what a crash between these steps left behind.
    """
    if not is_complete(store):
        files, finished = read_commits(store, spec)
        if not finished.all():
            raise CacheCorruptError(f"{store}: {(~finished).sum()} of {spec.n_shards} shards are not finished.")
        write_whole(store / "shards.npy", npy_bytes(files))
        complete = {"n_rows": spec.n_rows, "n_shards": spec.n_shards, "shards_sha256": sha256_file(store / "shards.npy")}
        write_whole(store / "complete.json", seal(complete))
    shutil.rmtree(store / "commits", ignore_errors=True)
