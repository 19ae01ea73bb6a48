"""How long work tells what it does: the caller hands in a function that shows it, or nothing is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Watch = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]
"""(what, total, unit) -> a context whose value is called with the number of units that have been finished."""


@contextmanager
def unwatched(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Shows nothing."""
    yield lambda n: None
