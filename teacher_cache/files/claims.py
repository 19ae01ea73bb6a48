"""Who may write: one holder at a time, known to all, succeeded when it is gone and never while it lives.

    crops.claim/TOKEN, NAME.zarr.claim/TOKEN    `claimed`: one holder, in a folder that can hold one claim only
    NAME.zarr.claims/FFFFFF-LLLLLL.TOKEN.claim  `claimed_range`: one file a holder; `gate` is claimed for the moment in which a
                                                holder looks at the others and adds or removes its own

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

GATE = "gate"
POLL_S = 0.5
GATE_POLL_S = 0.01
TIDY_S = 2.0
"""For so long a holder that leaves waits for the gate, to remove what nobody needs any more."""
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
        for file in _files_of(path):
            try:
                found = self._patience.look(file)
            except OSError:  # no claim of ours, or not for us to read
                continue
            if found is None or found.is_dead or self._patience.is_over(found):
                continue
            if found.is_alive or self._patience.has_moved(found):
                return found.who
            return (
                f"{found.who} (if it is still there: nobody can see that from here, and a writer that wants its place waits "
                f"{_minutes()} or is told --take-over)"
            )
        return None


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


def _named_in(files: list[Path]) -> str | None:
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
    own = _claim(path, what, _refuse_or_tell(what) if wait is None else _words(wait))
    try:
        _clear_left(path)
        own.keep_moving()
        with guard.registered(own):
            yield
    finally:
        _leave(path, own)


class _OwnInFolder(Own):
    """A claim that is alone in its folder."""

    def require(self) -> None:  # type: ignore[override]
        super().require(lambda: _named_in(_files_of(self.path.parent)))


def _claim(path: Path, what: str, refuse: Callable[[Found, Patience], None], poll_s: float | None = None) -> Own:
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
        with _refusal_explained(path.parent):
            found = patience.look(file)
            if found is None:
                continue
            if not _is_gone(found, patience):
                return found
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):  # somebody else was as fast
                file.unlink()
    return None


def _is_gone(found: Found, patience: Patience) -> bool:
    """Whether a claim may be taken over. To be asked at once behind `look`."""
    return found.is_dead or not found.is_alive and (_are_holders_gone or patience.is_over(found))


def _place(path: Path, what: str) -> Own | None:
    """Make a claim aside, and rename it into place; None if somebody else was faster."""
    token = new_token()
    aside = path.with_name(f"{path.name}.{token}{ASIDE}")
    own = None
    try:
        with _refusal_explained(path.parent, path):
            aside.mkdir()
            own = _OwnInFolder(aside / token, _create(aside / token), token, what, _territory(path))
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


def _create(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _leave(path: Path, own: Own) -> None:
    """Remove one's own claim and nobody else's; the folder too, unless somebody has a claim in it by now."""
    own.let_go()
    with contextlib.suppress(OSError):
        path.rmdir()
    with contextlib.suppress(FileNotFoundError):
        sync_folder(path.parent)  # a power cut must not bring it back


def _clear_left(path: Path) -> None:
    """Remove claims that were never renamed into place. Who still wants to finds its own gone, and begins again."""
    for left in path.parent.iterdir():
        if left != path and is_name_of(left.name, path.name):
            shutil.rmtree(left, ignore_errors=True)


def _territory(path: Path) -> Path:
    """What a claim is about: the store that it is named after, else the folder it stands in."""
    named = path.with_suffix("")
    return named if named.suffix == ".zarr" else path.parent


# --- ranges ----------------------------------------------------------------------------------------------------------


@contextmanager
def claimed_range(folder: Path, first: int, last: int, what: str) -> Iterator[None]:
    """Hold the shards first, ..., last - 1 of what `folder` guards while the block runs; others may hold other shards.

    Raises ClaimHeldError naming the holder and its range if that overlaps and is alive, or begins to move while it is watched.
    Claims of the dead are removed. When the last holder leaves, so does the folder.
    """
    patience, refuse = Patience(), _refuse_or_tell(what, (first, last))
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
        sleep(POLL_S)
    try:
        own.keep_moving()
        with guard.registered(own):
            yield
    finally:
        own.let_go()
        # only to tidy up, which the next holder does as well: nothing that goes wrong here may hide what ended the block
        with contextlib.suppress(OSError, ClaimHeldError), _gate(folder, what, TIDY_S):
            pass


class _OwnRange(Own):
    """A claim on shards `first` to `last` - 1."""

    def __init__(self, path: Path, descriptor: int, token: str, what: str, first: int, last: int):
        super().__init__(path, descriptor, token, what, _territory(path.parent), first=first, last=last)
        self.first, self.last = first, last

    def require(self) -> None:  # type: ignore[override]
        super().require(self._successor)

    def _successor(self) -> str | None:
        others = (path for path in self.path.parent.glob("*.claim") if _overlaps(path, self.first, self.last))
        return _named_in(sorted(others))


def _place_range(folder: Path, first: int, last: int, what: str) -> _OwnRange:
    token = new_token()
    path = folder / f"{first:06d}-{last:06d}.{token}.claim"
    with _refusal_explained(folder.parent):
        descriptor = _create(path)
    try:
        return _OwnRange(path, descriptor, token, what, first, last)
    except BaseException:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise


def _overlaps(path: Path, first: int, last: int) -> bool:
    begin, end = extent_of(path)
    return begin < last and first < end


def extent_of(path: Path) -> tuple[int, int]:
    """The shards that a claim of a range is about: (first, last + 1), by its name; all if that says nothing."""
    match = _RANGE.fullmatch(path.name)
    return (int(match[1]), int(match[2])) if match else (0, 1 << 62)


def _overlapping(folder: Path, first: int, last: int, patience: Patience) -> Found | None:
    """A claim that overlaps first:last and is not dead; those of the dead are removed, overlapping or not."""
    obstacle = None
    for path in sorted(folder.glob("*.claim")):
        with _refusal_explained(folder.parent):
            found = patience.look(path)
            if found is None:
                continue
            if found.is_dead or _overlaps(path, first, last) and _is_gone(found, patience):
                path.unlink(missing_ok=True)
            elif _overlaps(path, first, last):
                obstacle = obstacle or found
    return obstacle


@contextmanager
def _gate(folder: Path, what: str, most_s: float | None = None) -> Iterator[Own]:
    """Be the only one that looks at or changes the claims in `folder`; made if it is missing, removed if it is left empty.

    most_s: seconds after which a gate that somebody else holds raises ClaimHeldError; None: it is waited for.
    """
    gate, refuse = folder / GATE, _words(_once(lambda who: claim_file.tell(f"{what}: waiting for {who}")))
    began = claim_file.now()

    def wait(found: Found, patience: Patience) -> None:
        if most_s is not None and claim_file.now() - began > most_s:
            raise ClaimHeldError(f"{what}: {found.who} looks at its claims.", found.who)
        if most_s is None and not found.is_alive:
            refuse(found, patience)

    while True:
        try:
            with _refusal_explained(folder.parent), contextlib.suppress(FileExistsError):
                folder.mkdir()
            if folder.is_symlink():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
            own = _claim(gate, what, wait, GATE_POLL_S)
            break
        except FileNotFoundError:
            if not folder.parent.is_dir():
                raise
    try:
        _clear_left(gate)
        yield own
    finally:
        is_last = not any(folder.glob("*.claim"))
        _leave(gate, own)
        if is_last:
            with contextlib.suppress(OSError):  # a newcomer has made its gate there
                folder.rmdir()
                sync_folder(folder.parent)


# --- words -----------------------------------------------------------------------------------------------------------


def _until(left_s: float) -> str:
    """The hour, for people, at which `left_s` seconds are over."""
    return time.strftime("%H:%M:%S", time.localtime(time.time() + max(left_s, 0)))


def _refuse_or_tell(what: str, extent: tuple[int, int] | None = None) -> Callable[[Found, Patience], None]:
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


def _words(wait: Callable[[str], None]) -> Callable[[Found, Patience], None]:
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


def _once(say: Callable[[str], None]) -> Callable[[str], None]:
    before: set[str] = set()
    return lambda words: words in before or (before.add(words), say(words))


@contextmanager
def _refusal_explained(folder: Path, path: Path | None = None) -> Iterator[None]:
    """Every writer begins with a claim, so this is where one learns that it may not write."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        why = f"{error.strerror}. Whoever writes leaves a claim there: let this user write to {folder}, or work on a copy"
        raise type(error)(error.errno, why, str(path or error.filename)) from error
