"""FFCV's pipeline over a cache: crops decoded and targets copied in one pass, by compiled loops without the GIL.

What is FFCV's: the file format, the graph that makes stages of operations, the C decoder. What is ours, because FFCV 1.0.2
hangs, leaks or corrupts there (docs/design/0003): the two operations, which check what they read, and the thread that runs the
stages, which hands exceptions to the consumer and ends when the consumer leaves.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import resource
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numba
import numpy as np
import torch
from torch import Tensor

from teacher_cache.crops.beton import CropReader
from teacher_cache.errors import CacheCorruptError
from teacher_cache.format.race import places_of, require_patches
from teacher_cache.kernels.loops import use_threads
from teacher_cache.store.reader import StoreReader

from .operations import DecodeCrops, FetchTargets, ReadTargets
from .record import Field, record_layout
from .upload import Sent, Upload
from .with_ffcv import Graph, PipelineSpec, Reader, select_buffer, stages_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RawBatch:
    """What one pass of the loader gives, on its device. On a CPU the tensors lie in a ring of buffers: copy them before asking
    for the next batch."""

    rows: np.ndarray  # int64 [B]
    images: Tensor  # uint8 [B, size, size, 3]
    records: Tensor | None  # uint8 [B, record bytes]
    patches: Tensor | None  # int64 [B, N], as `Stretch.patches_of` gave them


@dataclass(frozen=True)
class Stretch:
    """Batches that follow one another and are of one view."""

    rows: np.ndarray
    """int64 [n, B], a batch a line."""
    view: tuple[CropReader, list[StoreReader]] | None = None
    """What is to be opened before; None: what is open already."""
    patches_of: Callable[[int], np.ndarray] | None = None
    """From the number of a batch to its patches, those to be read first: int64 [B, N]. Needed where a store has `kept`."""


class JoinedLoader:
    """One FFCV loader for a whole run: crops of any view joined with the rows of its stores.

    arrays: those wanted of each store. batch_rows: rows a batch at most. workers: threads of the compiled loops. kept: of each
    store K, where not all tokens of a row are wanted but CLS and K patches (see `batches`), or 0; by default 0. device: where the
    batches go. ahead: batches prepared in advance. announced: batches that the kernel hears of before that, so that a disk has
    more than one row to fetch.
    """

    def __init__(self, crops: CropReader, stores: list[StoreReader], arrays: list[list[str]], batch_rows: int, workers: int, *,
                 kept: Sequence[int] = (), device: torch.device | str = "cpu", ahead: int = 3, announced: int = 2):  # fmt: skip
        self.batch_rows, self.workers, self.ahead, self.announced = batch_rows, workers, ahead, announced
        self.kept = tuple(kept) or (0,) * len(stores)
        self.upload = Upload(torch.device(device))
        self.fields, self.record_bytes = record_layout(stores, arrays, self.kept)
        self.decode = DecodeCrops(crops.size, batch_rows)
        self.fetch: FetchTargets | None = None
        self.read: ReadTargets | None = None
        self.stores: list[StoreReader] = []
        specs = {"image": PipelineSpec("image", decoder=self.decode)}
        if self.fields and all(stores[field.store].is_plain(field.array) for field in self.fields):
            self.fetch = FetchTargets(self.fields, self.record_bytes, batch_rows)
            specs["targets"] = PipelineSpec("label", decoder=self.fetch)
        elif self.fields:
            self.read = ReadTargets(self.fields, self.record_bytes)
            log.warning(
                "Targets are read outside of the compiled loader, which is slower: %s.", _why_not_plain(stores, self.fields)
            )
        self.open(crops, stores)

        reader = Reader(str(crops.path))
        self.metadata = reader.metadata
        ffcv_fields = {name: index for index, name in enumerate(reader.field_names)}
        self.graph = Graph(specs, reader.handlers, ffcv_fields, reader.metadata, None)
        self.stages, self.outputs = stages_of(self.graph)
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
            number: store.require_places(places_of(patches[:, :n_patches], int(store.teacher.has_cls)), len(rows))
            for number, (store, n_patches) in enumerate(zip(self.stores, self.kept, strict=True))
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
        self.decode.require_sound(rows)
        if self.fetch is not None:
            self.fetch.require_sound(rows)
        elif self.read is not None:
            arrays.append(self.read(rows, places))
        for field in self.fields:
            if field.array == "index":
                index = arrays[1][:, field.offset : field.offset + field.n_bytes].view("<i4")
                store = self.stores[field.store]
                require_patches(index, store.teacher.n_patches, rows, store.path / field.array)
        return arrays

    def announce(self, rows: np.ndarray) -> None:
        """Let the kernel begin to read a batch that is to be run soon. What is wrong with its rows, `run` will say."""
        self.decode.crops.announce(rows)
        for number, store in enumerate(self.stores):
            store.announce([field.array for field in self.fields if field.store == number], rows)

    def batches(self, rows: np.ndarray, patches_of: Callable[[int], np.ndarray] | None = None) -> Iterator[RawBatch]:
        """`stream` of what is open: rows and patches as in Stretch."""
        return self.stream([Stretch(rows, patches_of=patches_of)])

    def stream(self, stretches: Iterable[Stretch]) -> Iterator[RawBatch]:
        """The batches of the stretches, in order, prepared in the background, also from one stretch to the next.

        `stretches` is asked for the next one there, when the batches of the one before are prepared. An exception in the
        background is raised here, behind the batches before it. Leaving the loop early ends the thread.
        """
        thread = _Ahead(self, stretches)
        try:
            yield from thread.results()
        finally:
            thread.stop()


class _Ahead:
    """The thread that keeps a few batches ready."""

    _END = object()

    def __init__(self, loader: JoinedLoader, stretches: Iterable[Stretch]):
        self.loader, self.stretches = loader, stretches
        self.ready: queue.Queue = queue.Queue()
        # a slot is free again when the consumer asks for the batch after the one that used it
        self.slots = threading.Semaphore(loader.n_slots)
        self.stopping = threading.Event()
        self.slot, self.n_blocks_read = 0, -1
        self.thread = threading.Thread(target=self._work, name="ffcv-ahead", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        try:
            use_threads(self.loader.workers)  # numba's count is per thread
            self.loader.upload.enter()
            for stretch in self.stretches:
                if stretch.view is not None:
                    self.loader.open(*stretch.view)
                n_announced = 0
                for index in range(len(stretch.rows)):
                    self.slots.acquire()
                    if self.stopping.is_set():
                        return
                    n_announced = self._announce(stretch.rows, index, n_announced)
                    self.ready.put(self._send(stretch, index))
            self.ready.put(self._END)
        except BaseException as error:  # handed over, and raised where somebody listens
            self.ready.put(error)

    def _send(self, stretch: Stretch, index: int) -> tuple[np.ndarray, bool, Sent]:
        """A batch on its way: its rows, whether patches come first, the arrays."""
        rows, slot = stretch.rows[index], self.slot
        self.slot = (slot + 1) % self.loader.n_slots
        if done := self.loader.sent.pop(slot, None):
            done.synchronize()
        patches = [] if stretch.patches_of is None else [stretch.patches_of(index)]
        arrays = self.loader.run(rows, slot, *patches)
        sent = self.loader.upload.send(patches + arrays)
        self.loader.sent[slot] = sent.done
        return rows, bool(patches), sent

    def _announce(self, rows: np.ndarray, index: int, n_announced: int) -> int:
        """Announce the batches that come soon, as long as this process reads from a disk; what is in memory needs no announcing,
        which would cost a thirtieth of the loader's time. Announced reads count as the process's own. Returns how many of the
        stretch are announced now."""
        n_blocks = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
        if not self.loader.announced or n_blocks == self.n_blocks_read:
            return n_announced
        self.n_blocks_read = n_blocks
        end = index + self.loader.announced + 1
        for coming in rows[max(index, n_announced) : end]:
            self.loader.announce(coming)
        return end

    def results(self) -> Iterator[RawBatch]:
        while (result := self.ready.get()) is not self._END:
            if isinstance(result, BaseException):
                raise result
            rows, has_patches, sent = result
            tensors = list(sent.receive())
            patches = tensors.pop(0) if has_patches else None
            yield RawBatch(rows, tensors[0], tensors[1] if len(tensors) > 1 else None, patches)
            sent.used()
            self.slots.release()

    def stop(self) -> None:
        self.stopping.set()
        self.slots.release()
        self.thread.join()


def _why_not_plain(stores: list[StoreReader], fields: list[Field]) -> str:
    """The first reason for which `is_plain` says no, as half a sentence."""
    field = next(field for field in fields if not stores[field.store].is_plain(field.array))
    store = stores[field.store]
    return f"{field.array} of {store.path.name} is compressed with {dict(store.spec.codecs)[field.array]}"


def default_workers() -> int:
    """Threads of the compiled loops: all processors this process may use."""
    return numba.config.NUMBA_NUM_THREADS
