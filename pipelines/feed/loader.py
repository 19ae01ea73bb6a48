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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numba
import numpy as np
import torch
from ffcv.loader.epoch_iterator import select_buffer  # after teacher_cache.kernels.loops, which guards ffcv's import
from ffcv.pipeline import PipelineSpec
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.graph import Graph
from ffcv.pipeline.operation import Operation
from ffcv.reader import Reader
from numba import carray
from torch import Tensor

from teacher_cache.crops.beton import CropReader
from teacher_cache.errors import CacheCorruptError
from teacher_cache.format.race import places_of, require_patches
from teacher_cache.format.spec import NOT_BY_TOKEN
from teacher_cache.kernels.loops import check_crops, check_rows, copy_rows, copy_tokens, decode_rows, use_threads
from teacher_cache.kernels.pointers import pointer_i32, pointer_i64, pointer_u8, pointer_u32, pointer_u64
from teacher_cache.store.reader import CHECKS, StoreReader

from .upload import Sent, Upload

log = logging.getLogger(__name__)
ALIGN = 16  # bytes; parts of a record start at multiples of this

# Fields of the uint64 tables through which compiled code finds everything else: addresses, counts and flags.
BASE, POINTERS, SIZES, CRCS, N_CROPS, IS_JPEG, CROP_ERRORS, N_CROP_FIELDS = range(8)
HANDLES, SHARD_SIZES, N_SHARDS, BY_PREAD, SHARD_ROWS, CHECKED, CHECK, OFFSET, PART_ERRORS, PLACES, N_PART_FIELDS = range(11)


@dataclass(frozen=True)
class Part:
    """One array within the record of a row: a record is all wanted arrays of all stores, back to back."""

    store: int
    """Place of its store among those that are read."""
    array: str
    offset: int
    """Bytes from the start of the record; a multiple of ALIGN."""
    n_bytes: int
    n_tokens: int | None = None
    """C + K, where only CLS and K patches of a row are wanted; None: all of it."""


