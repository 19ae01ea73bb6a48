"""What Ctrl-C and SIGTERM (pre-emption) do to a command: never a traceback, and an exit code of their own.

Inside `signals_raise` they are exceptions, so that work can be saved. Before it, while a program imports, there is nothing to
save and they end it on the spot; after it, its exit code is decided and they do nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""
STOPPED = 75
"""Exit code after SIGTERM: EX_TEMPFAIL of sysexits.h, "run me again"."""
AGAIN_S = 0.05


class Stopped(KeyboardInterrupt):
    """SIGTERM as an exception: whatever cleans up after Ctrl-C cleans up after it too."""


def run_program(load: Callable[[], Callable[[], object]]) -> None:
    """All that a console script does: load the command, then run it.

    An exception raised by a signal in the middle of an import may be swallowed or printed; ending the process cannot. Once the
    command is done its exit code stands, whatever arrives while the interpreter takes itself apart.
    """
    _handle({signal.SIGINT: lambda *_: os._exit(INTERRUPTED), signal.SIGTERM: lambda *_: os._exit(STOPPED)})
    try:
        load()()
    finally:
        _handle({signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_IGN})
        sys.unraisablehook = lambda dropped: None  # destructors of objects that a signal left half made


@contextmanager
def signals_raise() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt and SIGTERM raises Stopped while the block runs.

    One that strikes where Python can only report and drop it (a destructor, a callback of numba's compiler) strikes again a
    moment later. Python delivers signals to the main thread alone: in any other this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise Stopped

    def report(dropped):
        if isinstance(dropped.exc_value, KeyboardInterrupt):
            number = signal.SIGTERM if isinstance(dropped.exc_value, Stopped) else signal.SIGINT
            again = threading.Timer(AGAIN_S, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
        else:
            reported(dropped)

    reported, sys.unraisablehook = sys.unraisablehook, report
    before = _handle({signal.SIGINT: signal.default_int_handler, signal.SIGTERM: stop})
    try:
        yield
    finally:
        _handle(before)
        sys.unraisablehook = reported


def _handle(handlers: dict) -> dict:
    """Install handlers by signal number and return those that were there.

    What is ignored (a shell's `&`) stays ignored; a handler of None is not Python's and could not be put back.
    """
    heard = [number for number in handlers if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    return {number: signal.signal(number, handlers[number]) for number in heard}
