"""Filling a store, shard by shard. Rows are appended to files aside as they come; memory is bounded by the batch.

What stands in a shard file, shards.py says. It is fsynced and renamed when whole; the commit record comes last.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np

from ..errors import UsageError
from ..files.durable import ASIDE, crc32c, create_aside, publish
from ..format.layout import is_shard_file, shard_file
from ..format.shards import EMPTY_SLOT, header
from ..format.spec import StoreSpec, TeacherSpec
from .commits import FILE_DTYPE
from .sizes import shard_bytes, store_bytes
from .store import Store, is_begun


def encoder(codec: str) -> Callable[[bytes], bytes]:
    """bytes -> compressed bytes, by numcodecs, readable by zarr's codec of manifest.COMPRESSION."""
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
        self.path = path
        self.index = np.full((n_slots, 2), EMPTY_SLOT, "<u8")
        self.codec, self.encode = codec, encoder(codec)
        self.n_rows = self.n_bytes = self.crc = 0
        self.file = create_aside(path, buffering=1 << 20)
        self.aside = Path(self.file.name)

    def chunks(self, rows: np.ndarray) -> np.ndarray:
        """The bytes, uint8 [n], of the next rows as they stand in the file; the index has them already, write them next."""
        if self.codec == "none":
            payload = np.ascontiguousarray(rows).reshape(len(rows), -1).view("u1")
            chunks = np.empty((len(rows), payload.shape[1] + 4), "u1")
            chunks[:, :-4] = payload
            chunks[:, -4:] = np.array([crc32c(row) for row in payload], "<u4")[:, None].view("u1")
            lengths, data = np.full(len(rows), chunks.shape[1]), chunks.reshape(-1)
        else:
            encoded = [self.encode(row.tobytes()) for row in rows]
            pieces = [payload + crc32c(payload).to_bytes(4, "little") for payload in encoded]
            lengths, data = np.array([len(piece) for piece in pieces]), np.frombuffer(b"".join(pieces), "u1")
        starts = self.n_bytes + np.cumsum(lengths) - lengths
        self.index[self.n_rows : self.n_rows + len(rows)] = np.stack([starts, lengths], 1)
        self.n_rows += len(rows)
        self.note(data)
        return data

    def note(self, data) -> None:
        """Count bytes that are about to be written."""
        self.n_bytes += len(data)
        self.crc = zlib.crc32(data, self.crc)

    def write(self, data: bytes) -> None:
        self.note(data)
        self.file.write(data)

    def finish(self) -> tuple[int, int]:
        """Write the index and make the file durable, still aside; returns its bytes and CRC-32 (commits.FILE_DTYPE)."""
        index = self.index.tobytes()
        self.write(index + crc32c(index).to_bytes(4, "little"))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return self.n_bytes, self.crc

    def publish(self) -> None:
        publish(self.aside, self.path)

    def abandon(self) -> None:
        """Remove what is still aside."""
        with contextlib.suppress(OSError):  # a full disk refuses the last flush too; the file goes away anyhow
            self.file.close()
        self.aside.unlink(missing_ok=True)


class ShardWriter:
    """Writes one shard of all arrays; use as a context manager.

    pool: threads that work out checksums and compress, an array each; the files themselves are written by the caller's thread.
    Leaving it by an exception, or a disk that is full when it is left, commits nothing and leaves no file aside.
    """

    def __init__(self, store: Store, shard: int, pool: Executor | None = None):
        spec = store.spec
        self.store, self.shard = store, shard
        self._map = map if pool is None else pool.map
        self.n_rows = len(spec.rows_of(shard))
        self.shapes = {array: (spec.row_shape(array, store.teacher), spec.row_dtype(array)) for array in spec.array_names}
        self.files: dict[str, _ShardFile] = {}
        self.fp32_rows: list[int] = []
        try:
            for column, (array, codec) in enumerate(spec.codecs):
                path = shard_file(store.path, array, shard, 1 + len(self.shapes[array][0]))
                self.files[array] = _ShardFile(path, spec.shard_rows, codec)
                self.files[array].write(header(store.sha256, column, shard))
        except BaseException:
            self._abandon()
            raise

    def append(self, rows: dict[str, np.ndarray], fp32_rows: Sequence[int] = ()) -> None:
        """Append the next rows. rows: array name -> [n, *row shape] in the store's dtype.

        fp32_rows: numbers of those that were made in fp32 because bf16 gave none, ascending.
        """
        for array, (shape, dtype) in self.shapes.items():
            if rows[array].shape[1:] != shape or rows[array].dtype != dtype:
                raise UsageError(f"{array}: rows must be {dtype} {shape}, not {rows[array].dtype} {rows[array].shape[1:]}.")
            if self.files[array].n_rows + len(rows[array]) > self.n_rows:
                raise UsageError(f"shard {self.shard} of {array} has {self.n_rows} rows; more are appended.")
        chunks = self._map(lambda array: self.files[array].chunks(rows[array]), self.files)
        for file, data in zip(self.files.values(), chunks, strict=True):
            file.file.write(data)
        self.fp32_rows += [int(row) for row in fp32_rows]

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._abandon()

    def _abandon(self) -> None:
        for file in self.files.values():
            file.abandon()

    def _commit(self) -> None:
        for array, file in self.files.items():
            if file.n_rows != self.n_rows:
                raise UsageError(f"shard {self.shard} of {array} has {file.n_rows} of {self.n_rows} rows.")
        sizes = np.array([file.finish() for file in self.files.values()], FILE_DTYPE)
        for file in self.files.values():
            file.publish()
        self.store.write_commit(self.shard, sizes, self.fp32_rows)


def missing_bytes(path: Path, spec: StoreSpec, teacher: TeacherSpec, shards: range | None = None) -> int:
    """Bytes that finishing the store in `path`, or the shards of a range, takes at most. spec: of one that is not begun yet."""
    if not is_begun(path):
        if shards is None:
            return store_bytes(spec, teacher)
        return sum(shard_bytes(spec, teacher, shard) for shard in shards if shard < spec.n_shards)
    store = Store.open(path)
    return sum(shard_bytes(store.spec, teacher, shard) for shard in store.missing_shards() if shards is None or shard in shards)


def bytes_under_way(path: Path) -> int:
    """Bytes of shard files that others are writing just now: on the disk already, though no shard is finished by them."""
    n_bytes = 0
    for folder, _, names in os.walk(path):  # of a folder that goes away meanwhile it says nothing, where glob raises
        for name in names:
            if is_shard_file(name) and name.endswith(ASIDE):
                with contextlib.suppress(FileNotFoundError):  # it has got its name meanwhile
                    n_bytes += Path(folder, name).stat().st_size
    return n_bytes
