"""Labelled images for evaluation: a folder, cut in the middle, or the crops of a cache; and images with masks of their pixels."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from student.modules.pixels import PIXEL_MEAN, PIXEL_STD, normalise
from teacher_cache.cache import Cache
from teacher_cache.crops.beton import CropReader
from teacher_cache.crops.cutting import cut, draw, load_image
from teacher_cache.crops.images import ImageList, read_image, scan
from teacher_cache.errors import BadInputError, MismatchError, UsageError
from teacher_cache.format.crop_plan import CropPlan
from teacher_cache.format.layout import CACHE_JSON

MOST_BYTES = 128 << 20
"""Of the pixels of a batch, as uint8: 256 images up to 418 px. A student takes four times as much of them, as float32."""


class LabelledImages:
    """Iterates (images float32 [B, 3, size, size], labels int64 [B]), normalised by `mean` and `std`; can be iterated again.

    path: a cache (view 0 is read) or a folder of class folders (short side resized, middle cut). batch_size: B at most; less
    where so many images would have more than MOST_BYTES of pixels. need_labels: whether a flat folder, whose labels are all -1,
    is refused.
    Raises BadInputError without labels, or if a cache's crops have another size.
    """

    def __init__(
        self,
        path: Path,
        size: int,
        batch_size: int = 256,
        mean: Sequence[float] = PIXEL_MEAN,
        std: Sequence[float] = PIXEL_STD,
        need_labels: bool = True,
    ):
        self.path, self.size, self.mean, self.std = Path(path), size, tuple(mean), tuple(std)
        self.batch_size = max(1, min(batch_size, MOST_BYTES // (3 * size**2)))
        if (self.path / CACHE_JSON).exists():
            cache = Cache(self.path)
            view = cache.finished_view(0)
            self._crops = CropReader(view.path)
            self.decoder = f"view 0 of crops {cache.crops_id[:12]}"
            self._source = view.crops_sha256
            self.classes, self.labels = cache.identity.classes, self._crops.labels
            if self._crops.size != size:
                raise BadInputError(f"The crops of {path} are {self._crops.size} px, the student takes {size} px. "
                                    "Give the image folder instead, or a cache of that size.")  # fmt: skip
        else:
            self._crops = None
            self.images = _scanned(self.path)
            self.decoder = _decoder(size)
            self.classes, self.labels = self.images.classes, self.images.labels
        if need_labels and not self.classes:
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

    def fingerprint(self) -> str:
        """SHA-256 over what these images are: names, sizes of files and labels, or a cache's crops. The same everywhere."""
        return _hashed(self._facts(lambda status: status.st_size))

    def state(self) -> str:
        """As `fingerprint`, and of a folder also when each file was changed: what features that are kept are valid for."""
        return _hashed(self._facts(lambda status: (status.st_size, status.st_mtime_ns)))

    def _facts(self, of) -> Iterator[object]:
        yield self.classes
        if self._crops is not None:
            yield self._source
            yield from zip(self._rows.tolist(), self.labels.tolist(), strict=True)
            return
        for row, label in zip(self._rows, self.labels.tolist(), strict=True):
            name = self.images.names[row]
            yield name, label, _told_of(self.path, name, of)

    def pixels(self) -> Iterator[np.ndarray]:
        """uint8 [B, size, size, 3], in the order of `labels`."""
        for start in range(0, len(self), self.batch_size):
            rows = self._rows[start : start + self.batch_size]
            if self._crops is not None:
                yield self._crops.read(rows)
            else:
                yield _middles(self.path, [self.images.names[row] for row in rows], self.size)

    def take(self, places: np.ndarray) -> None:
        """From now on have the images at these places of `labels` alone."""
        self._rows, self.labels = self._rows[places], self.labels[places]

    def part(self, number: int, of: int) -> LabelledImages:
        """Every `of`-th image, from number `number` on: the share of one of `of` processes."""
        share = copy.copy(self)
        share._rows, share.labels = self._rows[number::of], self.labels[number::of]
        return share

    def image(self, index: int) -> Image.Image:
        """The whole image at a place of `labels`, upright RGB. Raises BadInputError for a cache, whose crops are cut already."""
        if self._crops is not None:
            raise BadInputError(f"{self.path} is a cache, whose crops are cut already. Give the folder of its images.")
        name = self.images.names[self._rows[index]]
        return load_image(read_image(self.path, name), name)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start, pixels in zip(range(0, len(self), self.batch_size), self.pixels(), strict=True):
            labels = self.labels[start : start + len(pixels)]
            yield normalise(torch.from_numpy(pixels), self.mean, self.std), torch.from_numpy(np.array(labels))


