"""How what is wanted of a row lies in memory: a record, all wanted arrays of all stores back to back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from teacher_cache.format.spec import NOT_BY_TOKEN
from teacher_cache.store.reader import StoreReader

ALIGN = 16
"""Bytes; fields of a record start at multiples of this."""


@dataclass(frozen=True)
class Field:
    """One array within the record of a row: a record is all wanted arrays of all stores, back to back."""

    store: int
    """Number of its store among those that are read, from 0."""
    array: str
    offset: int
    """Bytes from the start of the record; a multiple of ALIGN."""
    n_bytes: int
    n_tokens: int | None = None
    """C + K, where only CLS and K patches of a row are wanted; None: all of it."""


def record_layout(stores: list[StoreReader], arrays: list[list[str]], kept: Sequence[int]) -> tuple[list[Field], int]:
    """Where each array lies in a record, and the bytes of a record; arguments as of JoinedLoader."""
    fields, offset = [], 0
    for number, (store, wanted, n_patches) in enumerate(zip(stores, arrays, kept, strict=True)):
        for array in wanted:
            n_tokens = n_patches + int(store.teacher.has_cls) if n_patches and array not in NOT_BY_TOKEN else None
            n_bytes = store.spec.row_bytes(array, store.teacher, n_tokens)
            fields.append(Field(number, array, offset, n_bytes, n_tokens))
            offset += -(-n_bytes // ALIGN) * ALIGN
    return fields, offset
