"""A last word when a mapped file is cut short: which file it was.

Reading a page of a map whose file has become too short, or whose disk fails, is no error that code could catch: the kernel ends
the process with SIGBUS, without a word. `watch` keeps a table of the maps that are open, with a sentence for each. `install`
sets a signal handler, compiled so that it can run where Python cannot, that looks the address up, writes the sentence to stderr
and ends the process with exit code 1. A SIGBUS at any other address takes its way as before.

What it gives up: whatever stood in unwritten buffers is lost, as in any sudden end. Linux on 64 bits only.
"""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

import numpy as np

CAPACITY = 1 << 16
"""Maps on record; the kernel grants a process 65,530 by default. Any beyond stay unnamed."""

# What the handler reads. It never moves: compiled code knows its address.
_START, _LENGTH, _TEXT, _TEXT_LENGTH = range(4)
_table = np.zeros((CAPACITY, 4), "uint64")
_free = list(range(CAPACITY - 1, -1, -1))
_watched: dict[int, tuple[int, np.ndarray]] = {}
"""Address of a map -> its line of the table, and the sentence, which must stay alive."""


def watch(address: int, n_bytes: int, path: Path, *advice: str) -> int:
    """Name the map at `address` if reading it fails; returns the address, for `forget`. advice: sentences more."""
    if _free:
        text = f"Error: {path} was cut short, or its disk failed, while it was read. Run teacher-cache verify on this cache."
        sentence = np.frombuffer(os.fsencode(" ".join([text, *advice]) + "\n"), "u1")
        line = _free.pop()
        _table[line, _TEXT], _table[line, _TEXT_LENGTH] = sentence.ctypes.data, len(sentence)
        _table[line, _START] = address
        _table[line, _LENGTH] = n_bytes  # last: the line counts from now on
        _watched[address] = line, sentence
    return address


def forget(address: int) -> None:
    """The map at `address` is about to be closed."""
    if address in _watched:
        line, _ = _watched.pop(address)
        _table[line, _LENGTH] = 0
        _free.append(line)


class _Action(ctypes.Structure):
    """struct sigaction of Linux's C libraries on 64 bits."""

    _fields_ = [("handler", ctypes.c_void_p), ("mask", ctypes.c_ulong * 16), ("flags", ctypes.c_int),
                ("restorer", ctypes.c_void_p)]  # fmt: skip


_SA_SIGINFO, _SA_ONSTACK = 0x4, 0x08000000
_STDERR = 2
_before = _Action()
_said = np.zeros(1, "uint64")
"""1 once a thread has begun to say its sentence: others that fail at the same moment keep silent."""
_handler = None


def install() -> None:
    """Set the handler, once a process. Compiling it takes some tenths of a second."""
    global _handler
    if _handler is not None:
        return
    _handler = _compile()
    libc = ctypes.CDLL(None, use_errno=True)
    action = _Action(handler=_handler.address, flags=_SA_SIGINFO | _SA_ONSTACK)
    if libc.sigaction(int(signal.SIGBUS), ctypes.byref(action), ctypes.byref(_before)):
        raise OSError(ctypes.get_errno(), "the handler of SIGBUS cannot be set")


def _compile():
    """The handler, void (int signal, siginfo_t *, void *). It calls only what POSIX allows in a signal handler."""
    from .pointers import exchange_u64, pointer_u64  # before numba

    from numba import cfunc, types  # isort: skip

    libc = ctypes.CDLL(None)
    write, leave, pause, throw, sigaction = libc.write, libc._exit, libc.pause, getattr(libc, "raise"), libc.sigaction
    write.argtypes, write.restype = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_ssize_t
    leave.argtypes, leave.restype = [ctypes.c_int], None
    pause.argtypes, throw.argtypes = [], [ctypes.c_int]
    sigaction.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    table_address, said_address, before_address = _table.ctypes.data, _said.ctypes.data, ctypes.addressof(_before)

    @cfunc(types.void(types.int32, types.CPointer(types.uint64), types.voidptr))
    def handler(number, info, context):
        address = info[2]  # si_addr, 16 bytes into siginfo_t
        table = pointer_u64(np.uint64(table_address))
        for i in range(0, 4 * CAPACITY, 4):
            if address - table[i + _START] < table[i + _LENGTH]:  # unsigned: an address below the start is far above the length
                if exchange_u64(np.uint64(said_address), np.uint64(1)) == 0:
                    write(_STDERR, table[i + _TEXT], table[i + _TEXT_LENGTH])
                    leave(1)
                while True:
                    pause()
        sigaction(number, np.uint64(before_address), np.uint64(0))
        throw(number)  # delivered when this handler returns

    return handler
