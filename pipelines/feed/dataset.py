"""A torch Dataset over a cache, for those who keep their own trainer: the crops of one view, and what a teacher says of each.

What it reads it reads as the student's own source does, and it gives the same numbers. It gives up that source's speed: rows are
joined, dequantised and collated by DataLoader's workers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from student.batch import Needs
from student.modules.pixels import normalise
from teacher_cache.cache import Cache
from teacher_cache.crops.beton import CropReader
from teacher_cache.errors import NotInCacheError
from teacher_cache.store.manifest import extract_command
from teacher_cache.store.reader import StoreReader

from .cached_source import StoredTargets
from .operations import ReadTargets
from .record import record_layout

# C 1 with CLS else 0, N patches, D width, L layers; of a store of visible tokens K for N


class CachedDataset(Dataset):
    """Row i is the i-th image of the cache (`Cache.images`): a dict of tensors, as DataLoader collates it.

        crop        uint8 [3, H, W], RGB; with `normalised` float32, by ImageNet's mean and standard deviation
        tokens      float32 [L, C+N, D], whitened, of `layers` in their order; CLS first where there is one
        attention   float32 [N], of CLS in the last block or of a pooling head to the patches, mean over heads, 0..1; with
                    `attention`
        index       int64 [K], the patches whose tokens these are; only of a store that keeps visible tokens alone
        label, row  int64; a label is -1 where the images have no classes

    cache: opened, or its folder. teacher: name of the store; None takes the only one. layers: counted from the end, -1 is the
    teacher's last block. view: which pass over the images.
    check: when the CRC-32C of a row is compared: `never`, `first` (time in this process), `always`.

    For DataLoader's workers of any start method: each process opens its own files. Forked ones begin at once; others compile for
    some seconds first, once with persistent_workers. Where numba has no TBB (not x86-64) fork is no choice: take "spawn".
    A batch is fetched in one go (`__getitems__`). `labels` (int64 [len]) and `spec` (TeacherSpec) are there for samplers and
    heads. Raises NotInCacheError for a view, layer, attention or rows that are not there, MismatchError where crops decode to
    other pixels than the teacher saw, and what `View.targets` does; CacheCorruptError for damage, naming the row.
    """

    def __init__(self, cache: Cache | str | os.PathLike, teacher: str | None = None, layers: Sequence[int] = (-1,), *,
                 attention: bool = True, view: int = 0, normalised: bool = False, check: str = "first"):  # fmt: skip
        self.cache = cache if isinstance(cache, Cache) else Cache(cache)
        self.view, self.normalised, self.check = self.cache.finished_view(view), normalised, check
        self.needs = Needs(tuple(layers), attention)
        store = self.view.targets(teacher)
        self.name, self.spec = store.path.stem, store.teacher
        if not store.is_complete:
            command = extract_command(self.cache.path, self.name, store.manifest)
            raise NotInCacheError(f"{store.path} is not complete. Finish it: {command}")
        self.labels = self.cache.images().labels
        self._opened: tuple[int, _Rows] | None = None
        self[0]  # raises for what the store does not hold, and compiles what forked workers then have

    def __len__(self) -> int:
        return self.cache.n_images

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Tensor]]:
        """The items of `rows`, in that order; a negative row counts from the end. IndexError for one that is not there."""
        wanted = np.array([range(len(self))[row] for row in rows], "int64")
        if self._opened is None or self._opened[0] != os.getpid():  # a forked process must not read through its parent's files
            self._opened = os.getpid(), _Rows(self)
        batch = self._opened[1].read(wanted)
        return [{name: values[place] for name, values in batch.items()} for place in range(len(wanted))]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": None}


class _Rows:
    """The files of a dataset, opened in this process."""

    def __init__(self, dataset: CachedDataset):
        if get_worker_info() is not None:
            from teacher_cache.kernels.loops import use_threads

            use_threads(1)  # the workers are the threads
        self.normalised, self.labels = dataset.normalised, torch.from_numpy(dataset.labels)
        self.crops = CropReader(dataset.view.path)
        self.crops.require_same_decoder()
        store = StoreReader(dataset.view.store_path(dataset.name), check=dataset.check)
        self.stored = StoredTargets(store, dataset.name, dataset.needs, dataset.cache, torch.device("cpu"))
        self.fields, record_bytes = record_layout([store], [self.stored.arrays], (0,))
        self.records = ReadTargets(self.fields, record_bytes)
        self.records.open([store])

    def read(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Everything that an item has, with an axis of rows in front."""
        pixels = torch.from_numpy(self.crops.read(rows))
        targets = self.stored.targets(torch.from_numpy(self.records(rows, {})), self.fields, None)
        crop = normalise(pixels) if self.normalised else pixels.permute(0, 3, 1, 2).contiguous()
        batch = {"crop": crop, "tokens": targets.tokens, "label": self.labels[rows], "row": torch.from_numpy(rows)}
        optional = {"attention": targets.attention, "index": targets.index}
        return batch | {name: values for name, values in optional.items() if values is not None}
