"""Which patches a store of visible tokens keeps: the first of a race that attention decides.

Patch n runs with speed attention[n]: it arrives at -log(u_n) / attention[n], u_n uniform. The first K to arrive are a draw of
K patches without replacement, in the law of torch.multinomial, by which MaskAlign and MILAN choose what a student sees; and the
first k <= K of them are such a draw of k. So one store serves every mask ratio that leaves at most K patches visible.

Here is what chance says; the race itself is run where the attention is (encoding/encode.py).
"""

from __future__ import annotations

import numpy as np

from ..errors import CacheCorruptError

KEY = 0x72616365
"""Sets these numbers apart from those of crops."""


def arrivals(n_patches: int, rows: np.ndarray, view: int) -> np.ndarray:
    """When each patch would arrive at speed 1: float64 [B, N], Exp(1), a function of view, row and patch alone."""
    streams = (np.random.Philox(key=[KEY, view], counter=[0, int(row), 0, 0]) for row in rows)
    raw = np.stack([stream.random_raw(n_patches) for stream in streams])
    return -np.log(((raw >> 11) + 0.5) * 2.0**-53)


def require_patches(index: np.ndarray, n_patches: int, rows: np.ndarray, where) -> None:
    """Raise CacheCorruptError unless all numbers of `index` [B, K], read for `rows` of `where`, are those of patches."""
    wrong = ((index < 0) | (index >= n_patches)).any(1)
    if wrong.any():
        raise CacheCorruptError(
            f"{where}: row {rows[wrong.argmax()]} names patches that are not 0 to {n_patches - 1}. Run teacher-cache verify on "
            "this cache."
        )


def places_of(patches: np.ndarray, n_cls: int) -> np.ndarray:
    """Where CLS, if there is one (`n_cls`), and the given patches [B, K] stand among all tokens: int32 [B, C+K]."""
    cls = np.broadcast_to(np.arange(n_cls), (len(patches), n_cls))
    return np.concatenate([cls, patches + n_cls], axis=1, dtype="int32", casting="same_kind")
