"""The loops that read crops and rows, compiled for one thread, for processes that are forked: parallel ones would be compiled
anew in every child. Both give the same bytes."""

from __future__ import annotations

import numba
import numpy as np

from teacher_cache.kernels import loops


def compile_now() -> None:
    """Compile what every child would compile: the loops as serial ones. It changes this process."""
    addresses, rows, word = np.zeros(0, "uint64"), np.zeros(0, "int64"), np.uint64(0)
    loops.decode_rows = numba.njit(nogil=True)(loops.decode_rows.py_func)
    loops.decode_rows(rows, np.zeros((0, 32, 32, 3), "uint8"), word, addresses, addresses, np.zeros(0, "uint32"), True, rows)
    loops.copy_rows = numba.njit(nogil=True)(loops.copy_rows.py_func)
    loops.copy_rows(rows, word, 1, addresses, addresses, False, 1, word, np.zeros(0, "uint8"), 1, rows)
