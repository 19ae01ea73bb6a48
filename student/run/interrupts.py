"""Keep Ctrl-C and SIGTERM from tearing an update or a checkpoint in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def deferred_interrupts() -> Iterator[list[int]]:
    """Hold SIGINT and SIGTERM back until the block is done, then deliver them to whoever was to have them.

    Gives the list of those that have arrived so far.

    Only the main thread is ever interrupted by Python's signals; in any other this does nothing.
    """
    arrived = []
    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return
    # one each: what one delivers cannot keep the other's handler away
    with _deferred(signal.SIGTERM, arrived), _deferred(signal.SIGINT, arrived):
        yield arrived


@contextmanager
def _deferred(number: int, arrived: list[int]) -> Iterator[None]:
    handler = signal.getsignal(number)
    if handler is None:  # not installed from Python: it could not be put back
        yield
        return
    try:
        signal.signal(number, lambda *_: arrived.append(number))
        yield
    finally:
        signal.signal(number, handler)
        if number in arrived:
            signal.raise_signal(number)
