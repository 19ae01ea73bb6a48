"""What a disk gives: bytes a second written for some seconds, and read a row here and there, as training reads.

What is written is fsynced as it goes, for long enough to fill the memory of a drive. Before it is read, the kernel is asked to
forget it (fadvise). What a RAID controller or a cloud host keeps below the kernel cannot be seen from here.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import NoSpaceError
from ..files.space import existing_folder, free_bytes, full_disk_explained
from ..words import human

PIECE = 64 << 20
"""Bytes that are written between two fsyncs."""
MOST_BYTES = 16 << 30
"""More than the memory of a drive holds."""
WRITE_S, READ_S = 8.0, 4.0
"""How long is written and read, at most."""
THREADS = 8
"""Reads that are on their way at the same time."""
IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class DiskRates:
    """Bytes a second, and how they were measured."""

    random: float
    """Read, `chunk_bytes` here and there, `threads` at a time."""
    write: float | None
    """With fsync; None where existing files were read."""
    chunk_bytes: int
    threads: int
    of: str
    how: str


def measure_files(paths: Sequence[Path], chunk_bytes: int) -> DiskRates:
    """Read files that are there, such as the shards of a store; nothing is written."""
    return _measure(paths, chunk_bytes, f"{len(paths)} files below {paths[0].parent}", None)


def measure_folder(folder: Path, chunk_bytes: int) -> DiskRates:
    """Write a temporary file to the disk of `folder` (which need not be there), read it and remove it.

    Raises NoSpaceError where a tenth of the free bytes is less than PIECE.
    """
    folder = existing_folder(folder)
    most = min(MOST_BYTES, free_bytes(folder) // 10)
    if most < PIECE:
        raise NoSpaceError(f"{folder}: {human(free_bytes(folder))} are free, too few to measure the disk. Make room.")
    with tempfile.NamedTemporaryFile(dir=folder, prefix="teacher-cache-disk-") as file, full_disk_explained(folder, str):
        write = _write(file, most)
        n_bytes = Path(file.name).stat().st_size
        return _measure([Path(file.name)], chunk_bytes, f"a temporary file of {human(n_bytes)} in {folder}", write)


def _write(file: BinaryIO, most: int) -> float:
    """Bytes a second of writing, for WRITE_S or until the file has `most` bytes."""
    n_bytes, seconds = 0, 0.0
    while n_bytes + PIECE <= most and seconds < WRITE_S:
        piece = os.urandom(PIECE)  # a file system that compresses or joins equal blocks must gain nothing
        started = time.perf_counter()
        file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        seconds += time.perf_counter() - started
        n_bytes += PIECE
    return n_bytes / seconds


def _measure(paths: Sequence[Path], chunk_bytes: int, of: str, write: float | None) -> DiskRates:
    files = [os.open(path, os.O_RDONLY) for path in paths]
    try:
        for file in files:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
        at_random = _read_rate(files, chunk_bytes)
    finally:
        for file in files:
            os.close(file)
    kind = file_system(paths[0])
    how = f"of memory: {kind} is no disk" if kind in IN_MEMORY else "after the kernel was asked to forget them"
    return DiskRates(at_random, write, chunk_bytes, THREADS, of, how)


def _read_rate(files: list[int], chunk_bytes: int) -> float:
    """Bytes a second of chunks in random order, each once, of as many as fit into READ_S."""
    places = [(file, start) for file in files for start in range(0, os.fstat(file).st_size, chunk_bytes)]
    random.Random(0).shuffle(places)
    started = time.perf_counter()

    def read(place: tuple[int, int]) -> int:
        return len(os.pread(place[0], chunk_bytes, place[1])) if time.perf_counter() - started < READ_S else 0

    with ThreadPoolExecutor(THREADS) as pool:
        n_bytes = sum(pool.map(read, places))
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
