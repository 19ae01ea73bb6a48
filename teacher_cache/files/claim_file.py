"""One claim on disk: a file that is locked, says whose it is, and holds a counter that its owner moves.

    {"host": "node-17", "boot": "5a3f...", "pid": 4711, "token": "90c1d2...", "locked": true,
     "since": "2026-11-28T13:25:09Z", "rate": "00001234.500", "beat": "000000000042"}

The lock is the kernel's and ends with the process, however that ends. Where locks do not reach (another host on most shared file
systems; none at all on some) only the counter tells whether its owner lives: one thread of each process moves the counters of all
its claims every BEAT_S seconds, whatever the other threads do. A host is its name and the number of its boot: a machine that was
started again, or another one of the same name, is another host. `since` and `rate` (units a second) are for people: nothing
is decided by them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ..errors import ClaimLostError

BEAT_S = 20.0
"""Between two movements of a counter."""
DEAD_S = 300.0
"""A counter that has not moved for so long, by the clock of whoever watches it, belongs to nobody."""
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What flock says on a file system that has none."""
MOST_BYTES = 4096


LOOK_S = 0.1
"""For so long a holder tries to lock its own claim, because it may be looked at."""


def now() -> float:
    """Seconds of this process's own clock, which nobody sets."""
    return time.monotonic()


def tell(line: str) -> None:
    """Say something on stderr."""
    print(line, file=sys.stderr, flush=True)


@cache
def boot_id() -> str | None:
    """What the kernel drew when it started; None where it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def new_token() -> str:
    """16 hex digits that no other claim has."""
    return secrets.token_hex(8)


def lock(descriptor: int, folder: Path) -> bool:
    """Lock a file for as long as it stays open; False where the file system has no locks, which is said once.

    Nobody else takes it, but somebody may look whether it is locked just now: LOOK_S are waited for that.
    """
    given_up = time.monotonic() + LOOK_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > given_up:
                raise
            time.sleep(LOOK_S / 50)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            _tell_of_no_locks(folder, error.strerror)
            return False


_has_told = False


def _tell_of_no_locks(folder: Path, why: str) -> None:
    global _has_told
    if _has_told:
        return
    _has_told = True
    tell(f"{folder}: this file system has no locks ({why}). One writer at a time is kept by exclusive creation instead; what a "
         f"killed process leaves is taken over when it has not moved for {DEAD_S / 60:g} minutes.")  # fmt: skip


def is_locked(descriptor: int) -> bool | None:
    """Whether another process holds the lock of a file; None where that cannot be told. Several may ask at once."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


# --- of others -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A claim as somebody finds it."""

    path: Path
    text: bytes
    is_locked: bool | None
    holder: dict | None = field(init=False)
    """What `text` says: host and pid, and from a claim of today boot, token, locked and beat. None if it is not readable."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "holder", _read(self.text))

    @property
    def who(self) -> str:
        return f"process {self.holder['pid']} on host {self.holder['host']}" if self.holder else "a process that has just started"

    @property
    def is_alive(self) -> bool:
        """Whether its owner lives for certain: it has the lock, or is this very process."""
        return bool(self.is_locked) or (self.holder or {}).get("token") in _tokens()

    @property
    def is_dead(self) -> bool:
        """Whether its owner is gone for certain: nobody has a lock that could be seen from here."""
        if self.is_alive or self.is_locked is None:
            return False
        if self.holder is None:
            return True
        is_here = self.holder["host"] == socket.gethostname() and self.holder.get("boot", boot_id()) == boot_id()
        return is_here and self.holder.get("locked", True)


def find(path: Path) -> Found | None:
    """The claim in the file `path`, never in what a link under its name leads to; None if there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return Found(path, os.pread(descriptor, MOST_BYTES, 0), is_locked(descriptor))
    finally:
        os.close(descriptor)


def _read(text: bytes) -> dict | None:
    try:
        value = json.loads(text)
        known = {"host": str(value["host"]), "pid": int(value["pid"])}
        return known | {key: value[key] for key in ("boot", "token", "locked", "beat", "since", "rate") if key in value}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


class Patience:
    """For how long claims have not moved, as this process has seen them."""

    def __init__(self):
        self._seen: dict[Path, tuple[bytes, float]] = {}
        self._moved: set[Path] = set()

    def look(self, path: Path) -> Found | None:
        """The claim in `path`, which is thereby watched from now on."""
        asked = now()
        found = find(path)
        if found is None:
            self._seen.pop(path, None)
            return None
        before = self._seen.get(path)
        if before is None or before[0] != found.text:
            if before is not None:
                self._moved.add(path)
            self._seen[path] = found.text, now()
        elif asked - before[1] >= DEAD_S:
            self._moved.discard(path)
        return found

    def has_moved(self, found: Found) -> bool:
        return found.path in self._moved

    def is_over(self, found: Found) -> bool:
        """Whether it has not moved for so long that it belongs to nobody. To be asked at once behind `look`."""
        return self.left_s(found) <= 0

    def left_s(self, found: Found) -> float:
        """Seconds until it belongs to nobody, unless it moves."""
        return self._seen[found.path][1] + DEAD_S - now()


