"""An image folder, read as torchvision's ImageFolder reads it, in one fixed seeded order.

Class folders with images below them, or a flat folder without labels. Row i of every file of a cache is the i-th name of
this order, so any contiguous range of rows is a random sample of the classes.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import BadInputError, UsageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
MAX_BYTES = 1 << 30
"""Larger files are no images that Pillow would decode, and would fill the memory."""


@dataclass(frozen=True)
class ImageList:
    """Names (relative to the folder, `/` between parts), labels and classes of a set of images."""

    names: tuple[str, ...]
    labels: np.ndarray
    """int64 [n_images]; index into `classes`, or -1 everywhere for a flat folder."""
    classes: tuple[str, ...]

    def permuted(self, seed: int) -> ImageList:
        """The same images in the order of raw Philox draws: a function of (seed, number of images) alone."""
        draws = np.random.Philox(key=np.array([seed, 0x6F72646572], "uint64")).random_raw(len(self.names))
        order = np.argsort(draws, kind="stable")
        return ImageList(tuple(self.names[i] for i in order), self.labels[order], self.classes)


def scan(folder: Path) -> tuple[ImageList, list[str]]:
    """List the images of `folder`; also returns the names of the files that are ignored because they are no images by name.

    Whatever is called an image is listed, be it a link to nowhere or a pipe, so that the crop stage names it with all others
    that cannot be decoded. Raises UsageError if there is no such folder or no image in it; BadInputError for a class without
    images, a folder that cannot be read or that contains itself, a broken link that may have been a folder, and names that no
    text file can hold.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"--images {folder}: no such folder. Give a folder of class folders, or of images.")
    classes, top_level = _listed(folder)
    flat = [name for name in top_level if _is_image_name(name)]
    ignored = [name for name in top_level if not _is_image_name(name)]
    if not classes:
        names, labels = flat, np.full(len(flat), -1)
    else:
        if flat:
            raise BadInputError(
                f"--images {folder}: both class folders ({len(classes)}) and images ({len(flat)}, e.g. {flat[0]!r}) stand at "
                "the top level. Move the images into a class folder, or give a folder that has only one kind."
            )
        names, labels = [], []
        for label, class_name in enumerate(classes):
            files = _files_below(folder, class_name)
            found = [name for name in files if _is_image_name(name)]
            if not found:
                raise BadInputError(
                    f"--images {folder}: the class folder {class_name!r} holds no images ({', '.join(EXTENSIONS)}). "
                    "Remove it or fill it; its label would be learned from nothing."
                )
            names += found
            labels += [label] * len(found)
            ignored += [name for name in files if not _is_image_name(name)]
        labels = np.array(labels)
    if not names:
        raise UsageError(f"--images {folder}: no images found ({', '.join(EXTENSIONS)}). Give the folder that has them.")
    if odd := [name for name in names if not _fits_a_line(name)]:
        others = f" and {len(odd) - 1} others" if len(odd) > 1 else ""
        raise BadInputError(f"--images {folder}: the file name {odd[0]!r}{others} cannot be kept in a text file. Rename it.")
    return ImageList(tuple(names), labels.astype("int64"), tuple(classes)), ignored


def read_image(folder: Path, name: str) -> bytes:
    """The bytes of an image file, or BadInputError with its name and the reason. Never waits for a pipe or reads a device."""
    try:
        with open(folder / name, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadInputError(f"{name}: is a pipe or a device, not a file")
            if status.st_size > MAX_BYTES:
                raise BadInputError(f"{name}: has {status.st_size:,} bytes; files over {MAX_BYTES:,} are not read")
            return file.read()
    except OSError as error:
        is_broken_link = error.errno == errno.ENOENT and (folder / name).is_symlink()
        raise BadInputError(f"{name}: {'is a link to nowhere' if is_broken_link else error.strerror}") from error


def _is_image_name(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _files_below(folder: Path, class_name: str) -> list[str]:
    """Names of all files of a class, relative to `folder`, in ImageFolder's order: by folder, then by name."""
    return [f"{inner}/{name}" for inner, files in sorted(_walk(folder, class_name, frozenset())) for name in files]


def _walk(folder: Path, inner: str, above: frozenset[tuple[int, int]]) -> list[tuple[str, list[str]]]:
    """(folder, sorted names of its files) of `inner` and of all folders below it; links are followed.

    above: device and inode of the folders that lead here; one that comes again is a link in a circle.
    """
    status = (folder / inner).stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise BadInputError(f"--images {folder}: the link {inner!r} leads to a folder that contains it. Remove it.")
    folders, files = _listed(folder / inner)
    found = []
    for name in folders:
        below = _walk(folder, f"{inner}/{name}", above | {here})
        found += below
        if _is_image_name(name) and not any(names for _, names in below):
            files.append(name)  # an empty folder that is called an image is one that cannot be decoded
    return [(inner, sorted(files)), *found]


def _listed(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in `folder`, each sorted. BadInputError if that cannot be told."""
    folders, files = [], []
    try:
        for entry in os.scandir(folder):
            (folders if _is_folder(entry) else files).append(entry.name)
            if entry.is_symlink() and not _is_image_name(entry.name) and not Path(entry).exists():
                raise BadInputError(
                    f"--images: the link {entry.path!r} leads nowhere; it may have been a folder. Remove or mend it."
                )
    except OSError as error:
        raise BadInputError(f"--images: the folder {str(folder)!r} cannot be read ({error.strerror}).") from error
    return sorted(folders), sorted(files)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, or to where one may not look
        return False


def _fits_a_line(name: str) -> bool:
    """Whether a name can be a line of images.txt: UTF-8, and no line break."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return "\n" not in name and "\r" not in name
