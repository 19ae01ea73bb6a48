"""The two operations of FFCV's pipeline that are ours: crops decoded, records copied; both check what they read.

FFCV's graph joins them to stages. They call compiled loops, which run without the GIL; docs/design/0003 says
why they are not FFCV's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from teacher_cache.crops.beton import CropReader
from teacher_cache.kernels import batch
from teacher_cache.kernels.codes import check_crops, check_rows
from teacher_cache.store.choices import CHECKS
from teacher_cache.store.reader import StoreReader

from .record import Field
from .with_ffcv import AllocationQuery, Operation


class DecodeCrops(Operation):
    """FFCV operation: crops of the view that `open` named last, decoded and checked.

    Output: uint8 [B, size, size, 3]. Tables are handed to compiled code by address through `control`: one
    machine code reads every view.
    """

    def __init__(self, size: int, max_batch: int):
        super().__init__()
        self.size = size
        self.control = np.zeros(batch.N_CROP_COLUMNS, "uint64")
        self.errors = np.zeros(max_batch, "int64")
        self.control[batch.CROP_ERRORS] = self.errors.ctypes.data

    def open(self, crops: CropReader) -> None:
        self.crops = crops  # keeps the tables alive
        tables = {batch.BASE: crops.bytes, batch.POINTERS: crops.pointers, batch.SIZES: crops.sizes, batch.CRCS: crops.crcs}
        for column, table in tables.items():
            self.control[column] = table.ctypes.data
        self.control[batch.N_CROPS], self.control[batch.IS_JPEG] = len(crops), crops.is_jpeg

    def require_sound(self, rows: np.ndarray) -> None:
        """Raise CacheCorruptError if a crop of the batch just decoded failed."""
        check_crops(self.errors[: len(rows)], rows, self.crops.path)

    def declare_state_and_memory(self, previous_state):
        shape, dtype = (self.size, self.size, 3), np.dtype("u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable:
        address = np.uint64(self.control.ctypes.data)

        def decode(rows, out, metadata, storage_state):
            batch.decode_batch(rows, out, address)
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
        self.control = np.zeros((len(fields), batch.N_FIELD_COLUMNS), "uint64")
        self.errors = np.zeros((len(fields), max_batch), "int64")
        self.places = {field.store: np.zeros((max_batch, field.n_tokens), "int32") for field in fields if field.n_tokens}

    def open(self, stores: list[StoreReader]) -> None:
        self.stores = stores  # keeps the tables alive
        for field, line, errors in zip(self.fields, self.control, self.errors, strict=True):
            store = stores[field.store]
            shards, column = store.shards, store.columns[field.array]
            line[batch.HANDLES], line[batch.SHARD_SIZES] = shards.handles[column].ctypes.data, shards.sizes[column].ctypes.data
            line[batch.N_SHARDS], line[batch.SHARD_ROWS] = store.spec.n_shards, store.spec.shard_rows
            line[batch.BY_PREAD] = shards.by_pread
            line[batch.CHECKED], line[batch.CHECK] = shards.checked[column].ctypes.data, CHECKS[store.check]
            line[batch.OFFSET], line[batch.FIELD_ERRORS] = field.offset, errors.ctypes.data
            line[batch.ROW_BYTES], line[batch.N_ROWS] = field.n_bytes, len(store)
            if field.n_tokens:
                line[batch.PLACES], line[batch.N_CHOSEN] = self.places[field.store].ctypes.data, field.n_tokens
                line[batch.N_PARTS : batch.TOKEN_BYTES + 1] = store.spec.token_layout(field.array, store.teacher)

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
        address, n_fields = np.uint64(self.control.ctypes.data), len(self.fields)

        def fetch(rows, out, metadata, storage_state):
            batch.fetch_batch(rows, np.uint64(out.ctypes.data), self.record_bytes, address, n_fields)
            return out[: len(rows)]

        return fetch


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
