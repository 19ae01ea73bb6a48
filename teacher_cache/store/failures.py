"""What went wrong with the shards of a store: a small file for each time, beside the claims of those who make them.

    NAME.zarr.claims/000123.TOKEN.failed    {"shard": 123, "host": "node-17", "pid": 4711, "at": "2026-11-28T13:25:09Z",
                                             "error": "...", "counts": true}

They are for people, and for processes that share a store: what failed often enough is left alone (sharing/blocks.py). A shard
that is made, and a store that is complete, have none.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ClaimLostError, MismatchError, NoSpaceError, NotInCacheError
from ..files.claim_file import new_token
from ..files.durable import read_plain
from ..format.layout import FAILED_SUFFIX, FAILURES, store_claims

if TYPE_CHECKING:
    from .store import Store

MOST_TEXT = 2000
"""Characters of an error that are kept."""
MOST_BYTES = 1 << 16
_NAME = re.compile(rf"([0-9]{{6,}})\.[0-9a-f]{{16}}{re.escape(FAILED_SUFFIX)}")


@dataclass(frozen=True)
class Failure:
    """One time that a shard was not made."""

    shard: int
    error: str
    host: str
    pid: int
    at: str
    """When, UTC, by the clock of that host."""
    counts: bool = True
    """Whether it may be the shard's fault; False: the disk's, or that of whoever removed the store."""

    @classmethod
    def of(cls, shard: int, error: BaseException) -> Failure:
        """`error`, as it happened in this process just now."""
        return cls(shard, in_words(error)[:MOST_TEXT], socket.gethostname(), os.getpid(), utc_now(), is_of_a_shard(error))


def in_words(error: BaseException) -> str:
    """What an error says; of one that is not this package's, with its kind."""
    text = str(error) if isinstance(error, Exception) and type(error).__module__.startswith("teacher_cache") else ""
    return text or f"{type(error).__name__}: {error}".removesuffix(": ")


def utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def is_of_a_shard(error: BaseException) -> bool:
    """Whether `error` may be the fault of what was worked on; else the next shard would meet it too."""
    if isinstance(error, ClaimLostError | MismatchError | NoSpaceError | NotInCacheError | MemoryError):
        return False
    if isinstance(error, OSError):
        return error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
    return isinstance(error, Exception) and type(error).__name__ != "OutOfMemoryError"  # torch's, which is not imported here


def record(store: Path, failure: Failure) -> None:
    """Leave it beside the claims of `store`. On a disk that takes no more, nothing is left."""
    with (
        contextlib.suppress(OSError),
        open(store_claims(store) / f"{failure.shard:06d}.{new_token()}{FAILED_SUFFIX}", "x") as file,
    ):
        file.write(json.dumps(asdict(failure)))


def blame(store: Store, shards: range, error: Exception) -> tuple[Failure, int] | None:
    """Record `error` against the first of `shards` that is not finished: they are made in order. Nothing here may hide `error`.

    Returns the failure, and for how many times that shard has failed by that; None if there is none to blame, or no store.
    """
    with contextlib.suppress(Exception):
        for shard in store.unfinished():
            if shard in shards:
                failure, n_before = Failure.of(shard, error), len(by_shard(read(store.path)).get(shard, ()))
                record(store.path, failure)
                return failure, n_before + 1
    return None


def by_shard(found: Iterable[Failure]) -> dict[int, list[Failure]]:
    """Shard -> those of its failures that count, in their order."""
    counted: dict[int, list[Failure]] = {}
    for failure in found:
        if failure.counts:
            counted.setdefault(failure.shard, []).append(failure)
    return counted


def read(store: Path) -> list[Failure]:
    """All that are there, by shard and time. What is damaged, or goes away meanwhile, is left out."""
    found = []
    for path in _files(store):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            told = json.loads(read_plain(path, MOST_BYTES))
            found.append(Failure(int(told["shard"]), str(told["error"]), str(told["host"]), int(told["pid"]), str(told["at"]),
                                 told["counts"] is True))  # fmt: skip
    return sorted(found, key=lambda failure: (failure.shard, failure.at))


def forget(store: Path, shards: range | None = None) -> None:
    """Remove those of `shards`, which are made; None: all."""
    for path in _files(store):
        if shards is None or int(_NAME.fullmatch(path.name)[1]) in shards:  # type: ignore[index]
            path.unlink(missing_ok=True)


def _files(store: Path) -> list[Path]:
    try:
        return [path for path in sorted(store_claims(store).glob(FAILURES)) if _NAME.fullmatch(path.name)]
    except FileNotFoundError:
        return []
