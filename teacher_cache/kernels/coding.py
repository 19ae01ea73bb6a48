"""Nearest levels and their codes, packed, in one pass over the values where torch's operations take ten."""

from __future__ import annotations

from . import pointers  # noqa: F401  # isort: skip - before numba, whose threading layer it chooses

import numpy as np
from numba import prange

from .compiled import kernel

COUNTED = 5
"""Up to so many bits the edges below a value are counted, eight values at once; from there on they are searched."""


@kernel()
def _below(values, edges, found):
    """int32 `found`: how many of `edges`, ascending, are below each of `values`."""
    found[:] = 0
    for edge in edges:
        for k in range(len(values)):
            found[k] += np.int32(values[k] > edge)


@kernel()
def _search(values, edges, found):
    """`_below`, of 2 ** bits - 1 edges."""
    for k in range(len(values)):
        code, step = 0, (len(edges) + 1) >> 1
        while step:
            code += step * np.int64(values[k] > edges[code + step - 1])
            step >>= 1
        found[k] = code


@kernel()
def _pack(codes, runs, stored):
    """Codes of one row back to back, the lowest bit first, zeros behind the last."""
    waiting, n_waiting, at = np.uint64(0), np.uint64(0), 0
    for start, stop, n_bits, _, _ in runs:
        for k in range(start, stop):
            waiting |= np.uint64(codes[k]) << n_waiting
            n_waiting += np.uint64(n_bits)
            while n_waiting >= np.uint64(8):
                stored[at] = waiting & np.uint64(255)
                waiting, n_waiting, at = waiting >> np.uint64(8), n_waiting - np.uint64(8), at + 1
    while at < len(stored):
        stored[at] = waiting & np.uint64(255)
        waiting, at = waiting >> np.uint64(8), at + 1


@kernel(parallel=True)
def code_values(values, runs, edges, levels, stored, nearest):
    """Code `values` float32 [n, K]: `stored` uint8 [n, bytes] gets the codes of a row back to back, `nearest` float32 [n, K] the
    levels.

    runs: int64 [R, 5], of columns with equally many bits: the first, the one behind the last, the bits, and where their
    2 ** bits - 1 edges, ascending, begin in `edges`, and their 2 ** bits levels in `levels`. On an edge the lower code is taken.
    """
    for i in prange(len(values)):
        codes = np.empty(values.shape[1], np.int32)
        for start, stop, n_bits, first_edge, first_level in runs:
            own, found = edges[first_edge : first_edge + (1 << n_bits) - 1], codes[start:stop]
            if n_bits <= COUNTED:
                _below(values[i, start:stop], own, found)
            else:
                _search(values[i, start:stop], own, found)
            of_run, out = levels[first_level : first_level + (1 << n_bits)], nearest[i, start:stop]
            for k in range(len(found)):
                out[k] = of_run[found[k]]
        _pack(codes, runs, stored[i])
