"""One writer at a time: a claim is a locked file that names the host and process that hold it.

The lock belongs to the kernel, so a claim ends with its process, however that ends. The text in the file is for people, and for
file systems whose locks do not reach other hosts.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import MismatchError


@contextmanager
def claimed(path: Path, what: str) -> Iterator[None]:
    """Hold the claim `path` while the block runs.

    A claim whose process on this host is gone (killed, power cut) is taken over. One held by a living process, or left by a
    process of another host, which cannot be asked, raises MismatchError naming the holder.
    """
    descriptor = _lock(path, what)
    try:
        mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, mine, 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path, what: str) -> int:
    """A descriptor of `path`, locked; MismatchError if somebody else has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            holder = _holder(descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                who = f"process {holder['pid']} on host {holder['host']}" if holder else "a process that has just started"
                raise MismatchError(f"{what} is being written by {who}. Wait for it, or stop it and try again.") from None
            if holder and holder["host"] != socket.gethostname():
                raise MismatchError(
                    f"{what} is being written by process {holder['pid']} on host {holder['host']}. Wait for it; if it is gone, "
                    f"delete {path} and try again."
                )
            if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder left, and removed the file, between our opening and locking it


def _holder(descriptor: int) -> dict | None:
    """Host and process written in a claim, or None where nothing readable is."""
    try:
        value = json.loads(os.pread(descriptor, 4096, 0))
        return {"host": str(value["host"]), "pid": int(value["pid"])}
    except (ValueError, KeyError, TypeError):
        return None
