"""A cache folder: which images, which plan, which views. Opening one reads small files only and imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from .crops.beton import CropReader, read_checksums
from .crops.images import ImageList
from .errors import BadInputError, CacheCorruptError, MismatchError, NotInCacheError, UnknownNameError, UsageError
from .files.durable import (
    canonical_json,
    inside,
    is_safe_name,
    is_sha256,
    listed_files,
    npy_bytes,
    read_npy,
    read_plain,
    read_sealed,
    seal,
    sha256_file,
    write_whole,
)
from .format import layout
from .format.crop_plan import CROP_FORMATS, CropPlan
from .format.crop_record import CROP_DTYPE
from .format.layout import LISTS, SPARE, store_file_name, store_folder, store_name, view_number, view_path
from .format.spec import CACHE_VERSIONS, MAX_ROWS, from_json
from .store.manifest import Manifest
from .store.reader import StoreReader
from .store.spare import BOTH_LOST, pack_members
from .store.store import Store
from .words import quoted


@dataclass(frozen=True)
class CropsIdentity:
    """What makes the crops of a cache what they are. Two caches with equal identity hold equal crops."""

    plan: CropPlan
    crop_format: str
    names_sha256: str
    labels_sha256: str
    classes: tuple[str, ...]
    n_images: int

    @classmethod
    def of(cls, images: ImageList, plan: CropPlan, crop_format: str) -> CropsIdentity:
        names = hashlib.sha256("".join(f"{name}\n" for name in images.names).encode()).hexdigest()  # of images.txt
        labels = hashlib.sha256(images.labels.astype("<i8").tobytes()).hexdigest()
        return cls(plan, crop_format, names, labels, images.classes, len(images.names))

    def to_json(self) -> dict:
        return {
            "format_version": self.plan.version, "plan": self.plan.to_json(), "crop_format": self.crop_format,
            "names_sha256": self.names_sha256, "labels_sha256": self.labels_sha256, "classes": list(self.classes),
            "n_images": self.n_images,
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: dict) -> CropsIdentity:
        """From cache.json, which has more members. Raises KeyError, TypeError, ValueError or CacheCorruptError."""
        of_lists = value["names_sha256"], value["labels_sha256"]
        classes, n_images = value["classes"], value["n_images"]
        if value["crop_format"] not in CROP_FORMATS or not all(map(is_sha256, of_lists)):
            raise ValueError(f"crop_format is one of {', '.join(CROP_FORMATS)}, sums are SHA-256")
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError("classes must be a list of names")
        if type(n_images) is not int or not 1 <= n_images <= MAX_ROWS:
            raise ValueError(f"n_images must be 1 to {MAX_ROWS}, not {n_images!r}")
        return cls(from_json(CropPlan, value["plan"]), value["crop_format"], *of_lists, tuple(classes), n_images)

    @property
    def crops_id(self) -> str:
        """64 hex digits that name these crops; every store carries them."""
        return hashlib.sha256(canonical_json(self.to_json())).hexdigest()


MAX_NAME = 4096
"""Bytes of an image's path, on average over a list."""


def identity_differences(before: dict, now: dict, where: str) -> list[str]:
    """What differs between two `CropsIdentity.to_json()`, a readable line each: `crop plan seed: 0 in the cache, 1 given`."""

    def flat(value: dict) -> dict:  # the version follows from the plan
        return {
            **value,
            "format_version": None,
            "plan": None,
            **{f"crop plan {key}": item for key, item in value["plan"].items()},
        }

    before, now = flat(before), flat(now)
    return [f"{key}: {before[key]} {where}, {now.get(key)} given" for key in before if before[key] != now.get(key)]


def _no_cache(path: Path) -> UsageError | CacheCorruptError:
    """What to raise for a folder without cache.json."""
    require_no_part(path)
    if (path / layout.WORK).exists():
        return UsageError(f"{path} is no cache: its crop stage was not finished; run the same teacher-cache command again.")
    if (path / SPARE).exists():
        return CacheCorruptError(f"{path} has lost its cache.json. Restore it with: teacher-cache crop --repair {quoted(path)}")
    if any(path.glob(f"{layout.VIEWS}/{layout.CHECKSUMS_JSON}")):
        return CacheCorruptError(f"{path} has lost its cache.json and {SPARE}, which had a copy. {BOTH_LOST['cache']}")
    return UsageError(
        f"{path} is no cache: it has no cache.json. Give the folder that teacher-cache crop or extract was given, or make a "
        f"cache there: teacher-cache extract --teacher NAME --images DIR {quoted(path)}"
    )


