"""Who may write: a claim is a locked file that names the host and process that hold it.

The lock belongs to the kernel, so a claim ends with its process, however that ends. The text in the file is for people, and for
file systems whose locks do not reach other hosts: a claim of another host that is not locked cannot be told from one whose
process is gone, so it is respected, and the message names the file to delete.

    crops.claim, NAME.zarr.claim    `claimed`: one holder
    NAME.zarr.claims/               `claimed_range`: one file a holder, NNNNNN-NNNNNN.claim; `gate`, which is locked for the
                                    moment in which a holder looks at the others and adds or removes its own
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .durable import sync_folder
from .errors import MismatchError

GATE = "gate"
POLL_S = 0.5
LOOK_S = 0.1
"""For so long a writer tries to lock a claim, because it may only be looked at (`holder_of`)."""


class ClaimHeldError(MismatchError):
    """Somebody else holds the claim; `holder` says who, in words."""

    def __init__(self, message: str, holder: str):
        super().__init__(message)
        self.holder = holder


def store_claim(store: Path) -> Path:
    """The claim of whoever begins, completes or repairs a store."""
    return store.with_name(f"{store.name}.claim")


def store_claims(store: Path) -> Path:
    """The claims of those who make its shards."""
    return store.with_name(f"{store.name}.claims")


def holder_of(path: Path) -> str | None:
    """Who holds the claim `path`, in words; None if nobody does, also because its process on this host is gone.

    It only looks: nothing is written, and no writer is refused because of it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # gone, or no claim of ours
        return None
    try:
        is_free, holder = _is_unlocked(descriptor), _read(descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    if is_free:
        return f"{_named(holder)} (if it is gone, delete {path})" if _is_elsewhere(holder) else None
    return _named(holder)


def _is_unlocked(descriptor: int) -> bool:
    """Whether nobody holds a claim; several may ask at once, and a writer waits LOOK_S for them."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return True


@contextmanager
def claimed(path: Path, what: str, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the claim `path` while the block runs.

    A claim whose process on this host is gone (killed, power cut) is taken over. One held by a living process, or left by a
    process of another host, which cannot be asked, raises ClaimHeldError naming the holder. With `wait`, which is then told the
    holder every POLL_S seconds, it is waited for instead.
    """
    while True:
        try:
            descriptor = _lock(path, what)
            break
        except ClaimHeldError as error:
            if wait is None:
                raise
            wait(error.holder)
        time.sleep(POLL_S)
    try:
        _sign(descriptor)
        yield
    finally:
        try:
            _remove_own(path, descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def claimed_range(folder: Path, first: int, last: int, what: str) -> Iterator[None]:
    """Hold the shards first, ..., last - 1 of what `folder` guards while the block runs; others may hold other shards.

    Raises ClaimHeldError naming the holder and its range if that overlaps. Claims whose process on this host is gone are
    removed. When the last holder leaves, so does the folder.
    """
    path = folder / f"{first:06d}-{last:06d}.claim"
    with _gate(folder):
        for other in sorted(folder.glob("*.claim")):
            _respect(other, first, last, what)
        descriptor = _open(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # behind the gate at most somebody looks at it
            _sign(descriptor, first=first, last=last)
        except BaseException:
            _remove_own(path, descriptor)
            os.close(descriptor)
            raise
    try:
        yield
    finally:
        try:
            with contextlib.suppress(FileNotFoundError), _gate(folder):  # the view may have been deleted, claims and all
                _remove_own(path, descriptor)
        finally:
            os.close(descriptor)


def _lock(path: Path, what: str) -> int:
    """A descriptor of `path`, locked; ClaimHeldError if somebody else has it."""
    while True:
        descriptor = _open(path)
        try:
            is_free, holder = _try_lock(descriptor), _read(descriptor)
            who = _named(holder)
            if not is_free:
                raise ClaimHeldError(f"{what} is being written by {who}. Wait for it, or stop it and try again.", who)
            if _is_at(path, descriptor):
                if not _is_elsewhere(holder):
                    return descriptor
                who_if_gone = f"{who}; if it is gone, delete {path}"
                raise ClaimHeldError(f"{what} is being written by {who_if_gone} and try again.", who_if_gone)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder left, and removed the file, between our opening and locking it


def _respect(path: Path, first: int, last: int, what: str) -> None:
    """Raise ClaimHeldError if the claim `path` is in force and overlaps first:last; remove it if its process is gone."""
    descriptor = _open(path)
    try:
        is_free, holder = _try_lock(descriptor), _read(descriptor)
        if is_free and not _is_elsewhere(holder):
            path.unlink()
            return
        held = (holder["first"], holder["last"]) if holder and "last" in holder else (first, last)
        if held[0] < last and first < held[1]:
            who = _named(holder)
            if_gone = f"; if it is gone, delete {path} and try again" if is_free else ", or stop it and try again"
            raise ClaimHeldError(
                f"{what}: shards {held[0]}:{held[1]} are being written by {who}, and {first}:{last} overlaps. Give --shards that "
                f"nobody works on, wait for it{if_gone}.", who,
            )  # fmt: skip
    finally:
        os.close(descriptor)


@contextmanager
def _gate(folder: Path) -> Iterator[None]:
    """Be the only one that looks at or changes the claims in `folder`; made if it is missing, removed if it is left empty."""
    gate = folder / GATE
    while True:
        try:
            with _refusal_explained(folder.parent), contextlib.suppress(FileExistsError):
                folder.mkdir()
            descriptor = _open(gate)
        except FileNotFoundError:
            if not folder.parent.is_dir() or folder.is_symlink():
                raise
            continue  # the last holder has just removed it
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(gate, descriptor):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        yield
    finally:
        if not any(folder.glob("*.claim")):
            gate.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a newcomer has made its gate there
                folder.rmdir()
                sync_folder(folder.parent)
        os.close(descriptor)


def _open(path: Path) -> int:
    """A descriptor of a claim, made if it is missing; never of what a symlink under its name leads to."""
    with _refusal_explained(path.parent):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)


@contextmanager
def _refusal_explained(folder: Path) -> Iterator[None]:
    """Every writer begins with a claim, so this is where one learns that it may not write."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        why = f"{error.strerror}. Whoever writes leaves a claim there: let this user write to {folder}, or work on a copy"
        raise type(error)(error.errno, why, error.filename) from error


def _remove_own(path: Path, descriptor: int) -> None:
    """Remove a claim, unless somebody has deleted it and another process has its own there now."""
    if _is_at(path, descriptor):
        path.unlink()
        sync_folder(path.parent)  # a power cut must not bring it back


def _try_lock(descriptor: int) -> bool:
    """Lock a claim if nobody else has for longer than it takes to look at it."""
    given_up = time.monotonic() + LOOK_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > given_up:
                return False
        time.sleep(LOOK_S / 50)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file still is what `path` names."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(descriptor: int, **extent: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), **extent}).encode(), 0)


def _read(descriptor: int) -> dict | None:
    """Host, process and perhaps range written in a claim, or None where nothing readable is."""
    try:
        value = json.loads(os.pread(descriptor, 4096, 0))
        numbers = {key: int(value[key]) for key in ("pid", "first", "last") if key == "pid" or key in value}
        return {"host": str(value["host"]), **numbers}
    except (ValueError, KeyError, TypeError):
        return None


def _named(holder: dict | None) -> str:
    return f"process {holder['pid']} on host {holder['host']}" if holder else "a process that has just started"


def _is_elsewhere(holder: dict | None) -> bool:
    return holder is not None and holder["host"] != socket.gethostname()
