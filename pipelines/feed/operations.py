"""The two operations of FFCV's pipeline that are ours: crops decoded, records copied; both check what they read.

They are compiled into stages by FFCV's graph and run without the GIL; docs/design/0003 has why they are not FFCV's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numba import carray

from teacher_cache.crops.beton import CropReader
from teacher_cache.kernels.loops import check_crops, check_rows, copy_rows, copy_tokens, decode_rows
from teacher_cache.kernels.pointers import pointer_i32, pointer_i64, pointer_u8, pointer_u32, pointer_u64
from teacher_cache.store.reader import CHECKS, StoreReader

from .record import Field
from .with_ffcv import AllocationQuery, Operation

# Columns of the uint64 tables through which compiled code finds everything else: addresses, counts and flags.
BASE, POINTERS, SIZES, CRCS, N_CROPS, IS_JPEG, CROP_ERRORS, N_CROP_COLUMNS = range(8)
HANDLES, SHARD_SIZES, N_SHARDS, BY_PREAD, SHARD_ROWS, CHECKED, CHECK, OFFSET, FIELD_ERRORS, PLACES, N_FIELD_COLUMNS = range(11)


class DecodeCrops(Operation):
    """FFCV operation: crops of the view that `open` named last, decoded and checked.

    Output: uint8 [B, size, size, 3]. Tables are handed to compiled code by address through `control`, so that another view
    needs no recompilation; FFCV would freeze arrays into the machine code.
    """

    def __init__(self, size: int, max_batch: int):
        super().__init__()
        self.size = size
        self.control = np.zeros(N_CROP_COLUMNS, "uint64")
        self.errors = np.zeros(max_batch, "int64")
        self.control[CROP_ERRORS] = self.errors.ctypes.data

    def open(self, crops: CropReader) -> None:
        self.crops = crops  # keeps the tables alive
        tables = {BASE: crops.bytes, POINTERS: crops.pointers, SIZES: crops.sizes, CRCS: crops.crcs}
        for column, table in tables.items():
            self.control[column] = table.ctypes.data
        self.control[N_CROPS], self.control[IS_JPEG] = len(crops), crops.is_jpeg

    def require_sound(self, rows: np.ndarray) -> None:
        """Raise CacheCorruptError if a crop of the batch just decoded failed."""
        check_crops(self.errors[: len(rows)], rows, self.crops.path)

    def declare_state_and_memory(self, previous_state):
        shape, dtype = (self.size, self.size, 3), np.dtype("u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable:
        address = self.control.ctypes.data

        def decode(rows, out, metadata, storage_state):
            control = carray(pointer_u64(np.uint64(address)), N_CROP_COLUMNS)
            n_crops = control[N_CROPS]
            pointers = carray(pointer_u64(control[POINTERS]), n_crops)
            sizes = carray(pointer_u64(control[SIZES]), n_crops)
            crcs = carray(pointer_u32(control[CRCS]), n_crops)
            errors = carray(pointer_i64(control[CROP_ERRORS]), len(rows))
            decode_rows(rows, out, control[BASE], pointers, sizes, crcs, control[IS_JPEG] == 1, errors)
            return out[: len(rows)]

        return decode


class FetchTargets(Operation):
    """FFCV operation: the records of a batch, copied from the open shards of the store that `open` named last.

    Output: uint8 [B, record bytes] (record_layout). Each row's CRC-32C is compared as the store's `check` says. May only run
    inside `holding` of the batch; `choose` says before which tokens are wanted, where of a field it is only some.
    """

    def __init__(self, fields: list[Field], record_bytes: int, max_batch: int):
        super().__init__()
        self.fields, self.record_bytes = fields, record_bytes
        self.control = np.zeros((len(fields), N_FIELD_COLUMNS), "uint64")
        self.errors = np.zeros((len(fields), max_batch), "int64")
        self.places = {field.store: np.zeros((max_batch, field.n_tokens), "int32") for field in fields if field.n_tokens}

    def open(self, stores: list[StoreReader]) -> None:
        self.stores = stores  # keeps the tables alive
        for field, line, errors in zip(self.fields, self.control, self.errors, strict=True):
            store = stores[field.store]
            shards, column = store.shards, store.columns[field.array]
            line[HANDLES], line[SHARD_SIZES] = shards.handles[column].ctypes.data, shards.sizes[column].ctypes.data
            line[N_SHARDS], line[BY_PREAD], line[SHARD_ROWS] = store.spec.n_shards, shards.by_pread, store.spec.shard_rows
            line[CHECKED], line[CHECK] = shards.checked[column].ctypes.data, CHECKS[store.check]
            line[OFFSET], line[FIELD_ERRORS] = field.offset, errors.ctypes.data
            line[PLACES] = self.places[field.store].ctypes.data if field.n_tokens else 0

    def choose(self, places: dict[int, np.ndarray]) -> None:
        """Of the batch that is fetched next, the places of the tokens that are wanted of each store: int32 [B, C+K]."""
        for store, chosen in places.items():
            self.places[store][: len(chosen)] = chosen

    def holding(self, rows: np.ndarray) -> contextlib.ExitStack:
        """Context in which the shards of a batch are open. Raises for rows or shards that are not there."""
        with contextlib.ExitStack() as held:
            for number, store in enumerate(self.stores):
                if arrays := [field.array for field in self.fields if field.store == number]:
                    held.enter_context(store.opened(arrays, rows))
            return held.pop_all()

    def require_sound(self, rows: np.ndarray) -> None:
        """Raise CropNotCachedError or CacheCorruptError if a row of the batch just copied failed."""
        for field, errors in zip(self.fields, self.errors, strict=True):
            check_rows(errors[: len(rows)], rows, self.stores[field.store].path / field.array)

    def declare_state_and_memory(self, previous_state):
        shape, dtype = (self.record_bytes,), np.dtype("u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable:
        address, n_fields, record_bytes = self.control.ctypes.data, len(self.fields), self.record_bytes
        row_bytes = np.array([field.n_bytes for field in self.fields], "uint64")
        n_chosen = np.array([field.n_tokens or 0 for field in self.fields], "int64")
        layouts = np.array([self._layout(field) for field in self.fields], "uint64")
        n_rows = np.int64(len(self.stores[0]))  # the same for all: they belong to one view

        def fetch(rows, out, metadata, storage_state):
            control = carray(pointer_u64(np.uint64(address)), (n_fields, N_FIELD_COLUMNS))
            for i in range(n_fields):
                line = control[i]
                handles = carray(pointer_u64(line[HANDLES]), line[N_SHARDS])
                sizes = carray(pointer_u64(line[SHARD_SIZES]), line[N_SHARDS])
                checked = carray(pointer_u8(line[CHECKED]), n_rows)
                errors = carray(pointer_i64(line[FIELD_ERRORS]), len(rows))
                start = np.uint64(out.ctypes.data) + line[OFFSET]
                by_pread, shard_rows, check = line[BY_PREAD] == 1, np.int64(line[SHARD_ROWS]), np.int64(line[CHECK])
                if n_chosen[i] == 0:
                    copy_rows(rows, start, record_bytes, handles, sizes, by_pread, shard_rows, row_bytes[i], checked, check,
                              errors)  # fmt: skip
                else:
                    places = carray(pointer_i32(line[PLACES]), (len(rows), n_chosen[i]))
                    copy_tokens(rows, places, layouts[i, 0], layouts[i, 1], layouts[i, 2], start, record_bytes, handles, sizes,
                                by_pread, shard_rows, checked, check, errors)  # fmt: skip
            return out[: len(rows)]

        return fetch

    def _layout(self, field: Field) -> tuple[int, int, int]:
        store = self.stores[field.store]
        return store.spec.token_layout(field.array, store.teacher) if field.n_tokens else (0, 0, 0)


class ReadTargets:
    """What FetchTargets does, where a compiled copy cannot read one of the stores (it is compressed)."""

    def __init__(self, fields: list[Field], record_bytes: int):
        self.fields, self.record_bytes = fields, record_bytes

    def open(self, stores: list[StoreReader]) -> None:
        self.stores = stores

    def __call__(self, rows: np.ndarray, places: dict[int, np.ndarray]) -> np.ndarray:
        """uint8 [B, record bytes]; places: as for FetchTargets.choose."""
        out = np.zeros((len(rows), self.record_bytes), "u1")
        for field in self.fields:
            values = self.stores[field.store].read(field.array, rows, places=places[field.store] if field.n_tokens else None)
            out[:, field.offset : field.offset + field.n_bytes] = values.reshape(len(rows), -1).view("u1")
        return out
