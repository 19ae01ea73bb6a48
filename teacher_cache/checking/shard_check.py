"""What is wrong with one shard file: it is read once, from its header to its index, a row at a time.

Checked are the header, the index (every row has its slot, back to back, none beyond), the CRC-32C of every row and of the index,
the CRC-32 of the whole file, and that no row holds a number that is never written. Memory is bounded by a row.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import CacheCorruptError, NotAllowedError
from ..files.durable import crc32c, link_fault, not_allowed
from ..format.layout import shard_file
from ..format.shards import EMPTY_SLOT, HEADER_BYTES, header, header_fault, index_bytes, open_shard
from ..kernels.decompress import decompress
from ..store.manifest import Manifest
from ..store.store import Store

CRC32C_RESIDUE = 0x48674BC7
"""CRC-32C of any data followed by their own CRC-32C, little-endian."""
SUM_SLACK = 1e-3
"""What the rounding of a float32 softmax may add to an attention row, whose sum is at most 1."""


class ArrayCheck:
    """Checks the shard files of one array of a store.

    sample: rows to check; None is all of them, and with them the CRC-32 of whole files.
    """

    def __init__(self, store: Store, array: str, sample: np.ndarray | None = None):
        self.store, self.array, self.spec, self.sample = store, array, store.spec, sample
        self.n_dims = 1 + len(self.spec.row_shape(array, store.teacher))
        self.column = self.spec.array_names.index(array)
        self.codec = dict(self.spec.codecs)[array]
        self.row_bytes = self.spec.row_bytes(array, store.teacher)
        self._value_fault = _value_check(array, store.manifest)

    def path(self, shard: int) -> Path:
        return shard_file(self.store.path, self.array, shard, self.n_dims)

    def fault(self, shard: int, committed: np.void) -> str | None:
        """What is wrong with the file of a finished shard, a sentence without its path; None if nothing is.

        committed: its FILE_DTYPE record.
        """
        path = self.path(shard)
        try:
            with open(open_shard(path), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != committed["bytes"]:
                    return f"has {size} bytes, {committed['bytes']} were committed."
                return self._content_fault(file, size, shard, int(committed["crc32"]))
        except FileNotFoundError:
            return "is missing."
        except PermissionError as error:
            raise NotAllowedError(not_allowed(path)) from error
        except OSError as error:
            return link_fault(path) or f"cannot be read ({error.strerror or error})."

    def _content_fault(self, file, size: int, shard: int, crc32: int) -> str | None:
        tail = index_bytes(self.spec.shard_rows)
        if size < HEADER_BYTES + tail:
            return f"has {size} bytes, too few for its header and index."
        head = file.read(HEADER_BYTES)
        if wrong := header_fault(head, header(self.store.sha256, self.column, shard)):
            return wrong
        index = os.pread(file.fileno(), tail, size - tail)
        if crc32c(index) != CRC32C_RESIDUE:
            return "its index is damaged (CRC-32C)."
        rows = self.spec.rows_of(shard)
        slots = np.frombuffer(index, "<u8", 2 * self.spec.shard_rows).reshape(-1, 2)
        if not self._is_laid_out(slots, len(rows), size - tail):
            return "its index does not say that its rows lie back to back between header and index."
        if self.sample is not None:
            drawn = self.sample[(self.sample >= rows.start) & (self.sample < rows.stop)].tolist()
            places = [(row, *slots[row - rows.start].tolist()) for row in drawn]
            return self._rows_fault((row, os.pread(file.fileno(), length, start)) for row, start, length in places)

        crc = zlib.crc32(head)

        def chunks():
            nonlocal crc
            for row, length in zip(rows, slots[:, 1].tolist(), strict=False):
                chunk = file.read(length)
                crc = zlib.crc32(chunk, crc)
                yield row, chunk

        wrong = self._rows_fault(chunks())
        return wrong or (None if zlib.crc32(index, crc) == crc32 else "its CRC-32 is not the committed one.")

    def _is_laid_out(self, slots: np.ndarray, n_rows: int, end: int) -> bool:
        """Whether `n_rows` rows fill the file from the header to `end`, in order, and all further slots are empty."""
        starts, lengths = slots[:n_rows].T
        if (slots[n_rows:] != EMPTY_SLOT).any() or (lengths > end).any() or (lengths <= 4).any():
            return False
        if self.codec == "none" and (lengths != self.row_bytes + 4).any():
            return False
        ends = HEADER_BYTES + np.cumsum(lengths)
        return starts[0] == HEADER_BYTES and np.array_equal(starts[1:], ends[:-1]) and ends[-1] == end

    def _rows_fault(self, chunks: Iterable[tuple[int, bytes]]) -> str | None:
        """What is wrong with any of the stored rows, each reason once with the rows it holds for."""
        rows_of: dict[str, list[int]] = {}
        for row, chunk in chunks:
            if wrong := self._row_fault(chunk):
                rows_of.setdefault(wrong, []).append(row)
        reasons = [f"{_rows(rows)}: {reason}" for reason, rows in rows_of.items()]
        return "; ".join(reasons) + "." if reasons else None

    def _row_fault(self, chunk: bytes) -> str | None:
        if crc32c(chunk) != CRC32C_RESIDUE:
            return "CRC-32C does not fit"
        if self.codec == "none":
            return self._value_fault(chunk, self.row_bytes)
        row = bytearray(self.row_bytes)
        try:
            decompress(self.codec, chunk[:-4], np.frombuffer(row, "u1"))
        except CacheCorruptError as error:
            return str(error)
        return self._value_fault(row, self.row_bytes)


def _rows(rows: list[int]) -> str:
    """[7] -> `row 7`; [1, 2, 3, 4] -> `4 rows, e.g. 1, 2, 3`."""
    return f"row {rows[0]}" if len(rows) == 1 else f"{len(rows)} rows, e.g. {', '.join(map(str, rows[:3]))}"


def _value_check(array: str, manifest: Manifest) -> Callable[[bytes | bytearray, int], str | None]:
    """What is wrong with the numbers in the first n bytes of a row of `array`: (bytes, n) -> reason or None."""
    if array == "scale":
        return _float16_fault if manifest.store.dtype == "int4" else _scale_fault
    if array == "attention":
        return _attention_fault
    if array == "index":
        return partial(_index_fault, n_patches=manifest.teacher.n_patches)
    if manifest.store.is_transformed:
        return partial(_klt_fault, token_bytes=manifest.store.row_shape(array, manifest.teacher)[-1])
    return {"int8": _int8_fault, "int4": _int4_fault, "float16": _float16_fault}[manifest.store.dtype]


def _int8_fault(data: bytes | bytearray, n_bytes: int) -> str | None:
    return "holds the fill value -128" if data.find(b"\x80", 0, n_bytes) >= 0 else None


def _int4_fault(data: bytes | bytearray, n_bytes: int) -> str | None:
    """Every value of a byte says something; only a row of nothing but the fill value is none."""
    return None if any(memoryview(data)[:n_bytes]) else "holds nothing but the fill value 0"


def _klt_fault(data: bytes | bytearray, n_bytes: int, token_bytes: int) -> str | None:
    """A token begins with the number of its scale, which is never 0."""
    return None if all(memoryview(data)[:n_bytes:token_bytes]) else "holds the fill value 0 for the scale of a token"


def _float16_fault(data: bytes | bytearray, n_bytes: int) -> str | None:
    exponents = np.frombuffer(data, "<u2", n_bytes // 2) & 0x7C00  # all ones: infinite or NaN; numpy's isfinite is slow here
    return "holds numbers that are not finite" if (exponents == 0x7C00).any() else None


def _scale_fault(data: bytes | bytearray, n_bytes: int) -> str | None:
    scale = np.frombuffer(data, "<f2", n_bytes // 2)
    return None if (np.isfinite(scale) & (scale >= 0)).all() else "holds scales that are negative or not finite"


def _attention_fault(data: bytes | bytearray, n_bytes: int) -> str | None:
    attention = np.frombuffer(data, "<f4", n_bytes // 4)
    if not (np.isfinite(attention) & (attention >= 0)).all():
        return "holds attention that is negative or not finite"
    return None if attention.sum(dtype="float64") <= 1 + SUM_SLACK else "holds attention that sums to more than 1"


def _index_fault(data: bytes | bytearray, n_bytes: int, n_patches: int) -> str | None:
    index = np.frombuffer(data, "<i4", n_bytes // 4)
    if index.min() < 0 or index.max() >= n_patches:
        return f"holds numbers of patches that are not 0 to {n_patches - 1}"
    return None if len(np.unique(index)) == len(index) else "holds a patch twice"
