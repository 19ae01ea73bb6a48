"""Progress of long work: a bar on a terminal, a plain line every half minute in a log file; and what one waits for."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .estimate import human

LINE_EVERY_S = 30


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _count(number: float, unit: str) -> str:
    """`12,345 crops`, `1.23 GB`."""
    return human(number) if unit == "B" else f"{number:,.0f} {unit}"


def note(line: str) -> None:
    """Say something worth knowing beside the progress."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def progress(what: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`. `done` units were finished before (a resumed run); the rate counts only new ones. Unit `B`: bytes."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total, completed=done, state="")
            start, n_new = time.monotonic(), 0

            def advance(n: int) -> None:
                nonlocal n_new
                n_new += n
                rate = n_new / max(time.monotonic() - start, 1e-9)
                state = f"{_count(done + n_new, unit)} of {_count(total, unit)}, {_count(rate, unit)}/s"
                bar.update(task, advance=n, state=state)

            yield advance
        return

    start = last_line = time.monotonic()
    n_new = 0

    def advance(n: int) -> None:
        nonlocal n_new, last_line
        n_new += n
        now = time.monotonic()
        if now - last_line >= LINE_EVERY_S:
            last_line, rate = now, max(n_new, 1e-9) / (now - start)
            left = _clock((total - done - n_new) / rate)
            state = f"{_count(done + n_new, unit)} of {_count(total, unit)}, {_count(rate, unit)}/s, {left} left"
            print(f"{what}: {state}", file=sys.stderr, flush=True)

    yield advance


def waiting(what: str) -> Callable[[str], None]:
    """A function that is told again and again whom one waits for, and prints it when it changes and every half minute."""
    last_line, last_said = "", float("-inf")

    def say(holder: str) -> None:
        nonlocal last_line, last_said
        line = f"{what}: waiting for {holder}"
        if line != last_line or time.monotonic() - last_said >= LINE_EVERY_S:
            last_line, last_said = line, time.monotonic()
            print(line, file=sys.stderr, flush=True)

    return say