class SegmentedImages:
    """Iterates (images float32 [B, 3, size, size], their places int64 [B]); `masks` has the classes of all pixels, 255 for none.

    path: a folder with `images/` and `masks/`, in which the files have equal names but for their ends. A mask is an image of one
    channel (grey or palette) whose values are the classes; image and mask are cut alike, the mask by its nearest pixels.
    Raises BadInputError where a folder is missing, a name has no partner, or a mask cannot be read as one.
    """

    def __init__(
        self,
        path: Path,
        size: int,
        batch_size: int = 64,
        mean: Sequence[float] = PIXEL_MEAN,
        std: Sequence[float] = PIXEL_STD,
    ):
        self.path, self.size, self.mean, self.std = Path(path), size, tuple(mean), tuple(std)
        self.batch_size = max(1, min(batch_size, MOST_BYTES // (4 * size**2)))
        self.decoder = _decoder(size)
        self._folders = [self.path / "images", self.path / "masks"]
        if missing := [folder.name for folder in self._folders if not folder.is_dir()]:
            raise BadInputError(f"{path} has no folder {missing[0]!r}. Give a folder with images/ and masks/, of equal names.")
        by_stem = [{_stem(name): name for name in _scanned(folder).names} for folder in self._folders]
        images, masks = by_stem
        if odd := sorted(images.keys() ^ masks.keys()):
            has, lacks = ("image", "mask") if odd[0] in images else ("mask", "image")
            raise BadInputError(
                f"{path}: the {has} {odd[0]!r} has no {lacks} of its name, and {len(odd) - 1:,} others have no partner either. "
                "Files in images/ and masks/ belong together by their names without the end."
            )
        self.names = tuple((images[stem], masks[stem]) for stem in sorted(images))

    def __len__(self) -> int:
        return len(self.names)

    def fingerprint(self) -> str:
        """As LabelledImages.fingerprint, of images and masks."""
        return _hashed(self._facts(lambda status: status.st_size))

    def state(self) -> str:
        """As LabelledImages.state, of the images."""
        return _hashed(self._facts(lambda status: (status.st_size, status.st_mtime_ns)))

    def _facts(self, of) -> Iterator[object]:
        for names in self.names:
            yield [(name, _told_of(folder, name, of)) for folder, name in zip(self._folders, names, strict=True)]

    def masks(self) -> Tensor:
        """uint8 [n, size, size], in the order of the names."""
        plan = CropPlan.center(self.size)

        def one(name: str) -> np.ndarray:
            return _cut_mask(plan, self._folders[1], name)

        with ThreadPoolExecutor() as pool:
            return torch.from_numpy(np.stack(list(pool.map(one, [mask for _, mask in self.names]))))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self), self.batch_size):
            names = [image for image, _ in self.names[start : start + self.batch_size]]
            pixels = _middles(self._folders[0], names, self.size)
            yield normalise(torch.from_numpy(pixels), self.mean, self.std), torch.arange(start, start + len(names))


def _cut_mask(plan: CropPlan, folder: Path, name: str) -> np.ndarray:
    read_image(folder, name)  # refuses pipes and the like by name
    try:
        with Image.open(folder / name) as mask:
            if mask.mode not in ("L", "P", "1"):
                raise BadInputError(f"{folder / name}: a mask has one channel of 8 bits, whose values are classes; this is "
                                    f"{mask.mode}. Save it as a grey or palette PNG.")  # fmt: skip
            resized = tuple(int(plan.resize * side / min(mask.size)) for side in mask.size)
            left, top = (round((side - plan.size) / 2) for side in resized)
            mask = mask.resize(resized, Image.Resampling.NEAREST)
            return np.asarray(mask.crop((left, top, left + plan.size, top + plan.size)), "uint8")
    except OSError as error:
        raise BadInputError(f"{folder / name}: cannot be read as a mask ({error}).") from error


def _scanned(folder: Path) -> ImageList:
    """The images of a folder; errors as `scan`, without its option's name."""
    try:
        return scan(folder).images
    except (BadInputError, UsageError) as error:
        raise type(error)(str(error).removeprefix("--images ")) from error


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _decoder(size: int) -> str:
    plan = CropPlan.center(size)
    return f"Pillow {PIL.__version__}, short side {plan.resize} {plan.resample}, middle {size}"


def _told_of(folder: Path, name: str, of) -> object:
    try:
        return of((folder / name).stat())
    except OSError:
        return None  # reading it says what is wrong with it


def _hashed(facts: Iterator[object]) -> str:
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(f"{fact!r}\n".encode())
    return digest.hexdigest()


def _middles(folder: Path, names: Sequence[str], size: int) -> np.ndarray:
    """uint8 [n, size, size, 3] of these images."""
    plan = CropPlan.center(size)

    def one(name: str) -> np.ndarray:
        image = load_image(read_image(folder, name), name)
        return np.asarray(cut(plan, image, draw(plan, name, 0, image.height, image.width)))

    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(one, names)))
