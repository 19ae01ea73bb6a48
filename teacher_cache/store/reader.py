"""Reading a store: any rows of any array, in any order, checked, and never a fill value.

Two readers give equal bytes. `mmap` maps shard files and copies rows with compiled code; `pread` reads them with compiled code
and holds no maps, so that a file cut short under it is an error where a map would end the process (docs/design/0004).
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from ..errors import CacheCorruptError, CropNotCachedError, NotInCacheError, TeacherCacheError, UsageError
from ..files.durable import crc32c
from ..format.quantize import dequantise
from ..format.race import require_patches
from ..format.shards import index_bytes
from ..format.spec import ARRAY_NAME, NOT_BY_TOKEN
from ..format.transform import decode
from ..kernels.codes import check_rows
from ..kernels.decompress import decompress
from .choices import CHECKS, READERS
from .store import Store
from .window import ShardWindow


class StoreReader:
    """Read access to one teacher's targets of one view. Opening it reads its records; shards are opened as they are needed.

    store: opened, or its folder. reader: one of READERS. check: one of CHECKS. window: shard files that stay open at most, one an
    array; None chooses. Any thread may read. Raises NotInCacheError if there is no such store, CacheCorruptError if its records
    do not check out.
    """

    def __init__(self, store: Store | Path, reader: str = "mmap", check: str = "first", window: int | None = None):
        if reader not in READERS or check not in CHECKS:
            raise UsageError(f"reader is {', '.join(READERS)}, check is {', '.join(CHECKS)}; given {reader!r}, {check!r}.")
        self.store = store if isinstance(store, Store) else Store.open(Path(store))
        self.path, self.reader, self.check = self.store.path, reader, check
        self.manifest, self.teacher, self.spec = self.store.manifest, self.store.teacher, self.store.spec
        self.columns = {array: column for column, array in enumerate(self.spec.array_names)}
        """Place of each array in `self.shards`."""
        self.files, self.finished = self.store.commits
        self.shards = ShardWindow(self.store, reader != "mmap", window)

    def __len__(self) -> int:
        return self.spec.n_rows

    @property
    def is_complete(self) -> bool:
        return self.store.is_complete

    @cached_property
    def statistics(self):
        """ChannelStatistics per layer; empty for float16."""
        return self.store.statistics()

    @cached_property
    def transform(self):
        """The Transform of a klt store; None of another."""
        return self.store.transform()

    @cached_property
    def head(self) -> dict[str, np.ndarray]:
        """`gamma`, `beta` [D] and `projection` [D, E], each where the teacher has one; float32."""
        return self.store.head()

    def row_shape(self, array: str, n_tokens: int | None = None) -> tuple[int, ...]:
        """StoreSpec.row_shape; an array this store lacks raises NotInCacheError that names those it has."""
        if array not in self.columns:
            raise NotInCacheError(f"{self.path} has no {array}; it has {', '.join(self.columns)}.")
        return self.spec.row_shape(array, self.teacher, n_tokens)

    @contextlib.contextmanager
    def opened(self, arrays: list[str], rows: np.ndarray) -> Iterator[None]:
        """Inside, the shards that hold `rows` of `arrays` are open: compiled code may read them through `self.shards`.

        Raises as `read` does for rows that are not there, and CacheCorruptError for a shard that is not the committed one.
        """
        self._require(rows)
        with self.shards.holding([self.columns[array] for array in arrays], rows // self.spec.shard_rows):
            yield

    def announce(self, arrays: list[str], rows: np.ndarray) -> None:
        """Let the kernel begin to read `rows` of `arrays` from the disk, for a `read` that comes soon; does not wait for it.

        Never raises for what is missing or damaged: that is for the `read` to say.
        """
        from ..kernels import loops

        shards = self.shards
        with contextlib.suppress(TeacherCacheError, OSError), self.opened(arrays, rows):
            for column in (self.columns[array] for array in arrays):
                ranges = loops.row_ranges(rows, shards.handles[column], shards.sizes[column], shards.by_pread,
                                             self.spec.shard_rows)  # fmt: skip
                loops.advise(ranges, shards.by_pread)

    def close(self) -> None:
        """Close what is open. Reading opens it again; which rows have been checked is remembered."""
        self.shards.close()

    def read(self, array: str, rows: ArrayLike, out: np.ndarray | None = None, places: np.ndarray | None = None) -> np.ndarray:
        """Copy `rows` of `array` into `out` ([len(rows), *row_shape] of the stored dtype, C-contiguous), in that order.

        places: integer [len(rows), K], to read only the tokens that stand there of each row, in that order: K for T in the shape
        (row_shape). Raises CropNotCachedError for a row that was never extracted, CacheCorruptError for damaged bytes.
        """
        rows = np.ascontiguousarray(rows, "int64")
        if places is not None:
            if array in NOT_BY_TOKEN:
                raise UsageError(f"{array} has no tokens to choose from; it is read whole.")
            places = self.require_places(places, len(rows))
        n_tokens = None if places is None else places.shape[1]
        shape, dtype = (len(rows), *self.row_shape(array, n_tokens)), np.dtype(self.spec.row_dtype(array))
        if out is None:
            out = np.empty(shape, dtype)
        if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
            raise UsageError(f"{array}: out must be C-contiguous {dtype} {shape}, not {out.dtype} {out.shape}.")
        if self.is_plain(array):
            with self.opened([array], rows):
                self._copy(array, rows, out, places)
        elif places is not None:
            by_token = places.reshape(len(rows), *[1] * (len(shape) - 3), n_tokens, 1)
            np.copyto(out, np.take_along_axis(self.read(array, rows), by_token, axis=-2))
        else:
            with self.opened([array], rows):
                self._decode(array, rows, out)
        if array == "index":
            require_patches(out, self.teacher.n_patches, rows, self.path / array)
        return out

    def is_plain(self, array: str) -> bool:
        """Whether compiled code can copy its rows as they lie on disk."""
        return dict(self.spec.codecs)[array] == "none"

    def require_places(self, places: np.ndarray, n_rows: int) -> np.ndarray:
        """`places` as int32 [n_rows, K], C-contiguous; UsageError unless they are that and each a token of a row."""
        places = np.ascontiguousarray(places)
        if places.ndim != 2 or len(places) != n_rows or places.dtype.kind not in "iu":
            raise UsageError(f"places must be integers [{n_rows}, K], not {places.dtype} {list(places.shape)}.")
        n_tokens = self.spec.n_tokens(self.teacher)
        if places.size and (places.min() < 0 or places.max() >= n_tokens):
            raise UsageError(f"places {places.min()} to {places.max()} asked for; tokens stand at 0 to {n_tokens - 1}.")
        return places.astype("int32", copy=False)

    def tokens(self, rows: ArrayLike, layer: int = -1) -> np.ndarray:
        """Whitened tokens of one block as float32 [len(rows), T, D], dequantised. For looking, not for training.

        layer: number of the block, from 1; or from the end, -1 is the teacher's last. T = C+N, or of a store of visible tokens
        C+K, in the order of `index`. Raises NotInCacheError for a block that is not kept; else as `read`.
        """
        layer += self.teacher.depth + 1 if layer < 0 else 0
        if self.spec.is_transformed and layer in self.spec.layers:
            layers = self.spec.read_with(layer)
            codes = [self.read(ARRAY_NAME.format(needed), rows) for needed in layers]
            return decode(codes, layers, self.transform)
        stored = self.read(ARRAY_NAME.format(layer), rows)
        if not self.spec.has_scales:
            return stored.astype("float32")
        scale = self.read("scale", rows)[:, self.spec.layers.index(layer)]
        return dequantise(stored, scale, self.statistics[layer], self.spec.dtype, self.spec.group)

    def attention(self, rows: ArrayLike) -> np.ndarray:
        """What CLS attends to among the patches in the last block, mean over heads: float32 [len(rows), N], 0..1. As `read`."""
        return self.read("attention", rows)

    def _require(self, rows: np.ndarray) -> None:
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise NotInCacheError(f"{self.path}: rows {rows.min()} to {rows.max()} asked for, it has 0 to {len(self) - 1}.")
        missing = rows[~self.finished[rows // self.spec.shard_rows]]
        if len(missing):
            raise CropNotCachedError(
                f"{self.path}: row {missing[0]} was never extracted ({len(missing)} of {len(rows)} asked for). "
                "Run teacher-cache extract to finish the store."
            )

    def _copy(self, array: str, rows: np.ndarray, out: np.ndarray, places: np.ndarray | None) -> None:
        from ..kernels.loops import copy_rows, copy_tokens

        column, errors = self.columns[array], np.zeros(len(rows), "int64")
        shards, stride = self.shards, out.strides[0] if len(out) else 0
        target = np.uint64(out.ctypes.data), stride
        source = shards.handles[column], shards.sizes[column], shards.by_pread, self.spec.shard_rows
        check = shards.checked[column], CHECKS[self.check], errors
        if places is None:
            copy_rows(rows, *target, *source, np.uint64(self.spec.row_bytes(array, self.teacher)), *check)
        else:
            layout = map(np.uint64, self.spec.token_layout(array, self.teacher))
            copy_tokens(rows, places, *layout, *target, *source, *check)
        check_rows(errors, rows, self.path / array)

    def _decode(self, array: str, rows: np.ndarray, out: np.ndarray) -> None:
        """Decompress rows, which works without the GIL, on as many threads as there are processors."""
        codec = dict(self.spec.codecs)[array]

        def one(i: int) -> None:
            chunk = self._chunk(array, int(rows[i]))
            try:
                decompress(codec, chunk, out[i].reshape(-1).view("u1"))
            except CacheCorruptError as error:
                raise self._damaged(array, rows[i], error) from error

        tasks = [self._pool.submit(one, i) for i in range(len(rows))]
        try:
            for task in tasks:
                task.result()
        finally:  # none may read on when the shards are no longer held
            for task in tasks:
                task.cancel()
            wait(tasks)

    def _chunk(self, array: str, row: int) -> bytes:
        """The stored bytes of one row, whose shard is held open, without their CRC-32C, which is compared as `check` says."""
        column, (shard, slot) = self.columns[array], divmod(row, self.spec.shard_rows)
        n_bytes, checked = int(self.shards.sizes[column, shard]), self.shards.checked[column]
        entry = n_bytes - index_bytes(self.spec.shard_rows) + 16 * slot
        offset, length = struct.unpack("<QQ", self.shards.read(column, shard, entry, 16))
        if length < 4 or offset + length > n_bytes:
            raise self._damaged(array, row, "the shard's index is wrong")
        data = self.shards.read(column, shard, offset, length)
        if self.check == "always" or self.check == "first" and not checked[row]:
            if crc32c(data[:-4]) != int.from_bytes(data[-4:], "little"):
                raise self._damaged(array, row, "its CRC-32C does not fit")
            checked[row] = 1
        return data[:-4]

    def _damaged(self, array: str, row: int, why: object) -> CacheCorruptError:
        message = f"{self.path / array}: row {row} is damaged ({why}). Run teacher-cache verify on this cache."
        return CacheCorruptError(message)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decompress")
