"""Decoding one chunk of a compressed array, into memory that is there already.

What a compressed chunk promises to become is read from its header and compared before anything is decoded, so that a damaged
chunk can neither allocate more than a row nor leave part of the row as it was.
"""

from __future__ import annotations

import struct
from functools import cache

import numpy as np

from ..errors import CacheCorruptError

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_BLOSC_HEADER = struct.Struct("<4B3I")  # versions, flags and typesize; then bytes: decoded, a block, encoded


def promised_bytes(codec: str, data: bytes) -> int | None:
    """How long the header of a chunk says that it is when decoded; None if it does not say, or says what cannot be."""
    if codec == "none":
        return len(data)
    if codec == "lz4":
        if len(data) < _BLOSC_HEADER.size:
            return None
        *_, n_decoded, _, n_encoded = _BLOSC_HEADER.unpack_from(data)
        return n_decoded if n_encoded == len(data) else None
    # RFC 8878, 3.1.1.1: magic, descriptor, [window], [dictionary], [content size]
    if len(data) < 5 or data[:4] != _ZSTD_MAGIC:
        return None
    descriptor = data[4]
    is_single_segment, dictionary_bytes = descriptor >> 5 & 1, (0, 1, 2, 4)[descriptor & 3]
    size_bytes = (is_single_segment, 2, 4, 8)[descriptor >> 6]
    start = 5 + (not is_single_segment) + dictionary_bytes
    field = data[start : start + size_bytes]
    if not size_bytes or len(field) < size_bytes:
        return None
    return int.from_bytes(field, "little") + 256 * (size_bytes == 2)


@cache
def _codec(name: str):
    import numcodecs

    return numcodecs.Zstd() if name == "zstd" else numcodecs.Blosc()


def decompress(codec: str, data: bytes, out: np.ndarray) -> None:
    """Decode a chunk (without its CRC-32C) into `out`, uint8 [row bytes]. Works without the GIL, in any number of threads.

    Raises CacheCorruptError, without a path, for a chunk that promises another length or cannot be decoded.
    """
    promised = promised_bytes(codec, data)
    if promised != len(out):
        what = "does not say how long it is" if promised is None else f"promises {promised:,} bytes"
        raise CacheCorruptError(f"it {what}, a row has {len(out):,}")
    if codec == "none":
        out[:] = np.frombuffer(data, "u1")
        return
    try:
        _codec(codec).decode(data, out)
    except (RuntimeError, ValueError) as error:
        raise CacheCorruptError(f"it cannot be decoded: {error}") from error