def require_no_part(path: Path) -> None:
    """Raise UsageError for a file or folder within a cache, naming that; it may have lost its cache.json."""
    for around in path.absolute().parents:
        if (around / layout.CACHE_JSON).exists() or (around / SPARE).exists() and any(around.glob(layout.VIEWS)):
            raise UsageError(f"{path} is a part of the cache {around}. Give the whole of it: {around}")


class View:
    """One complete pass over the images: a crop an image, and the stores of any number of teachers.

    Raises CacheCorruptError if its folder is a symlink that leads out of the cache.
    """

    def __init__(self, cache: Cache, number: int):
        self.cache, self.number = cache, number
        self.path = inside(cache.path, view_path(cache.path, number).name)

    @property
    def is_cropped(self) -> bool:
        return (self.path / layout.CHECKSUMS_JSON).exists()

    @cached_property
    def crops_sha256(self) -> str:
        """Of crops.npy, which holds the CRC-32C of every encoded crop: it names the pixels of this view."""
        return read_checksums(self.path)["files"][layout.CROPS_NPY]

    def require_own(self, manifest: Manifest) -> None:
        """Raise CacheCorruptError unless a store was made from the crops of this very view."""
        expected = (self.cache.crops_id, self.crops_sha256, self.number, self.cache.n_images)
        if (manifest.crops_id, manifest.crops_sha256, manifest.view, manifest.store.n_rows) != expected:
            raise CacheCorruptError(
                f"{self.path} has a store of {manifest.teacher.name} that was made from other crops than those beside it (view "
                f"{manifest.view} of crops {manifest.crops_id[:12]}, {manifest.store.n_rows:,} rows). Delete it and extract "
                "again."
            )

    def crops(self) -> np.ndarray:
        """CROP_DTYPE [n_images]: box, flip, jitter and checksums of every crop, as checksums.json vouches for them."""
        path = self.path / layout.CROPS_NPY
        with _nothing_missing():
            crops, found = read_npy(path, CROP_DTYPE, (self.cache.n_images,)), sha256_file(path)
        if found != self.crops_sha256:
            raise CacheCorruptError(f"{path}: not the file that checksums.json names.")
        return crops

    def store_path(self, name: str) -> Path:
        """Where the store `name` is, or would be. CacheCorruptError if it is a symlink that leads out of the cache."""
        return inside(self.cache.path, f"{self.path.name}/{store_folder(store_file_name(name))}")

    def store(self, name: str) -> Store:
        """The store `name`, opened. Raises as Store.open does."""
        return Store.open(self.store_path(name))

    def targets(self, name: str | None = None) -> StoreReader:
        """What the teacher of a store says of the crops of this view: `targets("clip-b16").tokens(rows, layer=-1)`.

        name: of a store; None takes the only one. Raises UsageError if there are several, UnknownNameError if there is no such
        one, NotInCacheError if there is none yet, CacheCorruptError if it does not belong to this view.
        """
        known, where = self.store_names(), f"View {self.number} of {self.cache.path}"
        if not known:
            command = f"teacher-cache extract --teacher NAME {quoted(self.cache.path)}"
            raise NotInCacheError(f"{where} has crops, but no targets yet. Make them: {command}")
        if name is None and len(known) > 1:
            raise UsageError(f"{where} has targets of {', '.join(known)}. Choose with --teacher.")
        chosen = known[0] if name is None else store_file_name(name)
        if chosen not in known:
            raise UnknownNameError(f"{where} has no targets of {name}; it has those of {', '.join(known)}.")
        reader = StoreReader(self.store_path(chosen))
        self.require_own(reader.manifest)
        return reader

    def pixels(self, rows: ArrayLike) -> np.ndarray:
        """The crops of `rows`, decoded: uint8 [len(rows), size, size, 3], RGB, in that order. Raises as CropReader.read."""
        return self._crop_reader.read(rows)

    @cached_property
    def _crop_reader(self) -> CropReader:
        return CropReader(self.path)

    def store_names(self) -> list[str]:
        """Teachers that have at least a begun store in this view."""
        return sorted(store_name(path.name) for path in self.path.glob(layout.STORES))


@contextmanager
def _nothing_missing() -> Iterator[None]:
    """Turn a missing file of a cache into CacheCorruptError."""
    try:
        yield
    except FileNotFoundError as error:
        raise CacheCorruptError(f"{error.filename}: is missing. Run teacher-cache crop with --repair.") from None


