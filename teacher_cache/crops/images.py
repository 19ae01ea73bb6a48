"""An image folder, read as torchvision's ImageFolder reads it, in one fixed seeded order.

Class folders with images below them, or a flat folder without labels. Row i of every file of a cache is the i-th name of
this order, so any contiguous range of rows is a random sample of the classes. Unlike ImageFolder, hidden files and the folders of
file systems and file managers are left out: none of them is a class, and what lies in them is not meant.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import BadInputError, UsageError
from ..words import quoted
from .not_images import what_it_is

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
MAX_BYTES = 1 << 30
"""Larger files are no images that Pillow would decode, and would fill the memory."""

SYSTEM_FOLDERS = {"lost+found", "__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information"}
"""In small letters: what file systems, archives of macOS, network drives and Windows put beside the images."""


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


class Scanned(NamedTuple):
    """What is in a folder of images."""

    images: ImageList
    ignored: list[str]
    """Files that are no images by name."""
    left_out: list[str]
    """Hidden files that are called images, and hidden folders and those of systems, whatever is in them: see is_left_out."""


def is_left_out(name: str) -> bool:
    """Whether a file or folder of this name is hidden (`._1.jpg`, `.ipynb_checkpoints`) or a system's (`lost+found`)."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def lies_in_left_out(name: str) -> bool:
    """Whether an image, by its name relative to the folder, is left out, or a folder on the way to it is."""
    return any(map(is_left_out, name.split("/")))


def scan(folder: Path, everything: bool = False) -> Scanned:
    """List the images of `folder`. everything: as caches were made before anything was left out.

    Whatever is called an image is listed, be it a link to nowhere or a pipe, so that the crop stage names it with all others
    that cannot be decoded. Raises UsageError if there is no such folder or no image in it; BadInputError for a class without
    images, a folder that cannot be read or that contains itself, a broken link that may have been a folder, and names that no
    text file can hold.
    """
    folder = Path(folder)
    require_folder(folder)
    left_out: list[str] | None = None if everything else []
    classes, top_level = _listed(folder, left_out)
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
            files = _files_below(folder, class_name, left_out)
            found = [name for name in files if _is_image_name(name)]
            if not found:
                raise BadInputError(
                    f"--images {folder}: the class folder {class_name!r} holds no images ({', '.join(EXTENSIONS)}). "
                    + (what_it_is(folder, files) or "Remove it or fill it; its label would be learned from nothing.")
                )
            names += found
            labels += [label] * len(found)
            ignored += [name for name in files if not _is_image_name(name)]
        labels = np.array(labels)
    left_out = left_out or []
    if not names:
        but = f" {in_one_line(left_out)}" if left_out else ""
        raise UsageError(
            f"--images {folder}: no images found ({', '.join(EXTENSIONS)}).{but} "
            + (what_it_is(folder, ignored) or "Give the folder that has them.")
        )
    if odd := [name for name in names if not _fits_a_line(name)]:
        others = f" and {len(odd) - 1} others" if len(odd) > 1 else ""
        raise BadInputError(f"--images {folder}: the file name {odd[0]!r}{others} cannot be kept in a text file. Rename it.")
    return Scanned(ImageList(tuple(names), labels.astype("int64"), tuple(classes)), ignored, left_out)


def require_folder(folder: Path) -> None:
    """Raise UsageError that says what is there instead, and what to do with it, unless `folder` is one."""
    if not folder.is_dir():
        instead = what_it_is(folder) if folder.exists() else None
        if instead and _is_image_name(folder.name):
            instead = f"is one image. Give the folder that it lies in: {quoted(folder.parent)}"
        raise UsageError(f"--images {folder}: {instead or 'no such folder. Give a folder of class folders, or of images.'}")


def in_one_line(left_out: Iterable[str], most: int = 5) -> str:
    """What was left out, as a sentence with names."""
    names = sorted(left_out)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"Hidden files and system folders are left out: {', '.join(map(repr, names[:most]))}{more}."


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


def _files_below(folder: Path, class_name: str, left_out: list[str] | None) -> list[str]:
    """Names of all files of a class, relative to `folder`, in ImageFolder's order: by folder, then by name."""
    return [f"{inner}/{name}" for inner, files in sorted(_walk(folder, class_name, frozenset(), left_out)) for name in files]


def _walk(folder: Path, inner: str, above: frozenset[tuple[int, int]], left_out: list[str] | None) -> list[tuple[str, list[str]]]:
    """(folder, sorted names of its files) of `inner` and of all folders below it; links are followed.

    left_out: as for _listed. above: device and inode of the folders that lead here; one that comes again is a link in a circle.
    """
    status = (folder / inner).stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise BadInputError(f"--images {folder}: the link {inner!r} leads to a folder that contains it. Remove it.")
    folders, files = _listed(folder, left_out, inner)
    found = []
    for name in folders:
        below = _walk(folder, f"{inner}/{name}", above | {here}, left_out)
        found += below
        if _is_image_name(name) and not any(names for _, names in below):
            files.append(name)  # an empty folder that is called an image is one that cannot be decoded
    return [(inner, sorted(files)), *found]


def _listed(top: Path, left_out: list[str] | None, inner: str = "") -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in the folder `inner` of `top`, each sorted. BadInputError if that cannot be known.

    left_out: takes the names, relative to `top`, of what is_left_out; None: nothing is.
    """
    folder, folders, files = top / inner, [], []
    try:
        for entry in os.scandir(folder):
            is_folder = _is_folder(entry)
            if left_out is not None and is_left_out(entry.name) and (is_folder or _is_image_name(entry.name)):
                left_out.append(f"{inner}/{entry.name}" if inner else entry.name)
                continue
            (folders if is_folder else files).append(entry.name)
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
