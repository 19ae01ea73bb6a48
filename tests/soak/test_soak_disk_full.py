"""A disk that fills up while crops and targets are written to it: what is finished stays, and with room the work goes on.

The disk is a tmpfs, so the system itself says that it is full. Commands check for space before they begin, so it fills up behind
that: another program takes all but so many bytes, or all but so many names, as soon as the check is over.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import warm
from cache_fakes import contents
from forks import fork

from teacher_cache.checking.verify import verify_folder
from teacher_cache.extraction import make
from teacher_cache.files.durable import ASIDE

ARGUMENTS = ("--teacher", "fake", "--views", 2, "--shard-rows", 3, "--batch-size", 5, "--workers", 1)
"""24 images make 3 parts of the crop stage, 2 views, and in each a store of 8 shards of 7 arrays."""
BYTES, NAMES = 8 << 20, 2000
"""What the disk holds: many times what is written to it."""
MOMENTS = 20
N_SHARDS = 8


def extract(cache, images) -> None:
    """`teacher-cache extract`, both stages; ends the process."""
    warm.run_program("teacher-cache", "extract", "--images", images, *ARGUMENTS, cache)


@dataclass(frozen=True)
class Room:
    """What there is still space for."""

    n_bytes: int
    n_names: int
    """Files and folders."""

    @classmethod
    def on(cls, folder: Path) -> Room:
        status = os.statvfs(folder)
        return cls(status.f_bavail * status.f_bsize, status.f_favail)


def extract_beside_another_program(cache: Path, images: Path, left: Room) -> None:
    """The same, on a disk of which another program leaves only `left` when the check for space is over."""
    check = make.require_space

    def check_and_lose(path: Path, needed: int) -> None:
        check(path, needed)
        fill(cache.parent / "another", left)

    make.require_space = check_and_lose
    extract(cache, images)


def fill(folder: Path, left: Room) -> None:
    """Take what is free on the disk of `folder`, a new one, but for `left`."""
    folder.mkdir()
    for number in range(Room.on(folder).n_names - left.n_names - 1):
        (folder / str(number)).touch()
    with open(folder / "ballast", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, Room.on(folder).n_bytes - left.n_bytes))


# --- the disk --------------------------------------------------------------------------------------------------------


def mount(*arguments) -> None:
    subprocess.run(["mount", "-t", "tmpfs", *map(str, arguments)], check=True, capture_output=True, text=True)


@contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """A disk of its own, mounted at `path` while the block runs."""
    path.mkdir()
    try:
        mount("-o", f"size={BYTES},nr_inodes={NAMES}", "soak", path)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs can be mounted here: {(getattr(error, 'stderr', None) or str(error)).strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk") as path:
        yield path


def make_room(disk: Path) -> None:
    mount("-o", f"remount,size={2 * BYTES},nr_inodes={2 * NAMES}", disk)


# --- cases -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, image_folder) -> tuple[dict[str, bytes], Room]:
    """The files of an extraction on a disk with room enough, and what they take there."""
    with small_disk(tmp_path_factory.mktemp("undisturbed") / "disk") as disk:
        before = Room.on(disk)
        fork(extract, disk / "c", image_folder).says(code=0)
        after = Room.on(disk)
        return contents(disk / "c"), Room(before.n_bytes - after.n_bytes, before.n_names - after.n_names)


def committed(cache: Path) -> dict[Path, int]:
    """Files of finished parts of the crop stage and of finished shards, with their inodes."""
    files = [file for commit in cache.glob("crops.partial/view-*/*.json") for file in commit.parent.glob(f"{commit.stem}.*")]
    for commit in cache.glob("view-*/*.zarr/commits/*.json"):
        files += [file for file in commit.parents[1].rglob(f"c.{int(commit.stem)}.*") if file.suffix != ASIDE]
    return {file: file.stat().st_ino for file in files}


def phase_on_disk(cache: Path) -> str:
    """What an extraction was doing when the disk was full, from what it left."""
    if not (cache / "crops.partial").exists() and not (cache / "cache.json").exists():
        return "beginning"
    if not (cache / "cache.json").exists():
        return "publishing crops" if any(cache.glob("view-*")) else "cutting crops"
    for number in (0, 1):
        store = cache / f"view-{number:03d}" / "fake.zarr"
        if not store.exists():
            return f"beginning the store of view {number}"
        if (store / "commits").exists():
            is_all = len(list(store.glob("commits/*.json"))) == N_SHARDS
            return f"completing view {number}" if is_all else f"shards of view {number}"
    return "behind the last shard"


@pytest.mark.soak("disk full: bytes, or names, run out while `extract` is at work", full=MOMENTS, short=3)
def test_disk_full(seed, undisturbed, image_folder, disk, fell):
    """One sentence with the bytes that are missing; finished parts and shards stay; with room, all files are as undisturbed."""
    (expected, taken), cache, share = undisturbed, disk / "c", (seed + 0.5) / MOMENTS
    of_names = seed % 4 == 1
    left = Room(BYTES, int(taken.n_names * share)) if of_names else Room(int(taken.n_bytes * share), NAMES)
    ended = fork(extract_beside_another_program, cache, image_folder, left).says("Error: The disk of ", " is full. ", code=1)
    assert re.search(r"\d [kM]?B are still to be written", ended.output), ended.output
    fell(f"{phase_on_disk(cache)} ({'names' if of_names else 'bytes'})")

    kept = committed(cache)
    if (cache / "cache.json").exists():
        is_begun = any(cache.glob("view-*/fake.zarr*"))  # also aside; else there are crops alone, and they are whole
        assert {finding.kind for finding in verify_folder(cache)[0]} == ({"unfinished"} if is_begun else set())
    fork(extract, cache, image_folder).says("Error: ", code=1)  # there is no more room than before
    assert kept.items() <= committed(cache).items()

    make_room(disk)
    fork(extract, cache, image_folder).says(code=0)
    assert contents(cache) == expected
    assert all(file.stat().st_ino == inode for file, inode in kept.items() if file.exists())
