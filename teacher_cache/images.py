"""An image folder, read as torchvision's ImageFolder reads it, in one fixed seeded order.

Class folders with images below them, or a flat folder without labels. Row i of every file of a cache is the i-th name of
this order, so any contiguous range of rows is a random sample of the classes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import BadInputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


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


def _files(folder: Path, prefix: str) -> tuple[list[str], int]:
    """Image names below `folder`, in ImageFolder's order, and how many other files stand there."""
    names, n_other = [], 0
    for root, _, files in sorted(os.walk(folder, onerror=_refuse, followlinks=True)):
        inner = Path(root).relative_to(folder).as_posix()
        for file in sorted(files):
            name = "/".join(part for part in (prefix, "" if inner == "." else inner, file) if part)
            if file.lower().endswith(EXTENSIONS):
                names.append(name)
            else:
                n_other += 1
    return names, n_other


def _refuse(error: OSError) -> None:
    """os.walk would leave out a folder that it may not read."""
    raise BadInputError(f"--images: the folder {error.filename!r} cannot be read ({error.strerror}).") from error


def scan(folder: Path) -> tuple[ImageList, int]:
    """List the images of `folder`; also returns the number of files ignored because they are no images by name.

    Raises BadInputError for a missing or empty folder, a class without images, and names that no text file can hold.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInputError(f"--images {folder}: no such folder. Give a folder of class folders, or of images.")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    top_level = sorted(entry.name for entry in os.scandir(folder) if not entry.is_dir())
    flat = [name for name in top_level if name.lower().endswith(EXTENSIONS)]
    if not classes:
        names, labels, n_other = flat, np.full(len(flat), -1), len(top_level) - len(flat)
    else:
        if flat:
            raise BadInputError(
                f"--images {folder}: both class folders ({len(classes)}) and images ({len(flat)}, e.g. {flat[0]!r}) stand at "
                "the top level. Move the images into a class folder, or give a folder that has only one kind."
            )
        names, labels, n_other = [], [], len(top_level)
        for label, class_name in enumerate(classes):
            found, n = _files(folder / class_name, class_name)
            if not found:
                raise BadInputError(
                    f"--images {folder}: the class folder {class_name!r} holds no images ({', '.join(EXTENSIONS)}). "
                    "Remove it or fill it; its label would be learned from nothing."
                )
            names += found
            labels += [label] * len(found)
            n_other += n
        labels = np.array(labels)
    if not names:
        raise BadInputError(f"--images {folder}: no images found ({', '.join(EXTENSIONS)}).")
    for name in names:
        if "\n" in name or "\r" in name or not _is_utf8(name):
            raise BadInputError(f"--images {folder}: the file name {name!r} cannot be kept in a text file. Rename it.")
    return ImageList(tuple(names), labels.astype("int64"), tuple(classes)), n_other


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
