"""Files of a run: whole or absent after a crash at any moment, and never read or written outside their folder.

They are written by the means of a cache's files (teacher_cache/files/durable.py): aside, fsynced, renamed, and only as
long as this process holds the run (teacher_cache/files/claims.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from teacher_cache.errors import ClaimLostError
from teacher_cache.files import durable, guard

from ..errors import RunError

PARTIAL = durable.ASIDE
"""End of the name of a file that is still being written. Nothing reads one; the next writer replaces it."""
LARGEST_JSON = 1 << 20
"""Bytes of config.json, or of the description in a checkpoint; more than that is not ours and not read."""


@contextmanager
def _as_run_error() -> Iterator[None]:
    try:
        yield
    except ClaimLostError as error:
        raise RunError(str(error)) from error


def require_held(path: Path) -> None:
    """Raise RunError, saying by whom, if another process has taken over the run that `path` is in."""
    with _as_run_error():
        guard.require_held(path)


def aside(path: Path) -> Path:
    """Where to write what `publish` will call `path`; nothing is there, not even a link. RunError as for `require_held`."""
    with _as_run_error():
        return durable.clear_aside(path)


def publish(path: Path) -> None:
    """Give what was written to `aside(path)`, by whatever library, its name; it survives a power cut from then on.

    Its mode is that of every new file, as the umask has it. RunError as for `require_held`.
    """
    partial = durable.aside_path(path)
    durable.settle(partial)
    with _as_run_error():
        durable.publish(partial, path)


def write_whole(path: Path, data: bytes) -> None:
    """Write or replace a small file in one go. RunError as for `require_held`."""
    with _as_run_error():
        durable.write_whole(path, data)


def remove(path: Path) -> None:
    """Remove a file. RunError as for `require_held`."""
    with _as_run_error():
        durable.remove(path)


@contextmanager
def refusal_explained(path: Path) -> Iterator[None]:
    """Turn a PermissionError on reading `path` into a RunError that says whose it is and what to do."""
    try:
        yield
    except PermissionError as error:
        raise RunError(durable.not_allowed(path)) from error


def require_own(path: Path) -> None:
    """Raise RunError if `path` is a link that leads out of its folder, or a device, a pipe and such. Nothing at all is fine."""
    with refusal_explained(path):
        if path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
            raise RunError(f"{path} is a link to {path.resolve()}, outside the folder of the run. Put there what it leads to.")
        if path.exists() and not path.is_file() and not path.is_dir():
            raise RunError(f"{path} is neither a file nor a folder. Remove it.")


def require_readable(path: Path) -> None:
    """Raise RunError if `path` is there and this user may not read it: libraries say that it is not there."""
    with refusal_explained(path), open(path, "rb"):
        pass
