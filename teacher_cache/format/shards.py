"""What stands in a shard file of a store; where it lies, layout.py says.

A shard file is zarr v3's, with a header of ours before the first row, which zarr's readers step over because they follow the
index. The header says which shard of which array of which store the file is, so that files that changed places are noticed when
one is opened, and not only by `verify`.

    header    64 bytes, HEADER_DTYPE
    rows      one inner chunk a row, back to back: the encoded row, then its CRC-32C
    index     shard_rows x (uint64 offset, uint64 bytes); EMPTY_SLOT twice where there is no row
    4 bytes   CRC-32C of the index
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ..errors import CacheCorruptError
from ..files.durable import crc32c

EMPTY_SLOT = 0xFFFFFFFFFFFFFFFF
CLOSED = 0xFFFFFFFFFFFFFFFF
"""Stands for a shard that is not open where its handle, an address or a file descriptor, is expected."""
MAGIC = b"TCSHARD1"
HEADER_DTYPE = np.dtype([("magic", "S8"), ("store", "u1", 32), ("array", "<u4"), ("shard", "<u8"), ("zero", "<u8"),
                         ("crc32c", "<u4")])  # fmt: skip
HEADER_BYTES = HEADER_DTYPE.itemsize
assert HEADER_BYTES == 64


def index_bytes(shard_rows: int) -> int:
    """Bytes of the index at the end of a shard file, its CRC-32C included."""
    return 16 * shard_rows + 4


def header(store_sha256: str, column: int, shard: int) -> bytes:
    """The 64 bytes a shard file begins with.

    store_sha256: of the store's zarr.json, which names it. column: place of the array in StoreSpec.array_names.
    """
    record = np.zeros((), HEADER_DTYPE)
    record["magic"], record["array"], record["shard"] = MAGIC, column, shard
    record["store"] = np.frombuffer(bytes.fromhex(store_sha256), "u1")
    record["crc32c"] = crc32c(record.tobytes()[:-4])
    return record.tobytes()


def header_fault(found: bytes, expected: bytes) -> str | None:
    """What is wrong with `found`, the first 64 bytes of a shard file that should begin with `expected`; None if nothing is."""
    if found == expected:
        return None
    if found[:8] != MAGIC or len(found) != HEADER_BYTES or crc32c(found[:-4]) != int.from_bytes(found[-4:], "little"):
        return "its header is damaged."
    there, here = (np.frombuffer(data, HEADER_DTYPE)[0] for data in (found, expected))
    if there["store"].tobytes() != here["store"].tobytes():
        return "is a shard of another store."
    if (there["array"], there["shard"]) == (here["array"], here["shard"]):
        return "its header has something in it that this version does not know."
    return f"is shard {there['shard']} of array {there['array']}, in the place of shard {here['shard']} of array {here['array']}."


def require_header(path: Path, found: bytes, expected: bytes) -> None:
    """Raise CacheCorruptError unless `found`, the first 64 bytes of the file `path`, are those it should begin with."""
    if fault := header_fault(found, expected):
        raise CacheCorruptError(f"{path}: {fault} Run teacher-cache verify on this cache.")


def open_shard(path: Path) -> int:
    """A descriptor for reading a shard file; a symlink is not followed (OSError), and a pipe does not make us wait."""
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
