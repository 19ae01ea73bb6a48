"""The shards of a store that are open: opened and checked when a batch first needs them, closed when others take their place.

A store has thousands of shard files, and a process may hold 65,530 maps (vm.max_map_count) and often no more than 1,024 files
(ulimit -n). So a window of them is open, and those used longest ago are closed first. A batch that needs more shards than the
window holds has them all open while it is read.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import heapq
import os
import resource
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..errors import CacheCorruptError, NotAllowedError
from ..files.durable import crc32c, inside, not_allowed
from ..format.layout import shard_file
from ..format.shards import CLOSED, HEADER_BYTES, header, index_bytes, open_shard, require_header
from ..kernels import sigbus
from .store import Store

MAPS = 8192
"""Maps a reader keeps open: an eighth of what the kernel grants a process, for there are other readers and other libraries."""
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_PROT_READ, _MAP_SHARED = 1, 1


def files_in_window() -> int:
    """Files a reader keeps open: a quarter of what this process may open, for the same reason."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAPS if allowed == resource.RLIM_INFINITY else max(1, min(MAPS, allowed // 4))


def open_committed(path: Path, n_bytes: int, expected_header: bytes, shard_rows: int) -> int:
    """Open a committed shard for reading and see that it is the file that belongs there; returns the file descriptor.

    Compared are its length with the commit's, its header with `expected_header`, and the CRC-32C of its index; never the rows.
    Raises CacheCorruptError, or OSError where the process may open no more files.
    """
    try:
        descriptor = open_shard(path)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            message = f"{error.strerror}; allow more (ulimit -n), take smaller batches, or read with --reader mmap"
            raise OSError(error.errno, message, str(path)) from error
        if isinstance(error, PermissionError):
            raise NotAllowedError(not_allowed(path)) from error
        why = "it is a symlink" if error.errno == errno.ELOOP else error.strerror
        raise CacheCorruptError(f"{path}: a committed shard cannot be opened ({why}).") from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise CacheCorruptError(f"{path}: a committed shard cannot be opened (it is no file).")
        if found.st_size != n_bytes:
            raise CacheCorruptError(
                f"{path}: has {found.st_size:,} bytes, {n_bytes:,} were committed. Run teacher-cache verify on this cache."
            )
        least = index_bytes(shard_rows)
        if n_bytes < HEADER_BYTES + least:
            raise CacheCorruptError(f"{path}: {n_bytes} bytes are too few for its header and index.")
        require_header(path, read_at(descriptor, path, 0, HEADER_BYTES), expected_header)
        index = read_at(descriptor, path, n_bytes - least, least)
        if crc32c(index[:-4]) != int.from_bytes(index[-4:], "little"):
            raise CacheCorruptError(f"{path}: its index is damaged. Run teacher-cache verify on this cache.")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_at(descriptor: int, path: Path, offset: int, n_bytes: int) -> bytes:
    """`n_bytes` of an open file, or CacheCorruptError if it ends before or cannot be read."""
    try:
        data = os.pread(descriptor, n_bytes, offset)
    except OSError as error:
        raise CacheCorruptError(f"{path}: cannot be read ({error.strerror}).") from error
    if len(data) != n_bytes:
        raise CacheCorruptError(f"{path}: was cut short while it was read. Run teacher-cache verify on this cache.")
    return data


