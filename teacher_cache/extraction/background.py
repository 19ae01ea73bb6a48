"""Shards written by a thread of their own, so that a teacher waits for the disk only if the disk is slower than it."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..store.store import Store
from ..store.writer import ShardWriter

THREAD = "shard-writer"
AHEAD = 4
"""Batches that may wait to be written; then `put` waits."""


class BackgroundWriter:
    """Takes batches of rows, shard by shard; a thread appends them and commits each shard. Use as a context manager.

    What goes wrong in the thread is raised by the next `put`, or when the context is left. Leaving it waits until all that was
    put is written; a shard that is not whole then is given up.

    advance: called with the number of rows behind each batch that was appended.
    waited_s: seconds that were spent waiting for the disk, after leaving also those for the rest.
    """

    def __init__(self, store: Store, advance: Callable[[int], None], ahead: int = AHEAD):
        self.store, self.advance = store, advance
        self.waited_s = 0.0
        self._batches: queue.Queue = queue.Queue(ahead)
        self._error: BaseException | None = None
        self._has_ended = False
        self._thread = threading.Thread(target=self._work, name=THREAD, daemon=True)

    def put(self, shard: int, arrays: dict[str, np.ndarray], is_last: bool, fp32_rows: Sequence[int] = ()) -> None:
        """Append rows to a shard, as ShardWriter.append does; `is_last`: it is whole with them.

        Waits while `ahead` batches are to be written.
        """
        self._raise()
        start = time.monotonic()
        self._batches.put((shard, arrays, is_last, fp32_rows))
        self.waited_s += time.monotonic() - start

    def __enter__(self) -> BackgroundWriter:
        self._thread.start()
        return self

    def __exit__(self, kind, *_) -> None:
        start = time.monotonic()
        self._batches.put(None)
        self._thread.join()
        self.waited_s += time.monotonic() - start
        if kind is None:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        """Write what comes, up to None; behind an error only take it, so that `put` never waits for ever."""
        try:
            n_threads = min(len(self.store.spec.array_names), os.cpu_count() or 1)
            with ThreadPoolExecutor(n_threads, thread_name_prefix="checksum") as pool:
                while batch := self._batches.get():
                    self._write_shard(batch, pool)
        except _EndedEarly:
            pass
        except BaseException as error:
            self._error = error
            while not self._has_ended and self._batches.get():
                pass

    def _write_shard(self, batch: tuple, pool: ThreadPoolExecutor) -> None:
        """Write the shard that begins with `batch`; raises _EndedEarly if the rest of it never comes."""
        shard, arrays, is_last, fp32_rows = batch
        with ShardWriter(self.store, shard, pool) as out:
            while True:
                out.append(arrays, fp32_rows)
                self.advance(len(next(iter(arrays.values()))))
                if is_last:
                    return
                batch = self._batches.get()
                if batch is None:
                    self._has_ended = True
                    raise _EndedEarly
                _, arrays, is_last, fp32_rows = batch


class _EndedEarly(Exception):
    """The context was left before a shard was whole."""
