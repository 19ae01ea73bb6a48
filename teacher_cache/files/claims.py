"""Who may write: one holder at a time, known to all, succeeded when it is gone and never while it lives.

    crops.claim/TOKEN, NAME.zarr.claim/TOKEN    `claimed`: one holder, in a folder that can hold one claim only
    NAME.zarr.claims/FFFFFF-LLLLLL.TOKEN.claim  many holders, each of a range of its own: range_claims.py

Every claim is a file with a name of its own (claim_file.py), made aside in its folder and renamed into place, which the system
refuses where another one is. So to remove a dead claim can never hit the one that followed it, and of many who take over one
wins, with or without locks. A claim that is locked, or whose counter moves, is never taken over. One that is not locked, of this
host and boot, is dead. Any other is watched: it is dead when it has not moved for DEAD_S seconds of one's own clock.

Versions before wrote one locked file, `crops.claim`, without a counter; such a file is watched, and removed, like any other.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import MismatchError
from . import claim_file, guard
from .claim_file import Found, Own, Patience, find, new_token
from .durable import ASIDE, sync_folder

POLL_S = 0.5
sleep = time.sleep
_TOKEN = re.compile(r"[0-9a-f]{16}")
_RANGE = re.compile(r"([0-9]+)-([0-9]+)(\.[0-9a-f]{16})?\.claim")
_are_holders_gone = False


class ClaimHeldError(MismatchError):
    """Somebody else holds the claim; `holder` says who, in words."""

    def __init__(self, message: str, holder: str):
        super().__init__(message)
        self.holder = holder


@contextmanager
def taking_over(is_asked: bool = True) -> Iterator[None]:
    """A person has said that the holders of claims that are not locked are gone: in this block they are not waited for."""
    global _are_holders_gone
    before, _are_holders_gone = _are_holders_gone, is_asked
    try:
        yield
    finally:
        _are_holders_gone = before


def is_claimed_or_left(path: Path) -> bool:
    """Whether there is anything of a claim `path`, held, dead or half made."""
    return path.parent.is_dir() and any(is_name_of(entry.name, path.name) for entry in path.parent.iterdir())


def is_name_of(name: str, claim: str) -> bool:
    """Whether `name` is that of the claim `claim` or of one that is not yet in its place."""
    return name == claim or re.fullmatch(rf"{re.escape(claim)}\.[0-9a-f]{{16}}{re.escape(ASIDE)}", name) is not None


# --- looking ---------------------------------------------------------------------------------------------------------


class Observer:
    """Looks at claims, perhaps again and again; writes nothing, and no writer is refused because of it."""

    def __init__(self):
        self._patience = Patience()

    def holder_of(self, path: Path) -> str | None:
        """Who holds the claim `path`, in words; None if nobody does, because there is none or its owner is gone.

        An owner elsewhere that has not moved since the last look may be gone or not, and the words say so.
        """
        for found, is_seen in self.look(path):
            if is_seen:
                return found.who
            return (
                f"{found.who} (if it is still there: nobody can see that from here, and a writer that wants its place waits "
                f"{_minutes()} or is told --take-over)"
            )
        return None

    def look(self, path: Path) -> list[tuple[Found, bool]]:
        """The claims that make up `path` and whose owners may live; whether they were seen to: by their locks, or moving."""
        seen = []
        for file in _files_of(path):
            try:
                found = self._patience.look(file)
            except OSError:  # no claim of ours, or not for us to read
                continue
            if found is not None and not found.is_dead and not self._patience.is_over(found):
                seen.append((found, found.is_alive or self._patience.has_moved(found)))
        return seen


def holder_of(path: Path) -> str | None:
    """Who holds the claim `path`, at one look; see `Observer.holder_of`."""
    return Observer().holder_of(path)


def _files_of(path: Path) -> list[Path]:
    """The files that make up a claim: of today those in its folder, of versions before the file itself. None in a link."""
    try:
        if not stat.S_ISDIR(path.lstat().st_mode):
            return [path]
        return sorted(file for file in path.iterdir() if not file.name.startswith(".nfs"))  # deleted, and still open
    except (FileNotFoundError, NotADirectoryError):
        return []


def named_in(files: list[Path]) -> str | None:
    """Whose claim stands in the first of `files` that is readable, in words."""
    return next((found.who for found in map(find, files) if found), None)


def _minutes() -> str:
    return f"{claim_file.DEAD_S / 60:g} minutes"


# --- one holder ------------------------------------------------------------------------------------------------------


@contextmanager
def claimed(path: Path, what: str, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the claim `path` while the block runs.

    Claims of the dead are taken over. One that is alive, or begins to move while it is watched, raises ClaimHeldError naming
    the holder; with `wait`, which is then called with the holder every POLL_S seconds, it is waited for instead. While the block
    runs, publishing in the folder of the claim, or in the store that it is named after, raises ClaimLostError once somebody has
    taken over.
    """
    own = make_claim(path, what, refuse_or_tell(what) if wait is None else in_words(wait))
    try:
        clear_left(path)
        own.keep_moving()
        with guard.registered(own):
            yield
    finally:
        leave(path, own)


class _OwnInFolder(Own):
    """A claim that is alone in its folder."""

    def require(self) -> None:  # type: ignore[override]
        super().require(lambda: named_in(_files_of(self.path.parent)))


def make_claim(path: Path, what: str, refuse: Callable[[Found, Patience], None], poll_s: float | None = None) -> Own:
    """Make the claim `path`. refuse: called with a claim in the way that is not dead, at every look; may raise."""
    patience = Patience()
    while True:
        found = _obstacle(path, patience)
        if found is None:
            if own := _place(path, what):
                return own
            continue
        refuse(found, patience)
        sleep(POLL_S if poll_s is None else poll_s)


