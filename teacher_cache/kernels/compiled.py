"""Compiled functions that are kept: compiled once on a machine, not once a process, which takes ten seconds.

numba keeps machine code as pickle, and whoever can write it runs code as its reader. So it lies in a folder that is the user's
own and nobody else's, and never inside a cache or a run: `$XDG_CACHE_HOME/teacher-cache/kernels`, by default below ~/.cache. It
may be deleted at any time. Where there can be no such folder, every process compiles for itself, and says so once.

numba numbers its files without a lock: two processes that save two signatures of one function at once can leave an index that
calls one of them by the other's name. So files are saved under a lock, and not at all where there are no locks.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

from ..files.durable import user_cache_folder

from . import pointers  # isort: skip - before numba, whose threading layer it chooses

import numba
from numba import njit
from numba.core import config
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature

log = logging.getLogger(__name__)
IS_PARALLEL = min(config.NUMBA_NUM_THREADS, len(os.sched_getaffinity(0))) > 1
"""Whether parallel loops are. On one processor a pool is of no use, and TBB's, begun by a thread that has ended, keeps its
process from ever ending (numba 0.68.1)."""
_SOURCES = sorted(Path(pointers.__file__).parent.glob("*.py"))


def kernel(parallel: bool = False) -> Callable[[Callable], Callable]:
    """numba.njit without the GIL, with its machine code kept. The function and what it calls are of this folder alone."""

    def decorate(function: Callable) -> Callable:
        compiled = njit(nogil=True, parallel=parallel and IS_PARALLEL)(function)
        _keep(compiled, function)
        return compiled

    return decorate


def callback(signature) -> Callable[[Callable], CFunc]:
    """numba.cfunc, a function with an address for C, with its machine code kept. As for `kernel`; and it closes over nothing that
    differs between processes."""

    def decorate(function: Callable) -> CFunc:
        compiled = CFunc(function, normalize_signature(signature), locals={}, options={"nopython": True})
        _keep(compiled, function)
        compiled.compile()
        return compiled

    return decorate


def _keep(compiled, function: Callable) -> None:
    if folder := kernel_folder():
        before, config.CACHE_DIR = config.CACHE_DIR, str(folder)  # read when a cache is made
        try:
            compiled._cache = _LockedCache(function)
        finally:
            config.CACHE_DIR = before


@functools.cache
def kernel_folder() -> Path | None:
    """The folder of this version's machine code, made if need be; None where there can be none that is safe."""
    try:
        folder = user_cache_folder() / "teacher-cache"
        folder.parent.mkdir(parents=True, exist_ok=True)
        for part in (folder, folder / "kernels", folder / "kernels" / _version()):
            _own_folder(part)
            folder = part
        with open(folder / "lock", "ab"):
            return folder
    except OSError as error:
        log.warning("Compiled loops cannot be kept (%s), so that every start compiles them anew, for about ten seconds. "
                    "Let XDG_CACHE_HOME name a folder that is your own.", error)  # fmt: skip
        return None


def _own_folder(folder: Path) -> None:
    """Make `folder` with mode 0700; raise PermissionError if one is there that others own or can write into."""
    try:
        folder.mkdir(0o700)
    except FileExistsError:
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise PermissionError(f"{folder} is no folder of this user") from None
        if found.st_mode & 0o077:
            raise PermissionError(f"{folder} is open to others (mode {stat.S_IMODE(found.st_mode):o}); chmod 700 it") from None


def _version() -> str:
    """What the machine code depends on beyond what numba compares (Python, processor, signature): all sources, not one alone."""
    digest = hashlib.sha256(f"{numba.__version__} {IS_PARALLEL}".encode())
    for path in _SOURCES:
        digest.update(path.read_bytes() + str(path.stat().st_mtime_ns).encode())
    return digest.hexdigest()[:16]


class _LockedCache(FunctionCache):
    """numba's, with a lock where it has none; what cannot be read or written is compiled instead."""

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # a file that a power cut left, in pickle: nearly anything is raised
            self.flush()
            return None

    def save_overload(self, sig, data):
        try:
            with open(kernel_folder() / "lock", "ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                super().save_overload(sig, data)
        except OSError as error:
            log.warning("A compiled loop was not kept (%s): %s", self._name, error)
