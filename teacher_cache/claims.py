"""One writer at a time: a claim is a small file that names the host and process that hold it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import MismatchError


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def claimed(path: Path, what: str) -> Iterator[None]:
    """Hold the claim `path` while the block runs.

    A claim whose process on this host is gone (killed, power cut) is taken over. One held by a living process, or by a
    process of another host, which cannot be asked, raises MismatchError naming the holder.
    """
    mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
    for _ in range(3):  # a stale claim may be removed and taken by a rival in between
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            break
        except FileExistsError:
            _remove_stale(path, what)
    else:
        raise MismatchError(f"{what}: another process took {path} at the same moment. Run the command again.")
    try:
        os.write(descriptor, mine.encode())
        os.close(descriptor)
        yield
    finally:
        path.unlink(missing_ok=True)


def _remove_stale(path: Path, what: str) -> None:
    """Remove the claim if its process is surely gone, else raise MismatchError."""
    try:
        holder = json.loads(path.read_text())
        host, pid = str(holder["host"]), int(holder["pid"])
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        # created but not yet written: the writer died in between, or is just starting
        raise MismatchError(f"{what} is claimed by {path}, which names no process. If none is running, delete that file.") from None
    if host != socket.gethostname():
        raise MismatchError(
            f"{what} is being written by process {pid} on host {host}. Wait for it; if it is gone, delete {path} and try again."
        )
    if pid != os.getpid() and _is_alive(pid):
        raise MismatchError(f"{what} is being written by process {pid} on this host. Wait for it, or stop it and try again.")
    path.unlink(missing_ok=True)
