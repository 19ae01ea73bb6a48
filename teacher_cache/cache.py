"""A cache folder: which images, which plan, which views. Opening one reads small files only and imports no torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from .crops import CROP_DTYPE, CROP_FORMATS, CropPlan
from .durable import canonical_json, npy_bytes, read_npy, read_sealed, seal, sha256_file, write_whole
from .errors import BadInputError, CacheCorruptError, MismatchError, NotInCacheError
from .images import ImageList
from .spec import FORMAT_VERSION, from_json
from .store import Manifest, store_file_name


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
            "format_version": FORMAT_VERSION, "plan": self.plan.to_json(), "crop_format": self.crop_format,
            "names_sha256": self.names_sha256, "labels_sha256": self.labels_sha256, "classes": list(self.classes),
            "n_images": self.n_images,
        }  # fmt: skip

    @property
    def crops_id(self) -> str:
        """64 hex digits that name these crops; every store carries them."""
        return hashlib.sha256(canonical_json(self.to_json())).hexdigest()


def differences(before: dict, now: dict, where: str) -> list[str]:
    """What differs between two `CropsIdentity.to_json()`, a readable line each: `crop plan seed: 0 in the cache, 1 given`."""

    def flat(value: dict) -> dict:
        return {**value, "plan": None, **{f"crop plan {key}": item for key, item in value["plan"].items()}}

    before, now = flat(before), flat(now)
    return [f"{key}: {before[key]} {where}, {now.get(key)} given" for key in before if before[key] != now.get(key)]


def view_path(cache_dir: Path, number: int) -> Path:
    return cache_dir / f"view-{number:03d}"


class View:
    """One complete pass over the images: a crop an image, and the stores of any number of teachers."""

    def __init__(self, cache: Cache, number: int):
        self.cache, self.number = cache, number
        self.path = view_path(cache.path, number)

    @property
    def is_cropped(self) -> bool:
        return (self.path / "checksums.json").exists()

    @cached_property
    def crops_sha256(self) -> str:
        """Of crops.npy, which holds the CRC-32C of every encoded crop: it names the pixels of this view."""
        return read_sealed(self.path / "checksums.json")["files"]["crops.npy"]

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
        """CROP_DTYPE [n_images]: box, flip, jitter and checksums of every crop."""
        return read_npy(self.path / "crops.npy", CROP_DTYPE)

    def store_path(self, name: str) -> Path:
        return self.path / f"{store_file_name(name)}.zarr"

    def store_names(self) -> list[str]:
        """Teachers that have at least a begun store in this view."""
        return sorted(path.name.removesuffix(".zarr") for path in self.path.glob("*.zarr") if (path / "store.json").exists())


class Cache:
    """An existing cache folder.

    Raises BadInputError if there is no cache at `path`, CacheCorruptError if its identity does not check out.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            value = read_sealed(self.path / "cache.json")
        except (FileNotFoundError, NotADirectoryError):
            begun = (self.path / "crops.partial").exists()
            unfinished = "its crop stage was not finished; run the same teacher-cache command again"
            raise BadInputError(f"{self.path} is no cache: {unfinished if begun else 'it has no cache.json'}.") from None
        if value.get("format_version") != FORMAT_VERSION:
            raise BadInputError(
                f"{self.path} has format version {value.get('format_version')}; this program reads version {FORMAT_VERSION}. "
                "Use the version of teacher-cache that wrote it."
            )
        try:
            plan = from_json(CropPlan, value["plan"])
            self.identity = CropsIdentity(plan, value["crop_format"], value["names_sha256"], value["labels_sha256"],
                                          tuple(value["classes"]), int(value["n_images"]))  # fmt: skip
            self.n_skipped = int(value["n_skipped"])
            self.files = dict(value["files"])
            if self.identity.crops_id != value["crops_id"] or self.identity.crop_format not in CROP_FORMATS:
                raise ValueError("its identity does not fit its content")
        except (KeyError, TypeError, ValueError) as error:
            raise CacheCorruptError(f"{self.path / 'cache.json'}: {error!r}.") from error

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
        numbers = (path.name.removeprefix("view-") for path in self.path.glob("view-*") if path.is_dir())
        views = [View(self, int(number)) for number in sorted(numbers) if number.isdecimal()]
        return [view for view in views if view.is_cropped]

    def finished_view(self, number: int) -> View:
        """View `number`, or NotInCacheError saying which there are."""
        view = View(self, number)
        if not view.is_cropped:
            present = [v.number for v in self.views()]
            raise NotInCacheError(f"{self.path} has no view {number}; it has {present or 'none'}.")
        return view

    def images(self) -> ImageList:
        """Names and labels of the rows, checked against the identity."""
        names = tuple((self.path / "images.txt").read_bytes().decode().split("\n")[:-1])
        labels = read_npy(self.path / "labels.npy", "int64")
        images = ImageList(names, labels, self.identity.classes)
        if CropsIdentity.of(images, self.plan, self.identity.crop_format) != self.identity:
            raise CacheCorruptError(f"{self.path}: images.txt or labels.npy is not the one this cache was made with.")
        return images

    def require_same(self, identity: CropsIdentity) -> None:
        """Raise MismatchError naming every difference if the crops asked for are not the crops that are here."""
        differing = differences(self.identity.to_json(), identity.to_json(), "in the cache")
        if differing:
            raise MismatchError(
                f"{self.path} holds other crops than those asked for:\n  " + "\n  ".join(differing) +
                "\nGive the parameters it was made with, or another folder."
            )  # fmt: skip


def write_cache(path: Path, images: ImageList, plan: CropPlan, crop_format: str, skipped: list[str]) -> None:
    """Publish the identity of a new cache: the lists first, cache.json last."""
    files = {
        "images.txt": "".join(f"{name}\n" for name in images.names).encode(),
        "labels.npy": npy_bytes(images.labels),
        "skipped.txt": "".join(f"{line}\n" for line in skipped).encode(),
    }
    for name, data in files.items():
        write_whole(path / name, data)
    identity = CropsIdentity.of(images, plan, crop_format)
    hashes = {name: sha256_file(path / name) for name in files}
    value = {**identity.to_json(), "crops_id": identity.crops_id, "n_skipped": len(skipped), "files": hashes}
    write_whole(path / "cache.json", seal(value))
