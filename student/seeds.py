"""Random numbers as pure functions of a position in the run, so that resuming needs no saved generator state."""

from __future__ import annotations

import hashlib


def position_seed(purpose: str, *position: int) -> int:
    """A 64-bit seed for one purpose at one position, e.g. ("mask", run seed, step)."""
    text = " ".join([purpose, *map(str, position)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
