"""A process that dies at its k-th call that changes anything below one folder: killed there, or with the power cut.

`Mortal` stands between the program and the system: every open that creates or empties a file, every write that reaches the
system (buffers are Python's own, and lost with the process), every fsync, rename, mkdir, unlink and so on below `root` is one
call. At call k the process ends by os._exit. A write that is killed has written the first half of its bytes.

What a power cut takes is decided harshly: of a file that was written since its last fsync half of the length is left, and a new
name, a rename or a removal in a folder that was not fsynced since never happened. POSIX allows a new folder to vanish with all
that was fsynced inside it (`harsh`); file systems with a journal keep it. A kill takes nothing. What lies between is up to the
file system, and is not tried here.

Gives up: memory maps, and files written from C (safetensors); the crop stage and extraction use neither to write.
"""

# ruff: noqa: PTH100, PTH102, PTH103, PTH108, PTH113, PTH115, PTH118, PTH120
# pathlib would call the very functions that are replaced here

from __future__ import annotations

import builtins
import io
import os
import shutil
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from teacher_cache.extraction.background import THREAD

EXIT = 9
"""Exit code of a process that died where it was told to."""
DIED = "died at:"
"""What it says last, before the call."""


@dataclass
class Undurable:
    """A change of a folder that was not fsynced since."""

    folder: str
    """The folder whose fsync makes it durable."""
    kind: str
    """made, made folder, renamed, removed, removed folder"""
    path: str
    other: str = ""
    """renamed: the old name."""
    stash: str = ""
    """renamed, removed: a second link to the file that was lost, if there was one."""