# --- one's own -------------------------------------------------------------------------------------------------------


class Own:
    """A claim that this process holds, in the file `path` that it has made; moved until `let_go`.

    descriptor: of that file, open for writing. what: in words, for messages. covers: see guard.Held. rate: see `report`.
    """

    def __init__(self, path: Path, descriptor: int, token: str, what: str, covers: Path, rate: float = 0.0, **extent: int):
        self.path, self.token, self.what, self.covers = path, token, what, str(covers.absolute())
        self.leftovers: dict[Path, list[str]] = {}
        self._descriptor: int | None = descriptor
        self._n_beats, self._beaten, self._trouble = 0, now(), ""
        self.report(rate)
        self._moving = threading.Lock()
        is_locked = lock(descriptor, covers)
        self._text = {"host": socket.gethostname(), "boot": boot_id(), "pid": os.getpid(), "token": token,
                      "locked": is_locked, "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **extent}  # fmt: skip
        self._write()

    def _write(self) -> None:
        """As long as before, so that nobody ever reads the half of it; on the disk, so that other hosts see it."""
        moving = {"rate": f"{self._rate:012.3f}", "beat": f"{self._n_beats:012d}"}
        os.pwrite(self._descriptor, json.dumps({**self._text, **moving}).encode(), 0)
        os.fsync(self._descriptor)

    def move(self) -> None:
        """Show that its owner lives. What goes wrong is kept for `require`."""
        with self._moving:
            if self._descriptor is None:
                return
            self._n_beats += 1
            try:
                self._write()
                self._beaten, self._trouble = now(), ""
            except OSError as error:
                self._trouble = error.strerror or str(error)

    def report(self, rate: float) -> None:
        """Say how many units a second its owner works; written when the claim is moved the next time."""
        self._rate = min(max(rate, 0.0), 99_999_999.0)

    def is_there(self) -> bool:
        """Whether the file still stands where it was made: its name has the token, and nobody makes it again."""
        try:  # opening it asks the server, where a file system remembers names
            os.close(os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
                raise
            return False
        return True

    def require(self, successor: Callable[[], str | None] = lambda: None) -> None:
        """Raise ClaimLostError unless the claim is still held. successor: says who took over, as far as can be seen."""
        if not self.is_there():
            who = successor()
            how = f"was taken over by {who}" if who else f"is no longer claimed by this process: {self.path} was removed"
            raise ClaimLostError(f"{self.what} {how}; nothing more is written.")
        _heart.see_to_it()
        if self._trouble and now() - self._beaten > DEAD_S / 2:
            raise ClaimLostError(
                f"{self.what} can no longer be held: {self.path} cannot be written ({self._trouble}). Nothing more is written."
            )

    def let_go(self) -> None:
        """Remove it, or what is left of it. In this order, because some file systems keep what is open."""
        with self._moving:
            descriptor, self._descriptor = self._descriptor, None
        _heart.forget(self)
        if descriptor is not None:
            os.close(descriptor)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self.path.unlink()

    def keep_moving(self) -> None:
        """Have it moved from now on."""
        _heart.remember(self)

    def after_fork(self) -> None:
        self._moving = threading.Lock()


class _Heart:
    """The thread that moves the counters of this process: a daemon, there as long as there is a claim to move."""

    def __init__(self):
        self._claims: list[Own] = []
        self._thread: threading.Thread | None = None
        self._changing = threading.Lock()

    def remember(self, claim: Own) -> None:
        with self._changing:
            self._claims.append(claim)
        self.see_to_it()

    def forget(self, claim: Own) -> None:
        with self._changing:
            self._claims = [other for other in self._claims if other is not claim]

    def see_to_it(self) -> None:
        """Start the thread if it is not there: at first, in a forked child, or if it was lost for whatever reason."""
        with self._changing:
            if self._claims and (self._thread is None or not self._thread.is_alive()):
                self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)
                self._thread.start()

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT_S)
            with self._changing:
                if not self._claims:
                    self._thread = None
                    return
                claims = list(self._claims)
            for claim in claims:
                claim.move()

    def tokens(self) -> set[str]:
        return {claim.token for claim in list(self._claims)}

    def after_fork(self) -> None:
        self._changing, self._thread = threading.Lock(), None
        for claim in self._claims:
            claim.after_fork()


_heart = _Heart()
os.register_at_fork(after_in_child=_heart.after_fork)


def _tokens() -> set[str]:
    """Of all claims that this process holds."""
    return _heart.tokens()
