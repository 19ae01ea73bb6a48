"""The handler of SIGBUS that sigbus.py sets: compiled, so that it can run where Python cannot."""

from __future__ import annotations

import numpy as np
from numba import types

from .compiled import callback
from .outside import leave, pause, sigaction, throw, write
from .pointers import N_SLOTS, exchange_u64, pointer_u64, slots
from .sigbus import CAPACITY, LENGTH, N_COLUMNS, SET_UP, START, TEXT, TEXT_LENGTH

TABLE, SAID, BEFORE = range(N_SLOTS)
"""The slots: addresses of the table of maps, of the word that is 1 once a thread speaks, and of the action of before."""
_STDERR = 2


@callback(types.void(types.int32, types.CPointer(types.uint64), types.voidptr))
def handler(number, info, context):
    """void (int signal, siginfo_t *, void *). It calls only what POSIX allows in a signal handler."""
    known = pointer_u64(slots())
    if number == SET_UP:
        for i in range(N_SLOTS):
            known[i] = info[i]
        return
    address = info[2]  # si_addr, 16 bytes into siginfo_t
    table = pointer_u64(known[TABLE])
    for i in range(0, N_COLUMNS * CAPACITY, N_COLUMNS):
        if address - table[i + START] < table[i + LENGTH]:  # unsigned: an address below the start is far above the length
            if exchange_u64(known[SAID], np.uint64(1)) == 0:
                write(_STDERR, table[i + TEXT], table[i + TEXT_LENGTH])
                leave(1)
            while True:
                pause()
    sigaction(number, known[BEFORE], np.uint64(0))
    throw(number)  # delivered when this handler returns