class Mortal:
    """Count the calls below `root`, and die at call `at` (from 0): by a `kill`, by a cut of the `power`, or a `harsh` one.

    calls: what each call so far was, `operation relative/path`.
    """

    def __init__(self, root: Path, at: int | None = None, death: str = "kill"):
        self.root, self.at = os.path.realpath(root), at
        self.power, self.harsh = death != "kill", death == "harsh"
        self.stash = f"{self.root}.stash"
        self.calls: list[str] = []
        self.undurable: list[Undurable] = []
        self.unsynced: set[tuple[int, int]] = set()
        """(device, inode) of files written since their last fsync."""
        self.standing_in = {
            "open": self._open, "write": self._write, "pwrite": self._pwrite, "ftruncate": self._ftruncate,
            "posix_fallocate": self._posix_fallocate, "fsync": self._fsync, "fdatasync": self._fsync, "rename": self._rename,
            "replace": self._rename, "mkdir": self._mkdir, "rmdir": self._rmdir, "unlink": self._unlink, "remove": self._unlink,
        }  # fmt: skip
        self.system = {name: getattr(os, name) for name in self.standing_in}
        self.system_open = builtins.open

    def install(self) -> None:
        """From now on, for the rest of this process."""
        if self.power:
            os.makedirs(self.stash, exist_ok=True)
        for name, function in self.standing_in.items():
            setattr(os, name, function)
        builtins.open = io.open = self._open_file

    # --- dying -------------------------------------------------------------------------------------------------------

    def is_ours(self, path: str) -> bool:
        return is_in(path, self.root)

    def call(self, operation: str, path: str, dying=lambda: None) -> None:
        """A call that is about to be made: die instead, having done `dying`, if it is the one."""
        assert threading.current_thread().name in ("MainThread", THREAD), "writes of other threads have no order to count them in"
        if len(self.calls) == self.at:
            code = 1  # should dying itself fail: nobody may take that for an error of the program
            try:
                dying()
                if self.power:
                    self._cut_power()
                self.system["write"](2, f"{DIED} {operation} {os.path.relpath(path, self.root)}\n".encode())
                code = EXIT
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        self.calls.append(f"{operation} {os.path.relpath(path, self.root)}")

    def _cut_power(self) -> None:
        for name, function in self.system.items():
            setattr(os, name, function)
        for change in reversed(self.undurable):
            if change.kind == "made":
                os.unlink(change.path)
            elif change.kind == "made folder":
                shutil.rmtree(change.path)  # with what was durable in it: nothing leads there any more
            elif change.kind == "removed folder":
                os.mkdir(change.path)
            elif change.kind == "renamed":
                os.rename(change.path, change.other)
            if change.stash:
                os.rename(change.stash, change.path)
        for folder, _, files in os.walk(self.root):
            for name in files:
                path = os.path.join(folder, name)
                status = os.lstat(path)
                if (status.st_dev, status.st_ino) in self.unsynced:
                    os.truncate(path, status.st_size // 2)

    # --- what is durable ---------------------------------------------------------------------------------------------

    def _stash(self, path: str) -> str:
        """Keep the file `path`, whose name may be about to go, under another name; "" if there is none."""
        if not self.power or not os.path.isfile(path):
            return ""
        stash = f"{self.stash}/{len(self.calls)}"
        os.link(path, stash)
        return stash

    def _synced(self, descriptor: int) -> None:
        path, kept = path_of(descriptor), []
        self.unsynced.discard(inode_of(descriptor))
        for change in self.undurable:
            leads_there = change.kind == "made folder" and is_in(path, change.path)
            if change.folder != path and (self.harsh or not leads_there):
                kept.append(change)
                continue
            # durable: what was noted of an earlier bearer of the name is past, and of one that was renamed has the new name
            kept = [earlier for earlier in kept if not is_in(earlier.path, change.path)]
            if change.kind == "renamed":
                for earlier in kept:
                    earlier.folder, earlier.path, earlier.other = (
                        change.path + name[len(change.other) :] if is_in(name, change.other) else name
                        for name in (earlier.folder, earlier.path, earlier.other)
                    )
        self.undurable = kept

    # --- the calls ---------------------------------------------------------------------------------------------------

    def _open_file(self, file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
        path = path_of(file) if isinstance(file, int) else os.path.abspath(os.fsdecode(file))
        if set(mode).isdisjoint("wax+") or not self.is_ours(path):
            return self.system_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        make = lambda: _MortalFile(self, file, mode.replace("b", "").replace("t", ""), closefd)  # noqa: E731
        raw = make() if isinstance(file, int) else self._making(path, "w" in mode, make)
        if buffering == 0:
            return raw
        size = io.DEFAULT_BUFFER_SIZE if buffering < 2 else buffering
        buffered = io.BufferedRandom(raw, size) if "+" in mode else io.BufferedWriter(raw, size)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline, buffering == 1)

    def _open(self, path, flags, mode=0o777, *, dir_fd=None):
        full = absolute(path, dir_fd)
        make = lambda: self.system["open"](path, flags, mode, dir_fd=dir_fd)  # noqa: E731
        if self.is_ours(full) and flags & (os.O_CREAT | os.O_TRUNC):
            return self._making(full, bool(flags & os.O_TRUNC), make)
        return make()

    def _making(self, path: str, empties: bool, make):
        """A file is about to be made, or emptied, by `make`."""
        is_new = not os.path.lexists(path)
        if is_new or empties:
            self.call("make" if is_new else "empty", path)
        made = make()
        if is_new:
            self.undurable.append(Undurable(os.path.dirname(path), "made", path))
        return made

    def _write(self, descriptor, data):
        self.before_write(descriptor, data, lambda half: self.system["write"](descriptor, half))
        return self.system["write"](descriptor, data)

    def _pwrite(self, descriptor, data, offset):
        self.before_write(descriptor, data, lambda half: self.system["pwrite"](descriptor, half, offset))
        return self.system["pwrite"](descriptor, data, offset)

    def before_write(self, descriptor: int, data, write) -> None:
        """Count a write; die in the middle of it if it is the one. write: the system's own."""
        path = path_of(descriptor)
        if self.is_ours(path):
            self.unsynced.add(inode_of(descriptor))
            self.call("write", path, lambda: write(bytes(data)[: len(data) // 2]))

    def _ftruncate(self, descriptor, length):
        self.before_write(descriptor, b"", lambda nothing: None)
        return self.system["ftruncate"](descriptor, length)

    def _posix_fallocate(self, descriptor, offset, length):
        self.before_write(descriptor, b"", lambda nothing: None)
        return self.system["posix_fallocate"](descriptor, offset, length)

    def _fsync(self, file):
        descriptor = file if isinstance(file, int) else file.fileno()
        path = path_of(descriptor)
        if self.is_ours(path) or path == os.path.dirname(self.root):
            self.call("fsync", path)
            self._synced(descriptor)
        return self.system["fsync"](descriptor)

    def _rename(self, src, dst, *, src_dir_fd=None, dst_dir_fd=None):
        old, new = absolute(src, src_dir_fd), absolute(dst, dst_dir_fd)
        self._changing("rename", new, "renamed", lambda: self.system["replace"](old, new), other=old)

    def _mkdir(self, path, mode=0o777, *, dir_fd=None):
        full = absolute(path, dir_fd)
        self._changing("mkdir", full, "made folder", lambda: self.system["mkdir"](full, mode))

    def _rmdir(self, path, *, dir_fd=None):
        full = absolute(path, dir_fd)
        self._changing("rmdir", full, "removed folder", lambda: self.system["rmdir"](full))

    def _unlink(self, path, *, dir_fd=None):
        full = absolute(path, dir_fd)
        self._changing("unlink", full, "removed", lambda: self.system["unlink"](full))

    def _changing(self, operation: str, path: str, kind: str, change, other: str = "") -> None:
        """A name is about to be given or taken by `change`; one that fails, as for a folder that is there, counts as a call."""
        if not self.is_ours(path):
            change()
            return
        self.call(operation, path)
        stash = self._stash(path)
        change()
        self.undurable.append(Undurable(os.path.dirname(path), kind, path, other, stash))


class _MortalFile(io.FileIO):
    """A file whose writes are counted."""

    def __init__(self, mortal: Mortal, file, mode: str, closefd: bool):
        super().__init__(file, mode, closefd)
        self.mortal = mortal

    def write(self, data) -> int:
        if len(data):
            self.mortal.before_write(self.fileno(), data, super().write)
        return super().write(data)

    def truncate(self, size=None) -> int:
        self.mortal.before_write(self.fileno(), b"", lambda nothing: None)
        return super().truncate(size)


def is_in(path: str, folder: str) -> bool:
    """Whether `path` is `folder` or below it."""
    return f"{path}/".startswith(f"{folder}/")


def path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def inode_of(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def absolute(path, folder: int | None) -> str:
    """path, relative to the open `folder` where one is given."""
    path = os.fsdecode(path)
    return os.path.abspath(path) if folder is None else os.path.join(path_of(folder), path)


def counting(work: Callable, root: Path, *arguments) -> list[str]:
    """The calls below `root` of `work(root, *arguments)`, which ends its process with code 0."""
    mortal = Mortal(root)
    mortal.install()
    try:
        work(root, *arguments)
    except SystemExit as ended:
        assert not ended.code
    return mortal.calls


def dying(work: Callable, root: Path, at: int, death: str, *arguments) -> None:
    """`work(root, *arguments)`, dying at call `at`."""
    Mortal(root, at, death).install()
    work(root, *arguments)
