"""Reading a store: any rows of any array, in any order, checked, and never a fill value.

Two routes give equal bytes. `zarr` goes through zarr-python and always works. `direct` maps the shard files, follows each
shard's own index and copies (or decompresses) rows in parallel without the GIL; it is 40 times as fast (docs/design/0004).

A map of a file that somebody truncates kills the process (SIGBUS): shards are only ever published by rename, and sizes are
checked when they are mapped.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np

from .commits import is_complete, read_commits, shard_file
from .durable import crc32c
from .errors import CacheCorruptError, CropNotCachedError, NotInCacheError, UsageError
from .quantize import dequantise
from .spec import ARRAY_NAME
from .store import check_array_json, read_head, read_manifest, read_statistics

CHECKS = {"never": 0, "first": 1, "always": 2}
"""When the CRC-32C of a row is compared: never, the first time this process reads the row, at every read."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_PROT_READ, _MAP_SHARED = 1, 1


def check_size(path: Path, n_bytes: int) -> None:
    """Raise CacheCorruptError unless `path` is a file of the committed size."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CacheCorruptError(f"{path}: a committed shard cannot be opened ({error.strerror}).") from error
    if size != n_bytes:
        raise CacheCorruptError(f"{path}: has {size} bytes, {n_bytes} were committed. Run teacher-cache verify on this cache.")


def _map_file(path: Path, n_bytes: int) -> int:
    """Map a file for reading; returns its address. Python's own mmap keeps a file descriptor open for each map, and
    thousands of shards would exhaust them."""
    check_size(path, n_bytes)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        address = _libc.mmap(None, n_bytes, _PROT_READ, _MAP_SHARED, descriptor, 0)
    finally:
        os.close(descriptor)
    if address in (None, ctypes.c_void_p(-1).value):
        code = ctypes.get_errno()
        raise OSError(code, f"cannot map it ({os.strerror(code)}); try the zarr route", str(path))
    return address


class _MappedArray:
    """The shards of one array, mapped: what the compiled copy needs to know of them."""

    def __init__(self, reader: StoreReader, array: str):
        spec, n_dims = reader.spec, 1 + len(reader.row_shape(array))
        column = spec.array_names.index(array)
        self.path = reader.path / array
        self.row_bytes = spec.row_bytes(array, reader.teacher)
        self.sizes = reader.files["bytes"][:, column].astype("uint64")
        least = 16 * spec.shard_rows + 4
        self.addresses = np.zeros(spec.n_shards, "uint64")
        """0 where the shard is not finished."""
        self.checked = np.zeros(spec.n_rows, "uint8")
        for shard in np.flatnonzero(reader.finished):
            path = shard_file(reader.path, array, int(shard), n_dims)
            if self.sizes[shard] < least:
                raise CacheCorruptError(f"{path}: {self.sizes[shard]} bytes are too few for its index.")
            self.addresses[shard] = _map_file(path, int(self.sizes[shard]))
            index = ctypes.string_at(int(self.addresses[shard] + self.sizes[shard]) - least, least)
            if crc32c(index[:-4]) != int.from_bytes(index[-4:], "little"):
                raise CacheCorruptError(f"{path}: its index is damaged. Run teacher-cache verify on this cache.")

    def __del__(self):
        for address, n_bytes in zip(self.addresses, self.sizes, strict=True):
            if address:
                _libc.munmap(int(address), int(n_bytes))


class StoreReader:
    """Read access to one teacher's targets of one view.

    route: `direct` or `zarr`. check: `first`, `always` or `never` (direct route; zarr always checks).
    Raises NotInCacheError if there is no such store, CacheCorruptError if its records do not check out.
    """

    def __init__(self, store: Path, route: str = "direct", check: str = "first"):
        if route not in ("direct", "zarr") or check not in CHECKS:
            raise UsageError(f"route is direct or zarr, check is {', '.join(CHECKS)}; given {route!r}, {check!r}.")
        self.path, self.route, self.check = Path(store), route, check
        self.manifest = read_manifest(self.path)
        self.teacher, self.spec = self.manifest.teacher, self.manifest.store
        self.files, self.finished = read_commits(self.path, self.spec)
        self._mapped: dict[str, _MappedArray] = {}
        self._zarr_arrays: dict = {}

    def __len__(self) -> int:
        return self.spec.n_rows

    @property
    def is_complete(self) -> bool:
        return is_complete(self.path)

    @cached_property
    def statistics(self):
        """ChannelStatistics per layer (int8), else empty."""
        return read_statistics(self.path, self.spec)

    @cached_property
    def head(self) -> dict[str, np.ndarray]:
        """`gamma`, `beta` [D] and, where the teacher has one, `projection` [D, E]; float32."""
        return read_head(self.path, self.teacher)

    def row_shape(self, array: str) -> tuple[int, ...]:
        """Shape of one row; an array this store lacks raises NotInCacheError that names those it has."""
        if array not in self.spec.array_names:
            raise NotInCacheError(f"{self.path} has no {array}; it has {', '.join(self.spec.array_names)}.")
        return self.spec.row_shape(array, self.teacher)

    def mapped(self, array: str) -> _MappedArray:
        """The mapped shards of `array`, made on first use."""
        self.row_shape(array)
        if array not in self._mapped:
            self._mapped[array] = _MappedArray(self, array)
        return self._mapped[array]

    def read(self, array: str, rows, out: np.ndarray | None = None) -> np.ndarray:
        """Copy `rows` of `array` into `out` ([len(rows), *row_shape] of the stored dtype, C-contiguous), in that order.

        Raises CropNotCachedError for a row that was never extracted, CacheCorruptError for damaged bytes.
        """
        rows = np.ascontiguousarray(rows, "int64")
        shape, dtype = (len(rows), *self.row_shape(array)), np.dtype(self.spec.row_dtype(array))
        if out is None:
            out = np.empty(shape, dtype)
        if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
            raise UsageError(f"{array}: out must be C-contiguous {dtype} {shape}, not {out.dtype} {out.shape}.")
        self._require(rows)
        if self.route == "zarr":
            self._read_zarr(array, rows, out)
        elif dict(self.spec.codecs)[array] == "none":
            self._read_mapped(array, rows, out)
        else:
            self._read_compressed(array, rows, out)
        return out

    def tokens(self, rows, layer: int) -> np.ndarray:
        """Whitened tokens as float32 [len(rows), C+N, D], dequantised. For looking, not for training."""
        stored = self.read(ARRAY_NAME.format(layer), rows)
        if self.spec.dtype == "float16":
            return stored.astype("float32")
        scale = self.read("scale", rows)[:, self.spec.layers.index(layer)]
        return dequantise(stored, scale, self.statistics[layer], self.spec.group)

    def _require(self, rows: np.ndarray) -> None:
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise NotInCacheError(f"{self.path}: rows {rows.min()} to {rows.max()} asked for, it has 0 to {len(self) - 1}.")
        missing = rows[~self.finished[rows // self.spec.shard_rows]]
        if len(missing):
            raise CropNotCachedError(
                f"{self.path}: row {missing[0]} was never extracted ({len(missing)} of {len(rows)} asked for). "
                "Run teacher-cache extract to finish the store."
            )

    def _read_mapped(self, array: str, rows: np.ndarray, out: np.ndarray) -> None:
        from .compiled import check_rows, copy_rows

        mapped, errors = self.mapped(array), np.zeros(len(rows), "int64")
        stride = out.strides[0] if len(out) else 0
        copy_rows(rows, np.uint64(out.ctypes.data), stride, mapped.addresses, mapped.sizes, self.spec.shard_rows,
                  np.uint64(mapped.row_bytes), mapped.checked, CHECKS[self.check], errors)  # fmt: skip
        check_rows(errors, rows, mapped.path)

    def _read_compressed(self, array: str, rows: np.ndarray, out: np.ndarray) -> None:
        """Decompress rows with numcodecs, which works without the GIL, on as many threads as there are processors."""
        mapped = self.mapped(array)
        decode = self._decoder(array)

        def one(i: int) -> None:
            data = decode(self._chunk(mapped, int(rows[i])))
            if len(data) != mapped.row_bytes:
                raise CacheCorruptError(
                    f"{mapped.path}: row {rows[i]} decompresses to {len(data)} bytes, not {mapped.row_bytes}."
                )
            out[i] = np.frombuffer(data, out.dtype).reshape(out.shape[1:])

        for _ in self._pool.map(one, range(len(rows))):
            pass

    def _chunk(self, mapped: _MappedArray, row: int) -> bytes:
        """The stored bytes of one row without their CRC-32C, which is compared as `check` says."""
        shard, slot = divmod(row, self.spec.shard_rows)
        address, n_bytes = int(mapped.addresses[shard]), int(mapped.sizes[shard])
        index = address + n_bytes - 4 - 16 * (self.spec.shard_rows - slot)
        offset, length = np.frombuffer(ctypes.string_at(index, 16), "<u8").tolist()
        if length < 4 or offset + length > n_bytes:
            raise CacheCorruptError(f"{mapped.path}: row {row} is damaged (the shard's index is wrong).")
        data = ctypes.string_at(address + offset, length)
        if self.check == "always" or self.check == "first" and not mapped.checked[row]:
            if crc32c(data[:-4]) != int.from_bytes(data[-4:], "little"):
                raise CacheCorruptError(f"{mapped.path}: row {row} is damaged (its CRC-32C does not fit).")
            mapped.checked[row] = 1
        return data[:-4]

    def _decoder(self, array: str):
        import numcodecs

        codec = numcodecs.Zstd() if dict(self.spec.codecs)[array] == "zstd" else numcodecs.Blosc()

        def decode(data: bytes) -> bytes:
            try:
                return bytes(codec.decode(data))
            except (RuntimeError, ValueError) as error:
                raise CacheCorruptError(f"{self.path / array}: a row cannot be decompressed ({error}).") from error

        return decode

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decompress")

    def _read_zarr(self, array: str, rows: np.ndarray, out: np.ndarray) -> None:
        source = self._zarr_array(array)
        for i, row in enumerate(rows.tolist()):
            try:
                out[i] = source[row]
            except (ValueError, RuntimeError, OSError) as error:
                raise CacheCorruptError(f"{self.path / array}: row {row} is damaged ({error}).") from error

    def _zarr_array(self, array: str):
        """The array as zarr sees it, once the shards are known to be there: zarr answers for missing ones in silence."""
        import zarr

        if array not in self._zarr_arrays:
            check_array_json(self.path, array)
            column, n_dims = self.spec.array_names.index(array), 1 + len(self.row_shape(array))
            for shard in np.flatnonzero(self.finished):
                check_size(shard_file(self.path, array, int(shard), n_dims), int(self.files["bytes"][shard, column]))
            self._zarr_arrays[array] = zarr.open_array(self.path / array, mode="r")
        return self._zarr_arrays[array]
