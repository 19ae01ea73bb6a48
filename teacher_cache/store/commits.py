"""The records that say which shards of a store are finished, and the size and checksum of each of their files.

The checksum of a shard file is CRC-32 (zlib's), not CRC-32C: every chunk in it ends with its own CRC-32C, and a CRC taken on
over data and their CRC of the same kind does not depend on the data. It would be the same for any two shards of equal sizes.

While work goes on there is one small sealed record a finished shard, `commits/000123.json`, written last by rename. When all
are there they are folded (folding.py) into `shards.npy`, and `complete.json` names its SHA-256. There is no other list of shards:
a store has `commits/`, or `complete.json`, or has lost one of them.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import CacheCorruptError
from ..files.durable import read_npy, read_sealed, sha256_file
from ..format import layout
from ..format.spec import StoreSpec

FILE_DTYPE = np.dtype([("bytes", "<u8"), ("crc32", "<u4")])
"""One shard file: its length and the CRC-32 of all its bytes."""
NO_ROWS = np.zeros(0, "int64")


class Commits(NamedTuple):
    """Which shards of a store are finished, and their files."""

    files: np.ndarray
    """FILE_DTYPE [n_shards, n_arrays], in the order of StoreSpec.array_names; zeros for a shard that is not finished."""
    finished: np.ndarray
    """bool [n_shards]"""


def read_record(path: Path, spec: StoreSpec, has_fp32_rows: bool) -> tuple[int, np.ndarray, np.ndarray]:
    """The shard that a commit record declares finished, FILE_DTYPE [n_arrays] of its files, and int64 [n], its rows made in fp32.

    has_fp32_rows: whether the store's version has words for these.
    Raises CacheCorruptError for a record that is damaged, misnamed or not of a store like this.
    """
    try:
        record = read_sealed(path)
    except FileNotFoundError:
        raise CacheCorruptError(f"{path}: vanished while it was read.") from None
    shard, files = record.get("shard"), record.get("files")
    named = type(shard) is int and 0 <= shard < spec.n_shards and path == layout.record_path(path.parent.parent, shard)
    if not named or not isinstance(files, list) or len(files) != len(spec.array_names) or not all(map(_is_file, files)):
        raise CacheCorruptError(f"{path}: not a commit record of this store.")
    if not has_fp32_rows:
        rows = NO_ROWS
    else:
        rows = require_rows(path, record.get("fp32_rows"), spec.rows_of(shard), spec.shard_rows)
    return shard, np.array([tuple(file) for file in files], FILE_DTYPE), rows


def require_rows(path: Path, rows, of: range, most: int) -> np.ndarray:
    """int64 [n], the `fp32_rows` of a sealed file: ascending numbers of the rows `of`, or CacheCorruptError."""
    if not isinstance(rows, list) or len(rows) > most or not all(type(row) is int and row in of for row in rows):
        raise CacheCorruptError(f"{path}: fp32_rows must be rows of {of.start} to {of.stop - 1}, at most {most:,}.")
    if any(a >= b for a, b in itertools.pairwise(rows)):
        raise CacheCorruptError(f"{path}: fp32_rows must be ascending.")
    return np.array(rows, "int64")


def _is_file(pair) -> bool:
    """Whether `pair` is [bytes, CRC-32]."""
    is_pair = isinstance(pair, list) and len(pair) == 2 and all(type(number) is int for number in pair)
    return is_pair and 0 <= pair[0] < 2**63 and 0 <= pair[1] < 2**32


def read_table(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """shards.npy of the complete store in `path`, FILE_DTYPE [n_shards, n_arrays]; it has to be the one complete.json names."""
    complete, table = read_sealed(path / layout.COMPLETE_JSON), path / layout.SHARDS_NPY
    if not table.is_file() or sha256_file(table) != complete.get("shards_sha256"):
        raise CacheCorruptError(f"{table}: not the table that complete.json names.")
    return read_npy(table, FILE_DTYPE, shape)