class ShardWindow:
    """The open shards of all row arrays of a store, as maps or as file descriptors.

    Those that are finished are those of `store.commits`. by_pread: descriptors, which report a file that was cut short
    as an error, where reading a map ends the process. limit: shards, files each, that stay open; None chooses.
    """

    def __init__(self, store: Store, by_pread: bool, limit: int | None = None):
        self._lock = threading.Lock()
        self._open: set[tuple[int, int]] = set()  # (column, shard)
        self.store, self.spec, self.by_pread = store, store.spec, by_pread
        self.limit = limit or (files_in_window() if by_pread else MAPS)
        self.sizes = np.ascontiguousarray(store.commits.files["bytes"].T, "uint64")
        """Bytes of each file, [n_arrays, n_shards]."""
        self.handles = np.full(self.sizes.shape, CLOSED, "uint64")
        """Address or file descriptor of each open shard, [n_arrays, n_shards]."""
        self.checked = np.zeros((len(self.sizes), self.spec.n_rows), "uint8")
        """1 for each row whose CRC-32C was found right, [n_arrays, n_rows]."""
        self._identities: dict[tuple[int, int], tuple[int, int]] = {}
        self._last_used = np.zeros(self.sizes.shape, "int64")
        self._n_batches = 0
        for array in self.spec.array_names:
            inside(store.path, array)

    def path(self, column: int, shard: int) -> Path:
        array = self.spec.array_names[column]
        return shard_file(self.store.path, array, shard, 1 + len(self.spec.row_shape(array, self.store.teacher)))

    @contextlib.contextmanager
    def holding(self, columns: list[int], shards: np.ndarray) -> Iterator[None]:
        """Inside, the given shards of the given arrays are open. Other threads wait: they might close them."""
        with self._lock:
            self._n_batches += 1
            missing = []
            for column in columns:
                self._last_used[column][shards] = self._n_batches
                closed = shards[self.handles[column][shards] == CLOSED]
                missing += [(column, shard) for shard in np.unique(closed).tolist()] if len(closed) else []
            if (n_too_many := len(self._open) + len(missing) - self.limit) > 0:
                self._close_oldest(n_too_many)
            for key in missing:
                self._open_one(key)
            yield

    def read(self, column: int, shard: int, offset: int, n_bytes: int) -> bytes:
        """Bytes of a shard that is held open; they must lie within it."""
        handle = int(self.handles[column, shard])
        if self.by_pread:
            return read_at(handle, self.path(column, shard), offset, n_bytes)
        return ctypes.string_at(handle + offset, n_bytes)

    def close(self) -> None:
        """Close every shard. What is needed again is opened again."""
        with self._lock:
            for key in list(self._open):
                self._close_one(key)

    def __del__(self, is_ending=sys.is_finalizing) -> None:
        if not is_ending():  # then names of modules, as `sys`, mean nothing any more, and the process takes its maps along
            self.close()

    def _close_oldest(self, n_shards: int) -> None:
        """Close the `n_shards` used longest ago, but none that the present batch needs."""
        for key in heapq.nsmallest(n_shards, self._open, key=self._last_used.__getitem__):
            if self._last_used[key] < self._n_batches:
                self._close_one(key)

    def _open_one(self, key: tuple[int, int]) -> None:
        expected = header(self.store.sha256, *key)
        descriptor = open_committed(self.path(*key), int(self.sizes[key]), expected, self.spec.shard_rows)
        found = os.fstat(descriptor)
        identity = found.st_ino, found.st_ctime_ns
        if self._identities.setdefault(key, identity) != identity:
            rows = self.spec.rows_of(key[1])  # another file has taken its place since: its rows are not checked yet
            self.checked[key[0], rows.start : rows.stop] = 0
            self._identities[key] = identity
        self.handles[key] = descriptor if self.by_pread else self._map(key, descriptor)
        self._open.add(key)

    def _map(self, key: tuple[int, int], descriptor: int) -> int:
        """Map a file and close it: Python's own mmap would keep it open."""
        path, n_bytes = self.path(*key), int(self.sizes[key])
        try:
            address = _libc.mmap(None, n_bytes, _PROT_READ, _MAP_SHARED, descriptor, 0)
        finally:
            os.close(descriptor)
        if address in (None, ctypes.c_void_p(-1).value):
            code = ctypes.get_errno()
            advice = "allow more maps (sysctl vm.max_map_count), take smaller batches, or read with --reader pread"
            raise OSError(code, f"cannot be mapped ({os.strerror(code)}); {advice}", str(path))
        return sigbus.watch(address, n_bytes, path, "With --reader pread it is an error instead.")

    def _close_one(self, key: tuple[int, int]) -> None:
        handle = int(self.handles[key])
        self._open.remove(key)
        self.handles[key] = CLOSED
        if self.by_pread:
            os.close(handle)
        else:
            sigbus.forget(handle)
            _libc.munmap(handle, int(self.sizes[key]))
