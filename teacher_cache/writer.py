"""Filling a store, shard by shard. Rows are appended to files aside as they come; memory is bounded by the batch.

A shard file is zarr v3's: the inner chunks of its rows back to back, then an index of (offset, length) for every slot, then the
index's CRC-32C. It is fsynced and renamed when whole; the commit record comes last.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .commits import FILE_DTYPE, read_commits, shard_file, write_commit
from .durable import ASIDE, crc32c, sync_folder
from .errors import UsageError
from .estimate import shard_bytes, store_bytes
from .spec import StoreSpec, TeacherSpec
from .store import read_manifest

EMPTY_SLOT = 0xFFFFFFFFFFFFFFFF


def encoder(codec: str) -> Callable[[bytes], bytes]:
    """bytes -> compressed bytes, by numcodecs, readable by zarr's codec of store.COMPRESSION."""
    if codec == "none":
        return bytes
    import numcodecs

    compressor = {
        "zstd": lambda: numcodecs.Zstd(level=1),
        "lz4": lambda: numcodecs.Blosc(cname="lz4", clevel=5, shuffle=numcodecs.Blosc.NOSHUFFLE),
    }[codec]()
    return compressor.encode


class _ShardFile:
    """One array's file of one shard, being written."""

    def __init__(self, path: Path, n_slots: int, codec: str):
        self.path, self.aside = path, path.with_name(path.name + ASIDE)
        self.index = np.full((n_slots, 2), EMPTY_SLOT, "<u8")
        self.encode = encoder(codec)
        self.file = open(self.aside, "wb", buffering=1 << 20)  # noqa: SIM115 - closed by finish or abandon
        self.n_rows = self.n_bytes = self.crc = 0

    def append(self, row: np.ndarray) -> None:
        payload = self.encode(row.tobytes())
        chunk = payload + crc32c(payload).to_bytes(4, "little")
        self.index[self.n_rows] = self.n_bytes, len(chunk)
        self.n_rows += 1
        self._write(chunk)

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.n_bytes += len(data)
        self.crc = zlib.crc32(data, self.crc)

    def finish(self) -> tuple[int, int]:
        """Write the index and make the file durable, still aside; returns its bytes and CRC-32 (commits.FILE_DTYPE)."""
        index = self.index.tobytes()
        self._write(index + crc32c(index).to_bytes(4, "little"))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return self.n_bytes, self.crc

    def publish(self) -> None:
        os.replace(self.aside, self.path)
        sync_folder(self.path.parent)

    def abandon(self) -> None:
        """Remove what is still aside."""
        with contextlib.suppress(OSError):  # a full disk refuses the last flush too; the file goes away anyhow
            self.file.close()
        self.aside.unlink(missing_ok=True)


class ShardWriter:
    """Writes one shard of all arrays; use as a context manager.

    Leaving it by an exception, or a disk that is full when it is left, commits nothing and leaves no file aside.
    """

    def __init__(self, store: Path, spec: StoreSpec, teacher: TeacherSpec, shard: int):
        self.store, self.spec, self.shard = store, spec, shard
        self.n_rows = len(spec.rows_of(shard))
        self.shapes = {array: (spec.row_shape(array, teacher), spec.row_dtype(array)) for array in spec.array_names}
        self.files = {
            array: _ShardFile(shard_file(store, array, shard, 1 + len(self.shapes[array][0])), spec.shard_rows, codec)
            for array, codec in spec.codecs
        }

    def append(self, rows: dict[str, np.ndarray]) -> None:
        """Append the next rows. rows: array name -> [n, *row shape] in the store's dtype."""
        for array, file in self.files.items():
            shape, dtype = self.shapes[array]
            values = rows[array]
            if values.shape[1:] != shape or values.dtype != dtype:
                raise UsageError(f"{array}: rows must be {dtype} {shape}, not {values.dtype} {values.shape[1:]}.")
            for row in values:
                file.append(row)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            for file in self.files.values():
                file.abandon()

    def _commit(self) -> None:
        for array, file in self.files.items():
            if file.n_rows != self.n_rows:
                raise UsageError(f"shard {self.shard} of {array} has {file.n_rows} of {self.n_rows} rows.")
        sizes = np.array([file.finish() for file in self.files.values()], FILE_DTYPE)
        for file in self.files.values():
            file.publish()
        write_commit(self.store, self.shard, sizes)


def missing_bytes(store: Path, spec: StoreSpec, teacher: TeacherSpec) -> int:
    """Bytes that finishing a store takes at most. spec: of the store if it was not begun yet."""
    if not (store / "store.json").exists():
        return store_bytes(spec, teacher)
    begun = read_manifest(store).store
    return sum(shard_bytes(begun, teacher, shard) for shard in missing_shards(store, begun))


def missing_shards(store: Path, spec: StoreSpec) -> list[int]:
    """Shards that still have to be made, ascending."""
    _, finished = read_commits(store, spec)
    return np.flatnonzero(~finished).tolist()