def record_layout(stores: list[StoreReader], arrays: list[list[str]], kept: Sequence[int]) -> tuple[list[Part], int]:
    """Where each array lies in a record, and the bytes of a record; arguments as of JoinedLoader."""
    parts, offset = [], 0
    for place, (store, wanted, n_patches) in enumerate(zip(stores, arrays, kept, strict=True)):
        for array in wanted:
            n_tokens = n_patches + int(store.teacher.has_cls) if n_patches and array not in NOT_BY_TOKEN else None
            n_bytes = store.spec.row_bytes(array, store.teacher, n_tokens)
            parts.append(Part(place, array, offset, n_bytes, n_tokens))
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
    inside `holding` of the batch; `choose` says before which tokens are wanted, where a part has only some.
    """

    def __init__(self, parts: list[Part], record_bytes: int, max_batch: int):
        super().__init__()
        self.parts, self.record_bytes = parts, record_bytes
        self.control = np.zeros((len(parts), N_PART_FIELDS), "uint64")
        self.errors = np.zeros((len(parts), max_batch), "int64")
        self.places = {part.store: np.zeros((max_batch, part.n_tokens), "int32") for part in parts if part.n_tokens}

    def open(self, stores: list[StoreReader]) -> None:
        self.stores = stores  # keeps the tables alive
        for part, line, errors in zip(self.parts, self.control, self.errors, strict=True):
            store = stores[part.store]
            shards, column = store.shards, store.columns[part.array]
            line[HANDLES], line[SHARD_SIZES] = shards.handles[column].ctypes.data, shards.sizes[column].ctypes.data
            line[N_SHARDS], line[BY_PREAD], line[SHARD_ROWS] = store.spec.n_shards, shards.by_pread, store.spec.shard_rows
            line[CHECKED], line[CHECK] = shards.checked[column].ctypes.data, CHECKS[store.check]
            line[OFFSET], line[PART_ERRORS] = part.offset, errors.ctypes.data
            line[PLACES] = self.places[part.store].ctypes.data if part.n_tokens else 0

    def choose(self, places: dict[int, np.ndarray]) -> None:
        """Of the batch that is fetched next, the places of the tokens that are wanted of each store: int32 [B, C+K]."""
        for store, chosen in places.items():
            self.places[store][: len(chosen)] = chosen

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
        n_chosen = np.array([part.n_tokens or 0 for part in self.parts], "int64")
        layouts = np.array([self._layout(part) for part in self.parts], "uint64")
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

    def _layout(self, part: Part) -> tuple[int, int, int]:
        store = self.stores[part.store]
        return store.spec.token_layout(part.array, store.teacher) if part.n_tokens else (0, 0, 0)


class ReadTargets:
    """What FetchTargets does, where a compiled copy cannot read one of the stores (it is compressed)."""

    def __init__(self, parts: list[Part], record_bytes: int):
        self.parts, self.record_bytes = parts, record_bytes

    def open(self, stores: list[StoreReader]) -> None:
        self.stores = stores

    def __call__(self, rows: np.ndarray, places: dict[int, np.ndarray]) -> np.ndarray:
        """uint8 [B, record bytes]; places: as for FetchTargets.choose."""
        out = np.zeros((len(rows), self.record_bytes), "u1")
        for part in self.parts:
            values = self.stores[part.store].read(part.array, rows, places=places[part.store] if part.n_tokens else None)
            out[:, part.offset : part.offset + part.n_bytes] = values.reshape(len(rows), -1).view("u1")
        return out


@dataclass(frozen=True)
class RawBatch:
    """What one pass of the loader gives, on its device. On a CPU the tensors lie in a ring of buffers: copy them before asking
    for the next batch."""

    rows: np.ndarray  # int64 [B]
    images: Tensor  # uint8 [B, size, size, 3]
    records: Tensor | None  # uint8 [B, record bytes]
    patches: Tensor | None  # int64 [B, N], as `JoinedLoader.batches` was told


class JoinedLoader:
    """One FFCV loader for a whole run: crops of any view joined with the rows of its stores. Compiled once.

    arrays: those wanted of each store. batch_rows: rows a batch at most. workers: threads of the compiled loops. kept: of each
    store K, where not all tokens of a row are wanted but CLS and K patches (see `batches`), or 0; by default 0. device: where the
    batches go. ahead: batches prepared in advance. announced: batches that the kernel is told of before that, so that a disk has
    more than one row to fetch.
    """

    def __init__(self, crops: CropReader, stores: list[StoreReader], arrays: list[list[str]], batch_rows: int, workers: int, *,
                 kept: Sequence[int] = (), device: torch.device | str = "cpu", ahead: int = 3, announced: int = 2):  # fmt: skip
        self.batch_rows, self.workers, self.ahead, self.announced = batch_rows, workers, ahead, announced
        self.kept = tuple(kept) or (0,) * len(stores)
        self.upload = Upload(torch.device(device))
        self.parts, self.record_bytes = record_layout(stores, arrays, self.kept)
        self.decode = DecodeCrops(crops.size, batch_rows)
        self.fetch: FetchTargets | None = None
        self.read: ReadTargets | None = None
        self.stores: list[StoreReader] = []
        specs = {"image": PipelineSpec("image", decoder=self.decode)}
        if self.parts and all(stores[part.store].is_plain(part.array) for part in self.parts):
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
        self.sent: dict[int, torch.cuda.Event | None] = {}
        """Per slot, `Sent.done` of what was sent from it last: before, it must not be written over."""
        buffers = [buffer for of_kind in self.memory.values() for buffer in of_kind.values() if buffer is not None]
        if not self.upload.is_quick(buffers):  # FFCV pins its buffers where there is a GPU, and says nothing where it cannot
            log.warning(
                "Batches cannot be kept in pinned memory, so that copying them to the GPU holds up the loader. Raise the limit "
                "of locked memory (ulimit -l)."
            )

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

    def run(self, rows: np.ndarray, slot: int, patches: np.ndarray | None = None) -> list[np.ndarray]:
        """Decode and copy one batch into ring buffer `slot`: images and, if targets are wanted, records, as in RawBatch.

        patches: int64 [B, N]; of a store of which K are kept the first K are read. Raises for the first row that is damaged or
        missing.
        """
        places = {
            place: store.require_places(places_of(patches[:, :n_patches], int(store.teacher.has_cls)), len(rows))
            for place, (store, n_patches) in enumerate(zip(self.stores, self.kept, strict=True))
            if n_patches
        }
        if self.fetch is not None:
            self.fetch.choose(places)
        arguments = {"batch_indices": rows, "metadata": self.metadata, "storage_state": ()}
        for kind, prefix in (("operation", "memory"), ("shared", "shared_memory")):
            for node, buffers in self.memory[kind].items():
                arguments[f"{prefix}_{node}"] = select_buffer(buffers, slot, len(rows))
        with self.fetch.holding(rows) if self.fetch is not None else contextlib.nullcontext():
            for stage, defined in self.stages:
                results = stage(**arguments)
                arguments |= {f"result_{node}": result for node, result in zip(defined, results, strict=True)}
        arrays = [arguments[f"result_{node}"] for node in self.outputs]
        self.decode.check(rows)
        if self.fetch is not None:
            self.fetch.check(rows)
        elif self.read is not None:
            arrays.append(self.read(rows, places))
        for part in self.parts:
            if part.array == "index":
                index = arrays[1][:, part.offset : part.offset + part.n_bytes].view("<i4")
                store = self.stores[part.store]
                require_patches(index, store.teacher.n_patches, rows, store.path / part.array)
        return arrays

    def announce(self, rows: np.ndarray) -> None:
        """Let the kernel begin to read a batch that is to be run soon. What is wrong with its rows, `run` will say."""
        self.decode.crops.announce(rows)
        for place, store in enumerate(self.stores):
            store.announce([part.array for part in self.parts if part.store == place], rows)

    def batches(self, rows: np.ndarray, patches_of: Callable[[int], np.ndarray] | None = None) -> Iterator[RawBatch]:
        """The batches whose rows are the lines of `rows` (int64 [n, B]), in order, prepared in the background.

        patches_of: called there with the number of a batch, gives its patches, those to be read first: int64 [B, N]. Needed where
        a store has `kept`. An exception in the background is raised here, with its cause. Leaving the loop early ends the thread.
        """
        thread = _Ahead(self, rows, patches_of)
        try:
            yield from thread.results()
        finally:
            thread.stop()


class _Ahead:
    """The thread that keeps a few batches ready."""

    _END = object()

    def __init__(self, loader: JoinedLoader, rows: np.ndarray, patches_of: Callable[[int], np.ndarray] | None):
        self.loader, self.rows, self.patches_of = loader, rows, patches_of
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
            self.loader.upload.enter()
            for index, rows in enumerate(self.rows):
                self.slots.acquire()
                if self.stopping.is_set():
                    return
                self._announce(index)
                self.ready.put((rows, self._send(index)))
            self.ready.put(self._END)
        except BaseException as error:  # handed over, and raised where somebody listens
            self.ready.put(error)

    def _send(self, index: int) -> Sent:
        slot = index % self.loader.n_slots
        if done := self.loader.sent.pop(slot, None):
            done.synchronize()
        patches = [] if self.patches_of is None else [self.patches_of(index)]
        arrays = self.loader.run(self.rows[index], slot, *patches)
        sent = self.loader.upload.send(patches + arrays)
        self.loader.sent[slot] = sent.done
        return sent

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
        while (result := self.ready.get()) is not self._END:
            if isinstance(result, BaseException):
                raise result
            rows, sent = result
            tensors = list(sent.receive())
            patches = tensors.pop(0) if self.patches_of else None
            yield RawBatch(rows, tensors[0], tensors[1] if len(tensors) > 1 else None, patches)
            sent.used()
            self.slots.release()

    def stop(self) -> None:
        self.stopping.set()
        self.slots.release()
        self.thread.join()


def _why_not_plain(stores: list[StoreReader], parts: list[Part]) -> str:
    """The first reason for which `is_plain` says no, as half a sentence."""
    part = next(part for part in parts if not stores[part.store].is_plain(part.array))
    store = stores[part.store]
    return f"{part.array} of {store.path.name} is compressed with {dict(store.spec.codecs)[part.array]}"


def default_workers() -> int:
    """Threads of the compiled loops: all processors this process may use."""
    return numba.config.NUMBA_NUM_THREADS
