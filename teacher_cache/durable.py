"""Small files that are either whole or absent, and JSON that notices a changed bit.

Every file of a cache that is not written row by row goes through `write_whole`: aside, fsync, rename, fsync of the folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path

import google_crc32c
import numpy as np

from .errors import CacheCorruptError

ASIDE = ".partial"
"""Suffix of a file or folder that is still being written. Nothing reads one; a new writer replaces it."""


def crc32c(data, previous: int = 0) -> int:
    """CRC-32C (Castagnoli) of bytes-like `data`, continued from `previous`."""
    return google_crc32c.extend(previous, bytes(data) if isinstance(data, memoryview) else data)


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(path: Path) -> None:
    """Make renames and new names inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Write `path` so that a crash at any moment leaves the old file, the new one or none, never a part."""
    path = Path(path)
    aside = path.with_name(path.name + ASIDE)
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_folder(path.parent)


def npy_bytes(array: np.ndarray) -> bytes:
    """The .npy file of `array`; object arrays (pickles) are refused."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def read_npy(path: Path, dtype=None) -> np.ndarray:
    """Load a .npy that `npy_bytes` wrote; a foreign dtype or a damaged file raises CacheCorruptError."""
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # a damaged header is parsed as Python text, and numpy lets nearly anything through
        raise CacheCorruptError(f"{path}: not a readable .npy file ({error}).") from error
    if dtype is not None and array.dtype != dtype:
        raise CacheCorruptError(f"{path}: expected dtype {np.dtype(dtype)}, found {array.dtype}.")
    return array


def canonical_json(value) -> bytes:
    """One spelling for one value, so that hashes of JSON mean something."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def seal(value: dict) -> bytes:
    """The bytes of a JSON file that carries the CRC-32C of its own content."""
    return canonical_json({**value, "crc32c": crc32c(canonical_json(value))})


def read_sealed(path: Path) -> dict:
    """Read what `seal` wrote. Any changed bit, cut or foreign file raises CacheCorruptError; a missing one
    FileNotFoundError."""
    data = Path(path).read_bytes()
    try:
        value = json.loads(data)
        claimed = value.pop("crc32c")
        intact = crc32c(canonical_json(value)) == claimed and data == seal(value)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise CacheCorruptError(f"{path}: its own checksum does not fit; the file was damaged or edited by hand.")
    return value
