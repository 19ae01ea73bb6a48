"""Progress of long work: how fast it goes, how long it still takes, and what it waits for.

On a terminal a bar; in a log file a line at the start, one every few minutes and one at the end: a night is a page. Who calls the
library from a program of its own is told by functions instead (`told_to`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, TypeVar

from ..words import human

LINE_EVERY_S = 180
"""Between two lines in a log file, seconds."""
LEAST_SHARE = 0.01
"""Of the time so far; what is waited for less is not mentioned."""

T = TypeVar("T")


def clock(seconds: float) -> str:
    """Hours, minutes, seconds: `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _count(number: float, unit: str) -> str:
    """`12,345 crops`, `1.23 GB`; of a slow rate `0.25 crops`."""
    if unit == "B":
        return human(number)
    return f"{number:,.0f} {unit}" if number >= 10 or number == int(number) else f"{number:.2g} {unit}"


class Progress:
    """Counts what is done, and where the time goes. Called with the number of units that have been finished: `advance(64)`.

    `done` of `total` units were finished before (a resumed run); the rate is of new ones only. Unit `B`: bytes. `n_others`: units
    that other processes have finished meanwhile, which count for the time that is left.
    One thread may count what is done while another one waits.
    """

    def __init__(self, what: str, total: int, unit: str, done: int = 0):
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self.n_new = self.n_others = 0
        self.start = time.monotonic()
        self.waited: dict[str, float] = {}

    def __call__(self, n: int) -> None:
        self.n_new += n

    @contextmanager
    def waits_for(self, what: str) -> Iterator[None]:
        """The time spent in the block is counted as waiting for `what`: teacher, decode, disk ..."""
        asked = time.monotonic()
        try:
            yield
        finally:
            self.waited[what] = self.waited.get(what, 0.0) + time.monotonic() - asked

    def each(self, items: Iterable[T], what: str) -> Iterator[T]:
        """The same items; the time until the next one comes is counted as waiting for `what`."""
        iterator, end = iter(items), object()
        while True:
            with self.waits_for(what):
                item = next(iterator, end)
            if item is end:
                return
            yield item

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.start, 1e-9)

    def state(self) -> str:
        """`1,024 of 5,000 crops, 12 crops/s, waits for teacher 81%, disk 12%`."""
        n_done, rate = self.done + self.n_new + self.n_others, self.n_new / self.seconds
        so_far = human(n_done) if self.unit == "B" else f"{n_done:,}"
        return f"{so_far} of {_count(self.total, self.unit)}, {_count(rate, self.unit)}/s{self.waits()}"

    def waits(self) -> str:
        """`, waits for teacher 81%, disk 12%`: shares of the time so far, the largest first. Empty if nothing was waited for."""
        shares = sorted(((seconds / self.seconds, what) for what, seconds in list(self.waited.items())), reverse=True)
        named = [f"{what} {share:.0%}" for share, what in shares if share >= LEAST_SHARE]
        return f", waits for {', '.join(named)}" if named else ""

    def left(self) -> str:
        """Time that is left at the rate so far; `?` before the first unit."""
        n_new = self.n_new + self.n_others
        return clock((self.total - self.done - n_new) * self.seconds / n_new) if self.n_new else "?"


class _Bar(Progress):
    """On a terminal."""

    def show_in(self, bar) -> None:
        self._bar, self._task = bar, bar.add_task(self.what, total=self.total, completed=self.done, state="", left="?")

    def __call__(self, n: int) -> None:
        super().__call__(n)
        self._bar.update(self._task, advance=n, state=self.state(), left=self.left())


class _Lines(Progress):
    """In a log file or a pipe."""

    def begin(self) -> None:
        before = f", {self.done:,} of them done before" if self.done and self.unit != "B" else ""
        self._say(f"{_count(self.total, self.unit)}{before}")
        self._last_line = self.start

    def __call__(self, n: int) -> None:
        super().__call__(n)
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY_S and self.done + self.n_new < self.total:
            self._last_line = now
            self._say(f"{self.state()}, {self.left()} left")

    def end(self) -> None:
        self._say(f"{_count(self.n_new, self.unit)} in {clock(self.seconds)}, {_count(self.n_new / self.seconds, self.unit)}/s"
                  f"{self.waits()}")  # fmt: skip

    def _say(self, text: str) -> None:
        print(f"{self.what}: {text}", file=sys.stderr, flush=True)


class _Told(Progress):
    """In a program that uses the library."""

    def __init__(self, tell: Callable[[str, int, int], None], what: str, total: int, unit: str, done: int):
        super().__init__(what, total, unit, done)
        self._tell = tell
        tell(what, done, total)

    def __call__(self, n: int) -> None:
        super().__call__(n)
        self._tell(self.what, self.done + self.n_new, self.total)


class _Listener(NamedTuple):
    say: Callable[[str], None] | None
    progress: Callable[[str, int, int], None] | None


_listener: ContextVar[_Listener | None] = ContextVar("listener", default=None)


@contextmanager
def told_to(say: Callable[[str], None] | None, progress: Callable[[str, int, int], None] | None) -> Iterator[None]:
    """Within the block nothing is printed: `say` gets each line, `progress` what goes on, how much is done, and of how much.

    None: nobody is told. An exception that `progress` raises ends the work, as an interrupt does.
    """
    token = _listener.set(_Listener(say, progress))
    try:
        yield
    finally:
        _listener.reset(token)


def note(line: str) -> None:
    """Say something worth knowing beside the progress."""
    listener = _listener.get()
    if listener is None:
        print(line, file=sys.stderr, flush=True)
    elif listener.say is not None:
        listener.say(line)


@contextmanager
def progress(what: str, total: int, unit: str, done: int = 0) -> Iterator[Progress]:
    """Yields a Progress that is shown on stderr while the block runs. Of work that is done already nothing is said."""
    listener = _listener.get()
    if done >= total or listener and listener.progress is None:
        yield Progress(what, total, unit, done)
    elif listener:
        yield _Told(listener.progress, what, total, unit, done)
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[state]}"),
                   TextColumn("{task.fields[left]} left"))  # fmt: skip
        with Bars(*columns, console=Console(stderr=True)) as bars:
            advance = _Bar(what, total, unit, done)
            advance.show_in(bars)
            yield advance
    else:
        advance = _Lines(what, total, unit, done)
        advance.begin()
        yield advance
        advance.end()


def waiting(what: str) -> Callable[[str], None]:
    """A function that is told again and again whom one waits for, and prints it when it changes and every few minutes."""
    last_line, last_said = "", float("-inf")

    def say(holder: str) -> None:
        nonlocal last_line, last_said
        line = f"{what}: waiting for {holder}"
        if line != last_line or time.monotonic() - last_said >= LINE_EVERY_S:
            last_line, last_said = line, time.monotonic()
            note(line)

    return say