class Cache:
    """An existing cache folder.

    Raises UsageError if there is no cache at `path`, BadInputError if it has another format version, CacheCorruptError if its
    identity does not check out.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            value = read_sealed(self.path / layout.CACHE_JSON)
        except (FileNotFoundError, NotADirectoryError):
            raise _no_cache(self.path) from None
        version = value.get("format_version")
        if type(version) is not int or version not in CACHE_VERSIONS:
            raise BadInputError(
                f"{self.path} has format version {version}; this program reads versions "
                f"{' and '.join(map(str, CACHE_VERSIONS))}. Use the version of teacher-cache that wrote it."
            )
        self.files = listed_files(value, self.path / layout.CACHE_JSON)
        try:
            self.identity = CropsIdentity.from_json(value)
            self.n_skipped = value["n_skipped"]
            if version != self.identity.plan.version:
                raise ValueError(f"format_version is {version}, and its plan is one of version {self.identity.plan.version}")
            if value["crops_id"] != self.identity.crops_id:
                raise ValueError("its identity does not fit its content")
            if sorted(self.files) != LISTS or type(self.n_skipped) is not int:
                raise ValueError(f"it must list {', '.join(LISTS)} and count what was skipped")
        except (KeyError, TypeError, ValueError, CacheCorruptError) as error:
            raise CacheCorruptError(f"{self.path / layout.CACHE_JSON}: {error!r}.") from error

    @property
    def plan(self) -> CropPlan:
        return self.identity.plan

    @property
    def n_images(self) -> int:
        return self.identity.n_images

    @property
    def crops_id(self) -> str:
        return self.identity.crops_id

    def view(self, number: int) -> View:
        return View(self, number)

    def views(self) -> list[View]:
        """The finished views, in order of their numbers."""
        folders = [path for path in self.path.glob(layout.VIEWS) if path.is_dir()]
        return [view for view in self._views_of(folders) if view.is_cropped]

    def views_on_disk(self) -> list[View]:
        """Every view folder, in order, also one that has lost its checksums.json; none that is a link."""
        folders = [path for path in self.path.glob(layout.VIEWS) if path.is_dir() and not path.is_symlink()]
        return [view for view in self._views_of(folders) if view.path in folders]

    def _views_of(self, folders: Iterable[Path]) -> list[View]:
        numbers = (view_number(folder.name) for folder in folders)
        return [View(self, number) for number in sorted(number for number in numbers if number is not None)]

    def finished_view(self, number: int) -> View:
        """View `number`, or NotInCacheError saying which there are."""
        view = View(self, number)
        if not view.is_cropped:
            present = [v.number for v in self.views()]
            raise NotInCacheError(f"{self.path} has no view {number}; it has {present or 'none'}.")
        return view

    def images(self) -> ImageList:
        """Names and labels of the rows, checked against the identity. No name leads out of the folder of the images."""
        path = self.path / layout.IMAGES_TXT
        with _nothing_missing():
            data = read_plain(path, self.n_images * MAX_NAME)
            labels = read_npy(self.path / layout.LABELS_NPY, "int64", (self.n_images,))
        names = tuple(data.decode(errors="replace").split("\n")[:-1])  # what was replaced does not fit the identity
        images = ImageList(names, labels, self.identity.classes)
        if CropsIdentity.of(images, self.plan, self.identity.crop_format) != self.identity:
            raise CacheCorruptError(f"{self.path}: images.txt or labels.npy is not the one this cache was made with.")
        if not all(map(is_safe_name, names)):
            raise CacheCorruptError(f"{path}: {next(name for name in names if not is_safe_name(name))!r} is no name of an image.")
        return images

    def require_same(self, identity: CropsIdentity) -> None:
        """Raise MismatchError naming every difference if the crops asked for are not the crops that are here."""
        differing = identity_differences(self.identity.to_json(), identity.to_json(), "in the cache")
        if differing:
            raise MismatchError(
                f"{self.path} holds other crops than those asked for:\n  " + "\n  ".join(differing) +
                "\nGive the parameters it was made with, or another folder."
            )  # fmt: skip


def write_cache(path: Path, images: ImageList, plan: CropPlan, crop_format: str, skipped: list[str]) -> None:
    """Publish the identity of a new cache: the lists first, then their spare, cache.json last."""
    files = {
        layout.IMAGES_TXT: "".join(f"{name}\n" for name in images.names).encode(),
        layout.LABELS_NPY: npy_bytes(images.labels),
        layout.SKIPPED_TXT: "".join(f"{line}\n" for line in skipped).encode(),
    }
    identity = CropsIdentity.of(images, plan, crop_format)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    value = {**identity.to_json(), "crops_id": identity.crops_id, "n_skipped": len(skipped), "files": hashes}
    declaration = seal(value)
    for name, data in files.items():
        write_whole(path / name, data)
    write_whole(path / SPARE, pack_members({**files, layout.CACHE_JSON: declaration}))
    write_whole(path / layout.CACHE_JSON, declaration)
