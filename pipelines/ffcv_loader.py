"""FFCV's compiled pipeline over a cache: crops decoded and targets copied in one pass, without the GIL.

What is FFCV's: the file format, the graph that compiles operations into stages, the C decoder. What is ours, because FFCV 1.0.2
hangs, leaks or corrupts there (docs/design/0003): the two operations, which check what they read, and the thread that runs the
stages, which hands exceptions to the consumer and ends when the consumer leaves.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import resource
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numba
import numpy as np
import torch
from ffcv.loader.epoch_iterator import select_buffer  # after teacher_cache.compiled, which guards ffcv's import
from ffcv.pipeline import PipelineSpec
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.graph import Graph
from ffcv.pipeline.operation import Operation
from ffcv.reader import Reader
from numba import carray

from teacher_cache.beton import CropReader
from teacher_cache.compiled import (
    check_crops,
    check_rows,
    copy_rows,
    decode_rows,
    use_threads,
)
from teacher_cache.errors import CacheCorruptError
from teacher_cache.pointers import pointer_i64, pointer_u8, pointer_u32, pointer_u64
from teacher_cache.reader import CHECKS, StoreReader

log = logging.getLogger(__name__)
ALIGN = 16  # bytes; parts of a record start at multiples of this

# Fields of the uint64 tables through which compiled code finds everything else: addresses, counts and flags.
BASE, POINTERS, SIZES, CRCS, N_CROPS, IS_JPEG, CROP_ERRORS, N_CROP_FIELDS = range(8)
HANDLES, SHARD_SIZES, N_SHARDS, BY_PREAD, SHARD_ROWS, CHECKED, CHECK, OFFSET, PART_ERRORS, N_PART_FIELDS = range(10)


@dataclass(frozen=True)
class Part:
    """One array within the record of a row: a record is all wanted arrays of all stores, back to back."""

    store: int
    """Place of its store among those that are read."""
    array: str
    offset: int
    """Bytes from the start of the record; a multiple of ALIGN."""
    n_bytes: int


def record_layout(stores: list[StoreReader], arrays: list[list[str]]) -> tuple[list[Part], int]:
    """Where each array lies in a record, and the bytes of a record. arrays: those wanted of each store."""
    parts, offset = [], 0
    for place, (store, wanted) in enumerate(zip(stores, arrays, strict=True)):
        for array in wanted:
            n_bytes = store.spec.row_bytes(array, store.teacher)
            parts.append(Part(place, array, offset, n_bytes))
            offset += -(-n_bytes // ALIGN) * ALIGN
    return parts, offset


class DecodeCrops(Operation):
    """FFCV operation: crops of the view that `open` named last, decoded and checked.

    Output: uint8 [B, size, size, 3]. Tables are handed to compiled code by address through `control`, so that another view
    needs no recompilation; FFCV would freeze arrays into the machine code.
    """

    def __init__(self, size: int, max_batch: int):
        super().__init__()
        self.size = size
        self.control = np.zeros(N_CROP_FIELDS, "uint64")
        self.errors = np.zeros(max_batch, "int64")
        self.control[CROP_ERRORS] = self.errors.ctypes.data

    def open(self, crops: CropReader) -> None:
        self.crops = crops  # keeps the tables alive
        tables = {BASE: crops.bytes, POINTERS: crops.pointers, SIZES: crops.sizes, CRCS: crops.crcs}
        for field, table in tables.items():
            self.control[field] = table.ctypes.data
        self.control[N_CROPS], self.control[IS_JPEG] = len(crops), crops.is_jpeg

    def check(self, rows: np.ndarray) -> None:
        """Raise CacheCorruptError if a crop of the batch just decoded failed."""
        check_crops(self.errors[: len(rows)], rows, self.crops.path)

    def declare_state_and_memory(self, previous_state):
        shape, dtype = (self.size, self.size, 3), np.dtype("u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable:
        address = self.control.ctypes.data

        def decode(rows, out, metadata, storage_state):
            control = carray(pointer_u64(np.uint64(address)), N_CROP_FIELDS)
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
    inside `holding` of the batch.
    """

    def __init__(self, parts: list[Part], record_bytes: int, max_batch: int):
        super().__init__()
        self.parts, self.record_bytes = parts, record_bytes
        self.control = np.zeros((len(parts), N_PART_FIELDS), "uint64")
        self.errors = np.zeros((len(parts), max_batch), "int64")

    def open(self, stores: list[StoreReader]) -> None:
        self.stores = stores  # keeps the tables alive
        for part, line, errors in zip(self.parts, self.control, self.errors, strict=True):
            store = stores[part.store]
            shards, column = store.shards, store.columns[part.array]
            line[HANDLES], line[SHARD_SIZES] = shards.handles[column].ctypes.data, shards.sizes[column].ctypes.data
            line[N_SHARDS], line[BY_PREAD], line[SHARD_ROWS] = store.spec.n_shards, shards.by_pread, store.spec.shard_rows
            line[CHECKED], line[CHECK] = shards.checked[column].ctypes.data, CHECKS[store.check]
            line[OFFSET], line[PART_ERRORS] = part.offset, errors.ctypes.data

    def holding(self, rows: np.ndarray) -> contextlib.ExitStack:
        """Context in which the shards of a batch are open. Raises for rows or shards that are not there."""
        with contextlib.ExitStack() as held:
            for place, store in enumerate(self.stores):
                if arrays := [part.array for part in self.parts if part.store == place]:
                    held.enter_context(store.opened(arrays, rows))
            return held.pop_all()

    def check(self, rows: np.ndarray) -> None:
        """Raise CropNotCachedError or CacheCorruptError if a row of the batch just copied failed."""
        for part, errors in zip(self.parts, self.errors, strict=True):
            check_rows(errors[: len(rows)], rows, self.stores[part.store].path / part.array)

    def declare_state_and_memory(self, previous_state):
        shape, dtype = (self.record_bytes,), np.dtype("u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable:
        address, n_parts, record_bytes = self.control.ctypes.data, len(self.parts), self.record_bytes
        row_bytes = np.array([part.n_bytes for part in self.parts], "uint64")
        n_rows = np.int64(len(self.stores[0]))  # the same for all: they belong to one view

        def fetch(rows, out, metadata, storage_state):
            control = carray(pointer_u64(np.uint64(address)), (n_parts, N_PART_FIELDS))
            for i in range(n_parts):
                line = control[i]
                handles = carray(pointer_u64(line[HANDLES]), line[N_SHARDS])
                sizes = carray(pointer_u64(line[SHARD_SIZES]), line[N_SHARDS])
                checked = carray(pointer_u8(line[CHECKED]), n_rows)
                errors = carray(pointer_i64(line[PART_ERRORS]), len(rows))
                start = np.uint64(out.ctypes.data) + line[OFFSET]
                copy_rows(rows, start, record_bytes, handles, sizes, line[BY_PREAD] == 1, np.int64(line[SHARD_ROWS]),
                          row_bytes[i], checked, np.int64(line[CHECK]), errors)  # fmt: skip
            return out[: len(rows)]

        return fetch


class ReadTargets:
    """What FetchTargets does, where a compiled copy cannot read one of the stores (compressed, or the zarr reader)."""

    def __init__(self, parts: list[Part], record_bytes: int):
        self.parts, self.record_bytes = parts, record_bytes

    def open(self, stores: list[StoreReader]) -> None:
        self.stores = stores

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [B, record bytes]"""
        out = np.zeros((len(rows), self.record_bytes), "u1")
        for part in self.parts:
            values = self.stores[part.store].read(part.array, rows)
            out[:, part.offset : part.offset + part.n_bytes] = values.reshape(len(rows), -1).view("u1")
        return out


@dataclass(frozen=True)
class RawBatch:
    """What one pass of the loader gives. The arrays lie in a ring of buffers: copy them before asking for the next."""

    rows: np.ndarray  # int64 [B]
    images: np.ndarray  # uint8 [B, size, size, 3]
    records: np.ndarray | None  # uint8 [B, record bytes]


class JoinedLoader:
    """One FFCV loader for a whole run: crops of any view joined with the rows of its stores. Compiled once.

    arrays: those wanted of each store. batch_rows: rows a batch at most. workers: threads of the compiled loops. ahead: batches
    prepared in advance. announced: batches that the kernel is told of before that, so that a disk has more than one row to fetch.
    """

    def __init__(self, crops: CropReader, stores: list[StoreReader], arrays: list[list[str]], batch_rows: int,
                 workers: int, ahead: int = 3, announced: int = 2):  # fmt: skip
        self.batch_rows, self.workers, self.ahead, self.announced = batch_rows, workers, ahead, announced
        self.parts, self.record_bytes = record_layout(stores, arrays)
        self.decode = DecodeCrops(crops.size, batch_rows)
        self.fetch: FetchTargets | None = None
        self.read: ReadTargets | None = None
        self.stores: list[StoreReader] = []
        specs = {"image": PipelineSpec("image", decoder=self.decode)}
        if self.parts and all(_is_plain(stores[part.store], part.array) for part in self.parts):
            self.fetch = FetchTargets(self.parts, self.record_bytes, batch_rows)
            specs["targets"] = PipelineSpec("label", decoder=self.fetch)
        elif self.parts:
            self.read = ReadTargets(self.parts, self.record_bytes)
            log.warning(
                "Targets are read outside of the compiled loader, which is slower: %s.", _why_not_plain(stores, self.parts)
            )
        self.open(crops, stores)

        reader = Reader(str(crops.path))
        self.metadata = reader.metadata
        fields = {name: index for index, name in enumerate(reader.field_names)}
        self.graph = Graph(specs, reader.handlers, fields, reader.metadata, None)
        _, code = self.graph.collect_requirements()
        self.stages, self.outputs = self.graph.codegen_all(code)
        # One ring for the whole run: FFCV would allocate and fault in a new one every epoch. One slot more than batches are
        # prepared ahead: the one that the consumer works on.
        self.n_slots = ahead + 1
        self.memory = self.graph.allocate_memory(batch_rows, self.n_slots)
        self.handed_out = 0
        """Slot of the batch that the consumer has."""
        self.copied: dict[int, torch.cuda.Event] = {}
        """Per slot, when its copy to the device is done."""

    def guard(self, device: torch.device) -> None:
        """Do not write over the batch just handed out before what is queued on `device` so far, its copies, is done."""
        if device.type == "cuda":
            self.copied[self.handed_out] = event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))

    def open(self, crops: CropReader, stores: list[StoreReader]) -> None:
        """Read from another view from now on; the shards of the one before are closed. No epoch may be running."""
        if crops.size != self.decode.size:
            raise CacheCorruptError(f"{crops.path}: crops of {crops.size} px, {self.decode.size} px in the views before.")
        self.decode.open(crops)
        for reader in (self.fetch, self.read):
            if reader is not None:
                reader.open(stores)
        for store in self.stores:
            if store not in stores:
                store.close()  # how many may be open is counted by the process, not by the store
        self.stores = stores

    def run(self, rows: np.ndarray, slot: int) -> RawBatch:
        """Decode and copy one batch into ring buffer `slot`; raises for the first row that is damaged or missing."""
        arguments = {"batch_indices": rows, "metadata": self.metadata, "storage_state": ()}
        for kind, prefix in (("operation", "memory"), ("shared", "shared_memory")):
            for node, buffers in self.memory[kind].items():
                arguments[f"{prefix}_{node}"] = select_buffer(buffers, slot, len(rows))
        with self.fetch.holding(rows) if self.fetch is not None else contextlib.nullcontext():
            for stage, defined in self.stages:
                results = stage(**arguments)
                arguments |= {f"result_{node}": result for node, result in zip(defined, results, strict=True)}
        images, *records = (arguments[f"result_{node}"] for node in self.outputs)
        self.decode.check(rows)
        if self.fetch is not None:
            self.fetch.check(rows)
        elif self.read is not None:
            records = [self.read(rows)]
        return RawBatch(rows, images, records[0] if records else None)

    def announce(self, rows: np.ndarray) -> None:
        """Let the kernel begin to read a batch that is to be run soon. What is wrong with its rows, `run` will say."""
        self.decode.crops.announce(rows)
        for place, store in enumerate(self.stores):
            store.announce([part.array for part in self.parts if part.store == place], rows)

    def batches(self, rows: np.ndarray) -> Iterator[RawBatch]:
        """The batches whose rows are the lines of `rows` (int64 [n, B]), in order, prepared in the background.

        An exception in the background is raised here, with its cause. Leaving the loop early ends the thread.
        """
        thread = _Ahead(self, rows)
        try:
            yield from thread.results()
        finally:
            thread.stop()


class _Ahead:
    """The thread that keeps a few batches ready."""

    _END = object()

    def __init__(self, loader: JoinedLoader, rows: np.ndarray):
        self.loader, self.rows = loader, rows
        self.ready: queue.Queue = queue.Queue()
        # a slot is free again when the consumer asks for the batch after the one that used it
        self.slots = threading.Semaphore(loader.n_slots)
        self.stopping = threading.Event()
        self.n_announced, self.n_blocks_read = 0, -1
        self.thread = threading.Thread(target=self._work, name="ffcv-ahead", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        try:
            use_threads(self.loader.workers)  # numba's count is per thread
            for index, rows in enumerate(self.rows):
                self.slots.acquire()
                if self.stopping.is_set():
                    return
                slot = index % self.loader.n_slots
                if slot in self.loader.copied:
                    self.loader.copied.pop(slot).synchronize()
                self._announce(index)
                self.ready.put(self.loader.run(rows, slot))
            self.ready.put(self._END)
        except BaseException as error:  # handed over, and raised where somebody listens
            self.ready.put(error)

    def _announce(self, index: int) -> None:
        """Announce the batches that come soon, as long as this process reads from a disk; what is in memory needs no announcing,
        which would cost a thirtieth of the loader's time. Announced reads count as the process's own."""
        n_blocks = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
        if self.loader.announced and n_blocks != self.n_blocks_read:
            self.n_blocks_read = n_blocks
            end = index + self.loader.announced + 1
            for coming in self.rows[max(index, self.n_announced) : end]:
                self.loader.announce(coming)
            self.n_announced = end

    def results(self) -> Iterator[RawBatch]:
        for index in range(len(self.rows) + 1):
            result = self.ready.get()
            if result is self._END:
                return
            if isinstance(result, BaseException):
                raise result
            self.loader.handed_out = index % self.loader.n_slots
            yield result
            self.slots.release()

    def stop(self) -> None:
        self.stopping.set()
        self.slots.release()
        self.thread.join()


def _is_plain(store: StoreReader, array: str) -> bool:
    """Whether compiled code can copy its rows as they lie on disk."""
    return store.reader != "zarr" and dict(store.spec.codecs)[array] == "none"


def _why_not_plain(stores: list[StoreReader], parts: list[Part]) -> str:
    """The first reason for which `_is_plain` says no, as half a sentence."""
    part = next(part for part in parts if not _is_plain(stores[part.store], part.array))
    store = stores[part.store]
    if store.reader == "zarr":
        return "zarr-python was asked for (--reader zarr)"
    return f"{part.array} of {store.path.name} is compressed with {dict(store.spec.codecs)[part.array]} (--codec none is not)"


def default_workers() -> int:
    """Threads of the compiled loops: all processors this process may use."""
    return numba.config.NUMBA_NUM_THREADS
