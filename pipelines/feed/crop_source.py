"""Batches of crops, without targets: the rows, views and micro-batches of a run, which all sources share."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from student.batch import Batch, Mask, Targets
from student.devices.distributed import local_processes
from student.devices.micro_batches import number_in_step
from student.modules.pixels import PIXELS, normalise
from teacher_cache.cache import Cache, View
from teacher_cache.crops.beton import CropReader, read_checksums
from teacher_cache.errors import CacheCorruptError, MismatchError, UsageError
from teacher_cache.store.reader import StoreReader

from .complete_views import complete_views
from .loader import JoinedLoader, RawBatch, Stretch, default_workers
from .order import Order

# B batch, N patches


class CropSource:
    """Crops without targets, in the order of the run; what cached and live sources share.

    rank, world: of `world` processes that share each step of `batch_size` rows, this one takes its own (number_in_step).
    accumulate: micro-batches of this process in a step.  n_views: that the run is begun with.  Else: student.batch.BatchSource.
    Raises UsageError for a cache with fewer rows than a step takes, NotInCacheError for one without the views or targets asked
    for.
    """

    pixels = PIXELS

    def __init__(self, cache: Cache, *, batch_size: int, accumulate: int = 1, seed: int = 0, device="cpu",
                 n_views: int | None = None, workers: int | None = None, store_names: Sequence[str] = (),
                 rank: int = 0, world: int = 1):  # fmt: skip
        self.cache, self.device, self.accumulate = cache, torch.device(device), accumulate
        self.store_names = tuple(store_names)
        self.rank, self.world = rank, world
        self.views = complete_views(cache, store_names, n_views)
        if cache.n_images < batch_size:
            raise UsageError(
                f"{cache.path} has {cache.n_images:,} rows, one step takes {batch_size:,}. "
                f"Set a smaller batch: --set batch_size={cache.n_images}, or cache more images."
            )
        # the same order for every store and for none, so that methods can be compared on equal batches
        self.order = Order(cache.n_images, batch_size, seed)
        self.steps_per_epoch = self.order.steps_per_epoch
        self._views_from = [(0, len(self.views))]
        """(completed steps, views from then on), in order."""
        self.identity = {
            "crops_id": cache.crops_id,
            "views": [view.crops_sha256 for view in self.views],
            "order": {"seed": seed, "block_rows": self.order.block_rows, "window_blocks": self.order.window_blocks},
        }
        self._workers = workers or max(1, default_workers() // local_processes())
        self._loader: JoinedLoader | None = None
        self._opened: dict[int, tuple[CropReader, list[StoreReader]]] = {}

    def _open(self, view: View) -> tuple[CropReader, list[StoreReader]]:
        crops, crops_id = CropReader(view.path), read_checksums(view.path)["crops_id"]
        if (crops_id, len(crops)) != (self.cache.crops_id, self.cache.n_images):
            raise CacheCorruptError(
                f"{view.path} holds {len(crops):,} crops of another cache ({crops_id[:12]}; this one is "
                f"{self.cache.crops_id[:12]} with {self.cache.n_images:,}). Delete the folder and make the view again."
            )
        if hashlib.sha256(crops.labels.astype("<i8").tobytes()).hexdigest() != self.cache.identity.labels_sha256:
            raise CacheCorruptError(f"{crops.path} has other labels than the cache. Run teacher-cache verify on this cache.")
        crops.require_same_decoder()
        self._labels = torch.from_numpy(crops.labels)
        return crops, []

    def _arrays(self) -> list[list[str]]:
        """The arrays that are read of each store."""
        return []

    def _kept(self) -> list[int]:
        """Of each store that is opened the patches of a row whose tokens are read, or 0 for all."""
        return []

    def _patches_of(self, first_step: int, micro_rows: np.ndarray, stores: list[StoreReader]) -> Callable | None:
        """`Stretch.patches_of` for micro-batches from step `first_step` on; None if all tokens are read."""
        return None

    def _targets(self, raw: RawBatch) -> tuple[Targets, ...]:
        return ()

    def _mask(self, raw: RawBatch) -> Mask | None:
        return None

    def views_of(self, n_views: int) -> list[str]:
        """The sha256 of the crops of the first views. Raises NotInCacheError unless all of them are whole, with their targets."""
        return [view.crops_sha256 for view in complete_views(self.cache, self.store_names, n_views)]

    def change_views(self, changes: Sequence[tuple[int, list[str]]]) -> None:
        """Epoch e reads view e mod V, and V is another from some steps on: (completed steps, sha256 of the views).

        Raises NotInCacheError for views that are not whole, MismatchError for others than the run has had.
        """
        self.views = complete_views(self.cache, self.store_names, max(len(self.views), *(len(names) for _, names in changes)))
        there = [view.crops_sha256 for view in self.views]
        for step, names in changes:
            odd = [number for number, name in enumerate(names) if there[number] != name]
            if odd:
                raise MismatchError(
                    f"View {odd[0]} of {self.cache.path} holds other crops than the run has from step {step + 1:,} on. Put back "
                    "the views that it was trained on, or start a new run in another directory."
                )
        self._views_from = [(0, len(self.identity["views"])), *((step, len(names)) for step, names in changes)]

    def _view(self, step: int) -> View:
        """What the step behind `step` completed ones reads."""
        n_views = [n for first, n in self._views_from if first <= step][-1]
        return self.views[step // self.steps_per_epoch % n_views]

    def rows_of(self, step: int) -> tuple[int, list[int]]:
        """Number of the view, and the rows in order, that the step behind `step` completed ones takes."""
        ((_, rows),) = self.order.steps(step, step + 1)
        return self._view(step).number, rows[0].tolist()

    def micro_batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """The batches of steps [first_step, last_step): `accumulate` each, on the device. Epoch e reads view e mod V."""
        stretches = self._stretches(first_step, last_step)
        for first in stretches:
            if self._loader is None:
                crops, stores = first.view
                self._loader = JoinedLoader(crops, stores, self._arrays(), first.rows.shape[1], self._workers,
                                            kept=self._kept(), device=self.device)  # fmt: skip
            for raw in self._loader.stream(itertools.chain([first], stretches)):
                yield self._batch(raw)

    def _stretches(self, first_step: int, last_step: int) -> Iterator[Stretch]:
        """The micro-batches of this process in steps [first_step, last_step), an epoch or less at a time.

        The first step comes alone: it need not wait until the rows of a whole epoch are in order.
        """
        changing = {step for step, _ in self._views_from if first_step < step < last_step}
        for begin, end in itertools.pairwise(sorted({first_step, min(first_step + 1, last_step), last_step} | changing)):
            step = begin
            for _, rows in self.order.steps(begin, end):
                view = self._view(step)
                if view.number not in self._opened:  # once a run: readers remember which rows they have checked
                    self._opened[view.number] = self._open(view)
                opened = self._opened[view.number]
                by_number = rows.reshape(len(rows), self.accumulate * self.world, -1)
                own = by_number[:, [number_in_step(index, self.rank, self.world) for index in range(self.accumulate)]]
                micro_rows = own.reshape(-1, own.shape[2])
                yield Stretch(micro_rows, opened, self._patches_of(step, micro_rows, opened[1]))
                step += len(rows)

    def _batch(self, raw: RawBatch) -> Batch:
        """Rows and labels stay on the CPU: no loss reads them, and copying them would make the host wait."""
        rows = torch.from_numpy(raw.rows)
        return Batch(normalise(raw.images), rows, self._labels[rows], self._targets(raw), self._mask(raw))
