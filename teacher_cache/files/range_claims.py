"""Who may write which shards: one holder of each at a time, and ranges that nobody holds for whoever asks next.

    NAME.zarr.claims/FFFFFF-LLLLLL.TOKEN.claim  the shards FFFFFF, ..., LLLLLL - 1 are somebody's
                     gate/TOKEN                 claimed (claims.py) for the moment in which a holder looks at the others and
                                                adds its own

`claimed_range` takes the range that it is told; `RangeClaims` lets its caller choose one when it has seen what others hold. Who
is alive, and who may be succeeded, is as for any claim.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from . import claim_file, claims, guard
from .claim_file import Found, Own, Patience, new_token
from .claims import (
    ClaimHeldError,
    clear_left,
    create,
    extent_of,
    in_words,
    is_gone,
    leave,
    make_claim,
    named_in,
    once,
    refusal_explained,
    refuse_or_tell,
    territory,
)
from .durable import sync_folder

GATE = "gate"
GATE_POLL_S = 0.01
TIDY_S = 2.0
"""For so long a holder that leaves waits for the gate, to remove what nobody needs any more."""


@contextmanager
def claimed_range(folder: Path, first: int, last: int, what: str) -> Iterator[OwnRange]:
    """Hold the shards first, ..., last - 1 of what `folder` guards while the block runs; others may hold other shards.

    Raises ClaimHeldError naming the holder and its range if that overlaps and is alive, or begins to move while it is watched.
    Claims of the dead are removed. When the last holder leaves, so does the folder.
    """
    patience, refuse = Patience(), refuse_or_tell(what, (first, last))
    while True:
        with _gate(folder, what) as gate:
            found = _overlapping(folder, first, last, patience)
            if found is None:
                own = _place_range(folder, first, last, what)
                if gate.is_there():
                    break
                own.let_go()  # we were stopped for so long that others went through the gate
                continue
        refuse(found, patience)
        claims.sleep(claims.POLL_S)
    try:
        with _held(own):
            yield own
    finally:
        _tidy(folder, what)


@contextmanager
def _held(own: OwnRange) -> Iterator[None]:
    """Hold what was placed while the block runs."""
    try:
        own.keep_moving()
        with guard.registered(own):
            yield
    finally:
        own.let_go()


def _tidy(folder: Path, what: str) -> None:
    """Remove the folder if nobody needs it. The next holder does so too: what goes wrong here may not hide what came before."""
    with contextlib.suppress(OSError, ClaimHeldError), _gate(folder, what, TIDY_S):
        pass


class RangeClaims:
    """The claims in `folder` as one process sees them again and again, which takes of what is free. A context manager.

    what: what the folder guards, in words, for messages. rate: units a second of the holder's work, which its claims tell.
    """

    def __init__(self, folder: Path, what: str):
        self.folder, self.what, self.rate = folder, what, 0.0
        self._patience = Patience()

    def __enter__(self) -> RangeClaims:
        return self

    def __exit__(self, *_) -> None:
        _tidy(self.folder, self.what)

    @contextmanager
    def claimed(self, choose: Callable[[list[Found], list[Found]], range | None]) -> Iterator[OwnRange | None]:
        """Hold the range that `choose` picks while the block runs; None, and nothing is held, if it picks none.

        choose: called while no other process can take anything, with the claims that others hold and those of the dead, which
        are removed behind it. It must pick a range that overlaps none of the former (`extent_of` their paths).
        """
        while True:
            with _gate(self.folder, self.what) as gate:
                held, dead = self.look()
                chosen = choose(held, dead)
                for found in dead:
                    found.path.unlink(missing_ok=True)
                if chosen is None:
                    break
                own = _place_range(self.folder, chosen.start, chosen.stop, self.what, self.rate)
                if gate.is_there():
                    break
                own.let_go()  # we were stopped for so long that others went through the gate
        if chosen is None:
            yield None
            return
        with _held(own):
            yield own

    def look(self) -> tuple[list[Found], list[Found]]:
        """The claims of those that may live, and of the dead; nothing is written.

        Who cannot be seen from here may live until it has been watched for claim_file.DEAD_S seconds, over however many looks.
        """
        held: list[Found] = []
        dead: list[Found] = []
        for path in claims_in(self.folder):
            with refusal_explained(self.folder.parent):
                found = self._patience.look(path)
            if found is not None:
                (dead if is_gone(found, self._patience) else held).append(found)
        return held, dead


def claims_in(folder: Path) -> list[Path]:
    """The claims of ranges in `folder`, by their ranges; none if it goes away meanwhile."""
    try:
        return sorted(folder.glob("*.claim"))
    except FileNotFoundError:
        return []


class OwnRange(Own):
    """A claim on shards `first` to `last` - 1."""

    def __init__(self, path: Path, descriptor: int, token: str, what: str, first: int, last: int, rate: float):
        super().__init__(path, descriptor, token, what, territory(path.parent), rate, first=first, last=last)
        self.first, self.last = first, last

    def require(self) -> None:  # type: ignore[override]
        super().require(self._successor)

    def _successor(self) -> str | None:
        return named_in([path for path in claims_in(self.path.parent) if _overlaps(path, self.first, self.last)])


def _place_range(folder: Path, first: int, last: int, what: str, rate: float = 0.0) -> OwnRange:
    token = new_token()
    path = folder / f"{first:06d}-{last:06d}.{token}.claim"
    with refusal_explained(folder.parent):
        descriptor = create(path)
    try:
        return OwnRange(path, descriptor, token, what, first, last, rate)
    except BaseException:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise


def _overlaps(path: Path, first: int, last: int) -> bool:
    begin, end = extent_of(path)
    return begin < last and first < end


def _overlapping(folder: Path, first: int, last: int, patience: Patience) -> Found | None:
    """A claim that overlaps first:last and is not dead; those of the dead are removed, overlapping or not."""
    obstacle = None
    for path in claims_in(folder):
        with refusal_explained(folder.parent):
            found = patience.look(path)
            if found is None:
                continue
            if found.is_dead or _overlaps(path, first, last) and is_gone(found, patience):
                path.unlink(missing_ok=True)
            elif _overlaps(path, first, last):
                obstacle = obstacle or found
    return obstacle


@contextmanager
def _gate(folder: Path, what: str, most_s: float | None = None) -> Iterator[Own]:
    """Be the only one that looks at or changes the claims in `folder`; made if it is missing, removed if it is left empty.

    most_s: seconds after which a gate that somebody else holds raises ClaimHeldError; None: it is waited for.
    """
    gate, refuse = folder / GATE, in_words(once(lambda who: claim_file.tell(f"{what}: waiting for {who}")))
    began = claim_file.now()

    def wait(found: Found, patience: Patience) -> None:
        if most_s is not None and claim_file.now() - began > most_s:
            raise ClaimHeldError(f"{what}: {found.who} looks at its claims.", found.who)
        if most_s is None and not found.is_alive:
            refuse(found, patience)

    while True:
        try:
            with refusal_explained(folder.parent), contextlib.suppress(FileExistsError):
                folder.mkdir()
            if folder.is_symlink():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
            own = make_claim(gate, what, wait, GATE_POLL_S)
            break
        except FileNotFoundError:
            if not folder.parent.is_dir():
                raise
    try:
        clear_left(gate)
        yield own
    finally:
        is_last = not any(folder.glob("*.claim"))
        leave(gate, own)
        if is_last:
            with contextlib.suppress(OSError):  # a newcomer has made its gate there
                folder.rmdir()
                sync_folder(folder.parent)
