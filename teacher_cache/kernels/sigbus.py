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

# What the handler reads (sigbus_handler.py says how). It never moves: compiled code knows its address.
START, LENGTH, TEXT, TEXT_LENGTH, N_COLUMNS = range(5)
_table = np.zeros((CAPACITY, N_COLUMNS), "uint64")
_free = list(range(CAPACITY - 1, -1, -1))
_watched: dict[int, tuple[int, np.ndarray]] = {}
"""Address of a map -> its line of the table, and the sentence, which must stay alive."""


def watch(address: int, n_bytes: int, path: Path, *advice: str) -> int:
    """Name the map at `address` if reading it fails; returns the address, for `forget`. advice: sentences more."""
    if _free:
        text = f"Error: {path} was cut short, or its disk failed, while it was read. Run teacher-cache verify on this cache."
        sentence = np.frombuffer(os.fsencode(" ".join([text, *advice]) + "\n"), "u1")
        line = _free.pop()
        _table[line, TEXT], _table[line, TEXT_LENGTH] = sentence.ctypes.data, len(sentence)
        _table[line, START] = address
        _table[line, LENGTH] = n_bytes  # last: the line counts from now on
        _watched[address] = line, sentence
    return address


def forget(address: int) -> None:
    """The map at `address` is about to be closed."""
    if address in _watched:
        line, _ = _watched.pop(address)
        _table[line, LENGTH] = 0
        _free.append(line)


class _Action(ctypes.Structure):
    """struct sigaction of Linux's C libraries on 64 bits."""

    _fields_ = [("handler", ctypes.c_void_p), ("mask", ctypes.c_ulong * 16), ("flags", ctypes.c_int),
                ("restorer", ctypes.c_void_p)]  # fmt: skip


SET_UP = 0
"""To the handler in the place of a signal's number, of which none is 0: learn the addresses at `info`."""
_SA_SIGINFO, _SA_ONSTACK = 0x4, 0x08000000
_before = _Action()
_said = np.zeros(1, "uint64")
"""1 once a thread has begun to say its sentence: others that fail at the same moment keep silent."""
_installed = False


def install() -> None:
    """Set the handler, once a process."""
    global _installed
    if _installed:
        return
    from .sigbus_handler import handler  # it imports numba

    known = np.array([_table.ctypes.data, _said.ctypes.data, ctypes.addressof(_before)], "uint64")
    ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(handler.address)(SET_UP, known.ctypes.data, None)
    libc = ctypes.CDLL(None, use_errno=True)
    action = _Action(handler=handler.address, flags=_SA_SIGINFO | _SA_ONSTACK)
    if libc.sigaction(int(signal.SIGBUS), ctypes.byref(action), ctypes.byref(_before)):
        raise OSError(ctypes.get_errno(), "the handler of SIGBUS cannot be set")
    _installed = True
