"""Files that change under an open reader: cut short in place, exchanged by rename. Never a row that is not the one written."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from forks import Command, Ended, fork, run_forked, start_forked

from teacher_cache.crops.beton import CropReader
from teacher_cache.errors import TeacherCacheError
from teacher_cache.kernels import sigbus
from teacher_cache.store.reader import StoreReader

EXTRACT = ("--teacher", "fake", "--layers", "last2", "--shard-rows", 8)
STORE = "view-000/fake.zarr"
ROWS = range(24)


@pytest.fixture(scope="module")
def sound(image_folder, tmp_path_factory) -> Path:
    """A sound cache of one view, 3 shards."""
    path = tmp_path_factory.mktemp("sound") / "c"
    run_forked("teacher-cache", "extract", *EXTRACT, "--images", image_folder, path).says(code=0)
    return path


@pytest.fixture
def cache(sound, tmp_path) -> Path:
    return shutil.copytree(sound, tmp_path / "c")


def shards(cache: Path) -> list[Path]:
    """The shard files of the store."""
    return sorted(
        path for name in ("tokens/05", "tokens/06", "scale", "attention") for path in (cache / STORE / name).glob("c.*")
    )


def cut(file: Path, draw: random.Random) -> int:
    """Cut a file short in place, by one byte, to nothing, or to any length between; returns the length."""
    size = file.stat().st_size
    length = draw.choice((0, size - 1, draw.randrange(size), draw.randrange(size)))
    os.truncate(file, length)
    return length


# --- under the readers -----------------------------------------------------------------------------------------------


def read_change_read(cache: Path, reader: str, change, seed: int) -> str:
    """Read every row, change files, read every row again; what came of it. Other rows than before are an AssertionError."""
    sigbus.install()
    store, crops = StoreReader(cache / STORE, reader), CropReader(cache / "view-000")
    read = lambda: [*(store.read(array, ROWS) for array in store.spec.array_names), crops.read(ROWS)]  # noqa: E731
    before = read()
    change(cache, seed)
    try:
        after = read()
    except TeacherCacheError as error:
        print(f"Error: {error}")
        return "raised"
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    return "the rows of before"


def cut_one(cache: Path, seed: int) -> None:
    draw = random.Random(seed)
    file = draw.choice([*shards(cache), cache / "view-000/crops.beton"])
    print(f"cut to {cut(file, draw)} bytes: {file}", flush=True)


@pytest.mark.soak("file cut short in place under an open reader", full=100, short=5)
def test_cut(seed, cache, fell):
    """mmap ends the process with a sentence that names the file, pread raises one, unless every row is still there."""
    reader = random.Random(f"reader {seed}").choice(("mmap", "mmap", "pread"))
    ended = fork(read_change_read, cache, reader, cut_one, seed)
    file = ended.output.splitlines()[0].split(": ")[1]
    if ended.value is None and (reader == "mmap" or file.endswith("crops.beton")):
        ended.says(f"Error: {file} was cut short", code=1)
        fell(f"{reader}: ended, naming the file")
    else:
        fell(f"{reader}: {ended.ok().value}")
        assert ended.value != "raised" or str(Path(file).parent) in ended.output.splitlines()[-1], ended.output


def exchange_two(cache: Path, seed: int) -> None:
    """Let two shards of one array change places, by rename."""
    draw = random.Random(seed)
    first = draw.choice(shards(cache))
    second = draw.choice([other for other in first.parent.glob("c.*") if other != first])
    aside = cache.with_name("aside")
    first.rename(aside), second.rename(first), aside.rename(second)


@pytest.mark.soak("two shards exchanged by rename under an open reader", full=20, short=3)
def test_exchanged(seed, cache, fell):
    """A reader that has the files open goes on with the rows that it had; a new one refuses them."""
    reader = ("mmap", "pread")[seed % 2]
    ended = fork(read_change_read, cache, reader, exchange_two, seed).ok()
    assert ended.value == "the rows of before", ended.output
    assert fork(read_all, cache).ok().value == "raised"
    fell(f"{reader}: {ended.value}; a new reader refuses them")


def read_all(cache: Path) -> str:
    try:
        store = StoreReader(cache / STORE)
        for array in store.spec.array_names:
            store.read(array, ROWS)
    except TeacherCacheError:
        return "raised"
    return "read"


# --- under a training run --------------------------------------------------------------------------------------------

TRAIN = ("--preset", "mr-mae-b16", "--tiny", "--set", "backbone.image_size=32", "--set", "backbone.patch_size=8", "--set",
         "batch_size=8", "--set", "epochs=100000", "--teacher", "fake", "--workers", 1)  # fmt: skip


@pytest.mark.soak("file cut short in place under `student-train`", full=6, short=1)
def test_training_cut(seed, full, cache, tmp_path, fell):
    """A run whose shard is cut short ends with exit code 1 and a sentence that names it, by map and by pread."""
    reader = ("pread", "mmap")[seed % 6 < 3]
    file = cache / STORE / ("scale/c.1.0.0.0", "tokens/06/c.0.0.0", "tokens/06/c.2.0.0")[seed % 3]
    process = (Command if full else start_forked)(
        "student-train", *TRAIN, "--reader", reader, "--cache", cache, "--out", tmp_path / "r"
    )
    log = tmp_path / "r" / "metrics.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") > 5) and process.is_running:
        time.sleep(0.01)
    os.truncate(file, 0)
    ended: Ended = process.wait(60)
    ended.says("Error: ", str(file if reader == "mmap" else file.parent), code=1)
    fell(f"{reader}: ended, naming the {'file' if reader == 'mmap' else 'array'}")
