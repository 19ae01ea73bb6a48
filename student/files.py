"""Files of a run: whole or absent after a crash at any moment, and never read or written outside their folder."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import RunError

PARTIAL = ".partial"
"""Suffix of a file that is still being written. Nothing reads one; the next writer replaces it."""
LARGEST_JSON = 1 << 20
"""Bytes of config.json, or of the description in a checkpoint; more than that is not ours and not read."""


def make_folder(path: Path) -> None:
    """Create a folder with its parents, so that it is still there after a power cut."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make new names and renames inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def aside(path: Path) -> Path:
    """Where to write what `publish` will call `path`; nothing is there, not even a link."""
    partial = path.with_name(path.name + PARTIAL)
    partial.unlink(missing_ok=True)
    return partial


def publish(path: Path) -> None:
    """Give what was written to `aside(path)` its name; it survives a power cut from then on."""
    partial = path.with_name(path.name + PARTIAL)
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Write or replace a small file in one go."""
    with open(aside(path), "xb") as file:
        file.write(data)
    publish(path)


def require_own(path: Path) -> None:
    """Raise RunError if `path` is a link that leads out of its folder, or a device, a pipe and such. Nothing at all is fine."""
    if path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
        raise RunError(f"{path} is a link to {path.resolve()}, outside the folder of the run. Put there what it leads to.")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise RunError(f"{path} is neither a file nor a folder. Remove it.")
