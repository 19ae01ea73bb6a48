"""Labelled images for evaluation: a folder, cut in the middle, or the crops of a cache."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from student.modules.pixels import normalise
from teacher_cache.cache import Cache
from teacher_cache.crops.beton import CropReader
from teacher_cache.crops.cutting import cut, draw, load_image
from teacher_cache.crops.images import read_image, scan
from teacher_cache.errors import BadInputError, MismatchError
from teacher_cache.format.crop_plan import CropPlan
from teacher_cache.format.layout import CACHE_JSON

MOST_BYTES = 128 << 20
"""Of the pixels of a batch, as uint8: 256 images up to 418 px. A student takes four times as much of them, as float32."""


class LabelledImages:
    """Iterates (images float32 [B, 3, size, size], labels int64 [B]), normalised for the student; can be iterated again.

    path: a cache (view 0 is read) or a folder of class folders (short side resized, middle cut). batch_size: B at most; less
    where so many images would have more than MOST_BYTES of pixels.
    Raises BadInputError without labels, or if a cache's crops have another size.
    """

    def __init__(self, path: Path, size: int, batch_size: int = 256):
        self.path, self.size = Path(path), size
        self.batch_size = max(1, min(batch_size, MOST_BYTES // (3 * size**2)))
        if (self.path / CACHE_JSON).exists():
            self._crops = CropReader(Cache(self.path).finished_view(0).path)
            self.classes, self.labels = Cache(self.path).identity.classes, self._crops.labels
            if self._crops.size != size:
                raise BadInputError(f"The crops of {path} are {self._crops.size} px, the student takes {size} px. "
                                    "Give the image folder instead, or a cache of that size.")  # fmt: skip
        else:
            self._crops = None
            self.images = scan(self.path).images
            self.classes, self.labels = self.images.classes, self.images.labels
        if not self.classes:
            raise BadInputError(f"{path} has no classes, and evaluation needs labels. Give a folder of class folders.")
        self._rows = np.arange(len(self.labels))

    def __len__(self) -> int:
        return len(self.labels)

    def only(self, classes: tuple[str, ...]) -> None:
        """From now on have the images of `classes` alone, with labels that count through these.

        Raises MismatchError for classes that are not there.
        """
        if missing := sorted(set(classes) - set(self.classes)):
            raise MismatchError(
                f"{self.path} lacks {len(missing)} of the {len(classes)} classes that are asked for: {', '.join(missing[:5])}"
                f"{' ...' * (len(missing) > 5)}. Classes are compared by the names of their folders."
            )
        label_of = {self.classes.index(name): label for label, name in enumerate(classes)}
        kept = np.array([i for i, label in enumerate(self.labels) if int(label) in label_of], dtype="int64")
        self._rows, self.classes = self._rows[kept], tuple(classes)
        self.labels = np.array([label_of[int(self.labels[i])] for i in kept], dtype="int64")

    def pixels(self) -> Iterator[np.ndarray]:
        """uint8 [B, size, size, 3], in the order of `labels`."""
        for start in range(0, len(self), self.batch_size):
            rows = self._rows[start : start + self.batch_size]
            yield self._crops.read(rows) if self._crops is not None else self._cut(rows)

    def _cut(self, rows: np.ndarray) -> np.ndarray:
        plan = CropPlan.center(self.size)

        def one(row: int) -> np.ndarray:
            name = self.images.names[row]
            image = load_image(read_image(self.path, name), name)
            return np.asarray(cut(plan, image, draw(plan, name, 0, image.height, image.width)))

        with ThreadPoolExecutor() as pool:
            return np.stack(list(pool.map(one, rows)))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start, pixels in zip(range(0, len(self), self.batch_size), self.pixels(), strict=True):
            labels = self.labels[start : start + len(pixels)]
            yield normalise(torch.from_numpy(pixels)), torch.from_numpy(np.array(labels))
