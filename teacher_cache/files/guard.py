"""What this process holds, and that it still does: asked before anything is published where somebody else may have taken over.

A holder that was stopped for longer than others wait for it (a node that hung, a suspended machine) may wake when its work is
somebody else's. So whatever gives a file its name (durable.py) asks `require_held` first, for every claim that covers the place;
a claim registers itself while it is held (claims.py), and no caller has to remember it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from ..errors import ClaimLostError


class Held(Protocol):
    """A claim that this process holds."""

    token: str
    """Random, of this claim alone."""
    covers: str
    """Absolute path of the folder, or of the store, that the claim is about."""
    leftovers: dict[Path, list[str]]
    """Folder -> names that end in .partial and were there before this claim was; filled as folders are looked into."""

    def require(self) -> None:
        """Raise ClaimLostError, saying who took over, unless the claim still is where it was put."""


_held: tuple[Held, ...] = ()
_changing = threading.Lock()
os.register_at_fork(after_in_child=lambda: globals().update(_changing=threading.Lock()))


@contextmanager
def registered(claim: Held) -> Iterator[None]:
    """`claim` is asked before whatever it covers is published while the block runs."""
    global _held
    with _changing:
        _held = (*_held, claim)
    try:
        yield
    finally:
        with _changing:
            _held = tuple(other for other in _held if other is not claim)


def claims_on(path: Path) -> list[Held]:
    """The claims of this process that cover `path`, the one that was made last in front."""
    place = str(Path(path).absolute())
    return [claim for claim in reversed(_held) if _is_about(claim.covers, place)]


def _is_about(covered: str, place: str) -> bool:
    """Whether `place` is `covered` or lies in it; of a store also what is still aside under its name."""
    within = (f"{covered}/", f"{covered}.") if covered.endswith(".zarr") else f"{covered}/"
    return place == covered or place.startswith(within)


def require_held(path: Path) -> None:
    """Raise ClaimLostError if a claim of this process on `path` has been taken over. Without a claim there is nothing to lose."""
    for claim in claims_on(path):
        try:
            claim.require()
        except ClaimLostError:
            if any(held is claim for held in _held):  # else another thread has let it go since we looked
                raise
