"""Bytes of a store before it is written."""

from __future__ import annotations

from ..format.shards import HEADER_BYTES, index_bytes
from ..format.spec import StoreSpec, TeacherSpec


def shard_bytes(spec: StoreSpec, teacher: TeacherSpec, shard: int) -> int:
    """Bytes of all files of a shard if no codec saves anything: header, rows, CRC-32C of each, index."""
    n_rows, around = len(spec.rows_of(shard)), HEADER_BYTES + index_bytes(spec.shard_rows)
    return sum(around + n_rows * (spec.row_bytes(array, teacher) + 4) for array in spec.array_names)


def store_bytes(spec: StoreSpec, teacher: TeacherSpec) -> int:
    """Bytes of a finished store if no codec saves anything."""
    last = spec.n_shards - 1
    return shard_bytes(spec, teacher, 0) * last + shard_bytes(spec, teacher, last)