def _obstacle(path: Path, patience: Patience) -> Found | None:
    """A claim that is in the way and not dead; those of the dead are removed."""
    for file in _files_of(path):
        if file != path and not _TOKEN.fullmatch(file.name):
            raise MismatchError(f"{path} holds {file.name}, which is no claim. Move it away and try again.")
        with refusal_explained(path.parent):
            found = patience.look(file)
            if found is None:
                continue
            if not is_gone(found, patience):
                return found
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):  # somebody else was as fast
                file.unlink()
    return None


def is_gone(found: Found, patience: Patience) -> bool:
    """Whether a claim may be taken over. To be asked at once behind `look`."""
    return found.is_dead or not found.is_alive and (_are_holders_gone or patience.is_over(found))


def _place(path: Path, what: str) -> Own | None:
    """Make a claim aside, and rename it into place; None if somebody else was faster."""
    token = new_token()
    aside = path.with_name(f"{path.name}.{token}{ASIDE}")
    own = None
    try:
        with refusal_explained(path.parent, path):
            aside.mkdir()
            own = _OwnInFolder(aside / token, create(aside / token), token, what, territory(path))
        os.rename(aside, path)
        own.path = path / token
        if own.is_there():
            placed, own = own, None
            return placed
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.ENOENT) or not path.parent.is_dir():
            if own is not None:
                own.let_go()
            shutil.rmtree(aside, ignore_errors=True)
            raise
    except BaseException:
        if own is not None:
            own.let_go()
        raise
    if own is not None:
        own.let_go()
    shutil.rmtree(aside, ignore_errors=True)  # what an interrupt leaves, the next holder removes
    return None


def create(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def leave(path: Path, own: Own) -> None:
    """Remove one's own claim and nobody else's; the folder too, unless somebody has a claim in it by now."""
    own.let_go()
    with contextlib.suppress(OSError):
        path.rmdir()
    with contextlib.suppress(FileNotFoundError):
        sync_folder(path.parent)  # a power cut must not bring it back


def clear_left(path: Path) -> None:
    """Remove claims that were never renamed into place. Who still wants to finds its own gone, and begins again."""
    for left in path.parent.iterdir():
        if left != path and is_name_of(left.name, path.name):
            shutil.rmtree(left, ignore_errors=True)


def territory(path: Path) -> Path:
    """What a claim is about: the store that it is named after, else the folder it stands in."""
    named = path.with_suffix("")
    return named if named.suffix == ".zarr" else path.parent


def extent_of(path: Path) -> tuple[int, int]:
    """The shards that a claim of a range is about: (first, last + 1), by its name; all if that says nothing."""
    match = _RANGE.fullmatch(path.name)
    return (int(match[1]), int(match[2])) if match else (0, 1 << 62)


# --- words -----------------------------------------------------------------------------------------------------------


def _until(left_s: float) -> str:
    """The hour, for people, at which `left_s` seconds are over."""
    return time.strftime("%H:%M:%S", time.localtime(time.time() + max(left_s, 0)))


def refuse_or_tell(what: str, extent: tuple[int, int] | None = None) -> Callable[[Found, Patience], None]:
    """Raises for a claim that is alive; of one that may be dead it says once what happens now."""
    announced: set[Path] = set()

    def refuse(found: Found, patience: Patience) -> None:
        of_shards = "" if extent is None else "shards {}:{} ".format(*extent_of(found.path))
        if found.is_alive or patience.has_moved(found):
            if extent is None:
                message = f"{what} is being written by {found.who}. Wait for it, or stop it and try again."
            else:
                message = (
                    f"{what}: {of_shards}are being written by {found.who}, and {extent[0]}:{extent[1]} overlaps. Give --shards "
                    "that nobody works on, wait for it, or stop it and try again."
                )
            raise ClaimHeldError(message, found.who)
        if found.path not in announced:
            announced.add(found.path)
            claim_file.tell(
                f"{what}: {of_shards}{'are' if of_shards else 'is'} claimed by {found.who}, and whether that lives cannot be "
                f"seen from here. Watching its claim until {_until(patience.left_s(found))}: if it does not move, it counts as "
                "gone then, and this process goes on in its place. Who knows that it is gone can say so: --take-over."
            )

    return refuse


def in_words(wait: Callable[[str], None]) -> Callable[[Found, Patience], None]:
    """`wait`, called with words: whom one waits for and, of one that may be dead, until when."""
    until: dict[tuple[Path, bytes], str] = {}

    def tell(found: Found, patience: Patience) -> None:
        if found.is_alive:
            wait(found.who)
        elif patience.has_moved(found):
            wait(f"{found.who}, which cannot be seen from here, but moves its claim")
        else:
            end = until.setdefault((found.path, found.text), _until(patience.left_s(found)))
            wait(f"{found.who}; if its claim does not move until {end}, it counts as gone (who knows that it is: --take-over)")

    return tell


def once(say: Callable[[str], None]) -> Callable[[str], None]:
    before: set[str] = set()
    return lambda words: words in before or (before.add(words), say(words))


@contextmanager
def refusal_explained(folder: Path, path: Path | None = None) -> Iterator[None]:
    """Every writer begins with a claim, so this is where one learns that it may not write."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        why = f"{error.strerror}. Whoever writes leaves a claim there: let this user write to {folder}, or work on a copy"
        raise type(error)(error.errno, why, str(path or error.filename)) from error
