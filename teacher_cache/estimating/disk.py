"""What a disk gives: bytes a second in one long read, and in reads of one row here and there, as training makes them.

What the kernel keeps in memory is no disk. Reads go past its page cache (O_DIRECT) where the file system allows that; elsewhere
the file's pages are given up first (fadvise), and the report says which. Caches below the kernel (a RAID controller's, a cloud
host's) cannot be seen from here.
"""

from __future__ import annotations

import mmap
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import NoSpaceError
from ..files.space import existing_folder, free_bytes, full_disk_explained
from ..words import human

BLOCK = 4096
"""O_DIRECT wants offsets, lengths and addresses in multiples of it."""
SEQUENTIAL_CHUNK = 4 << 20
TEMPORARY_BYTES = 512 << 20
LONGEST_S = 4.0
"""Of each of the reads."""
THREADS = 8
"""Reads that are on their way at the same time."""
IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class DiskRates:
    """Bytes a second, and how they were measured."""

    sequential: float
    random: float
    write: float | None
    """With fsync; None where an existing file was read."""
    chunk_bytes: int
    """Of a random read."""
    threads: int
    file_bytes: int
    of: str
    how: str


def measure_files(paths: Sequence[Path], chunk_bytes: int) -> DiskRates:
    """Read files that are there, such as the shards of a store; nothing is written."""
    return _measure(paths, chunk_bytes, f"{len(paths)} files below {paths[0].parent}", None)


def measure_folder(folder: Path, chunk_bytes: int) -> DiskRates:
    """Write a temporary file to the disk of `folder` (which need not be there), read it and remove it.

    Raises NoSpaceError where a tenth of the free bytes is less than 64 MiB.
    """
    folder = existing_folder(folder)
    n_bytes = min(TEMPORARY_BYTES, free_bytes(folder) // 10) // SEQUENTIAL_CHUNK * SEQUENTIAL_CHUNK
    if n_bytes < 64 << 20:
        raise NoSpaceError(f"{folder}: {human(free_bytes(folder))} are free, too few to measure the disk. Make room.")
    with tempfile.NamedTemporaryFile(dir=folder, prefix="teacher-cache-disk-") as file, full_disk_explained(folder, str):
        # a file system that compresses or joins equal blocks must gain nothing: every block is another one
        noise = np.frombuffer(os.urandom(SEQUENTIAL_CHUNK), "u8").reshape(-1, BLOCK // 8).copy()
        started = time.perf_counter()
        for number in range(n_bytes // SEQUENTIAL_CHUNK):
            noise[:, 0] = number * len(noise) + np.arange(len(noise))
            file.write(noise)
        file.flush()
        os.fsync(file.fileno())
        write = n_bytes / (time.perf_counter() - started)
        return _measure([Path(file.name)], chunk_bytes, f"a temporary file of {human(n_bytes)} in {folder}", write)


def _measure(paths: Sequence[Path], chunk_bytes: int, of: str, write: float | None) -> DiskRates:
    chunk_bytes = -(-chunk_bytes // BLOCK) * BLOCK
    direct = all(map(_can_be_direct, paths))
    files = [_File(path, direct) for path in paths]
    try:
        sequential = _rate(_sequential_reads(files))
        for file in files:
            file.give_up_pages()
        at_random = _rate(_random_reads(files, chunk_bytes))
        how = "past the page cache (O_DIRECT)" if direct else "after the kernel was asked to drop its pages (fadvise)"
        kind = file_system(paths[0])
        if kind in IN_MEMORY:
            how = f"of memory: {kind} is no disk"
        return DiskRates(sequential, at_random, write, chunk_bytes, THREADS, sum(file.n_bytes for file in files), of, how)
    finally:
        for file in files:
            os.close(file.descriptor)


class _File:
    def __init__(self, path: Path, direct: bool):
        self.n_bytes = path.stat().st_size
        self.descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
        self.give_up_pages()

    def give_up_pages(self) -> None:
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def read(self, start: int, n_bytes: int) -> int:
        """Bytes that were read."""
        with mmap.mmap(-1, n_bytes) as buffer:  # at the start of a page, as O_DIRECT wants it
            return os.preadv(self.descriptor, [buffer], start)


def _can_be_direct(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return False
    try:
        with mmap.mmap(-1, BLOCK) as buffer:
            os.preadv(descriptor, [buffer], 0)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _sequential_reads(files: list[_File]) -> list[Callable[[], int]]:
    return [lambda file=file, start=start: file.read(start, SEQUENTIAL_CHUNK)
            for file in files for start in range(0, file.n_bytes, SEQUENTIAL_CHUNK)]  # fmt: skip


def _random_reads(files: list[_File], chunk_bytes: int) -> list[Callable[[], int]]:
    """Every chunk once, in random order."""
    places = [(file, start) for file in files for start in range(0, file.n_bytes, chunk_bytes)]
    random.Random(0).shuffle(places)
    return [lambda file=file, start=start: file.read(start, chunk_bytes) for file, start in places]


def _rate(reads: list[Callable[[], int]]) -> float:
    """Bytes a second of as many of the reads as fit into LONGEST_S."""
    deadline = time.perf_counter() + LONGEST_S

    def timed(read: Callable[[], int]) -> int:
        return read() if time.perf_counter() < deadline else 0

    started = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        n_bytes = sum(pool.map(timed, reads))
    return n_bytes / max(time.perf_counter() - started, 1e-9)


def file_system(path: Path) -> str:
    """Kind of the file system that holds `path`: `ext4`, `tmpfs` ...; empty where the kernel does not tell."""
    try:
        device = Path(path).stat().st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            if before.split()[2] == wanted:
                return after.split()[0]
    except (OSError, IndexError):
        pass
    return ""
