"""Whether the disk has the bytes that are to be written."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import NoSpaceError, UsageError
from ..words import human


def free_bytes(path: Path) -> int:
    """Free bytes on the disk that holds `path`, or will."""
    return shutil.disk_usage(existing_folder(path)).free


def existing_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there: on the same disk."""
    folder = Path(path).absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def require_space(path: Path, needed: int) -> None:
    """Raise NoSpaceError if `needed` bytes do not fit, UsageError where none ever will."""
    free = free_bytes(path)
    if free == 0 and shutil.disk_usage(existing_folder(path)).total == 0:
        raise UsageError(f"{path} is on a file system that keeps no files ({existing_folder(path)}). Give a folder on a disk.")
    if needed > free:
        raise NoSpaceError(
            f"{human(needed)} are needed on the disk of {path}, {human(free)} are free: {human(needed - free)} short. "
            "Make room, or store less: fewer --views, --layers last, --dtype int4, --tokens visible:K."
        )


@contextmanager
def full_disk_explained(path: Path, what_is_kept: Callable[[], str]) -> Iterator[None]:
    """Turn a disk or quota that fills up in the block into a NoSpaceError that says what is kept."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(f"The disk of {path} is full. {what_is_kept()}") from error
        raise
