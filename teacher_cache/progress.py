"""Progress of long work: a bar on a terminal, a plain line every half minute in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_EVERY_S = 30


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


@contextmanager
def progress(what: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`. `done` units were finished before (a resumed run); the rate counts only new ones."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                   TextColumn("{task.fields[rate]}"), TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total, completed=done, rate="")
            start, n_new = time.monotonic(), 0

            def advance(n: int) -> None:
                nonlocal n_new
                n_new += n
                rate = n_new / max(time.monotonic() - start, 1e-9)
                bar.update(task, advance=n, rate=f"{rate:,.0f} {unit}/s")

            yield advance
        return

    start = last_line = time.monotonic()
    n_new = 0

    def advance(n: int) -> None:
        nonlocal n_new, last_line
        n_new += n
        now = time.monotonic()
        if now - last_line >= LINE_EVERY_S:
            last_line, rate = now, n_new / (now - start)
            left = _clock((total - done - n_new) / rate)
            print(f"{what}: {done + n_new:,} of {total:,} {unit}, {rate:,.0f}/s, {left} left", file=sys.stderr, flush=True)

    yield advance
