"""The joined FFCV loader: equal pixels, checked targets, and none of FFCV's hangs and leaks."""

from __future__ import annotations

import functools
import itertools
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zarr
from cache_fakes import flip_bit

from pipelines.feed.loader import JoinedLoader
from teacher_cache.crops.beton import CropReader
from teacher_cache.errors import CacheCorruptError, CropNotCachedError, UsageError
from teacher_cache.kernels import loops
from teacher_cache.store.reader import StoreReader
from teacher_cache.store.store import Store

ARRAYS = ["tokens/05", "tokens/06", "scale", "attention"]


def loader_of(cache, batch_rows=4, workers=2, store="fake", arrays=ARRAYS, **options) -> JoinedLoader:
    view = cache.view(0)
    return JoinedLoader(CropReader(view.path), [StoreReader(view.store_path(store), **options)], [arrays], batch_rows, workers)


@pytest.fixture(scope="module")
def loader(shared_cache) -> JoinedLoader:
    return loader_of(shared_cache)


@pytest.fixture(scope="module")
def shared_loaders(shared_cache):
    """(store, reader) -> a loader, compiled once. A test opens the view that it wants to read."""
    return functools.cache(lambda store, reader: loader_of(shared_cache, store=store, reader=reader))


def without_padding(loader, records) -> np.ndarray:
    """The parts of each record side by side; what lies between them is whatever was in memory."""
    return np.concatenate([records[:, part.offset : part.offset + part.n_bytes] for part in loader.fields], 1)


def copies(loader, rows) -> list:
    return [(raw.rows, raw.images.numpy().copy(), without_padding(loader, raw.records.numpy())) for raw in loader.batches(rows)]


@pytest.mark.parametrize("batch_rows, workers", [(1, 1), (3, 2), (24, 1)])
def test_pixel_identity(shared_cache, batch_rows, workers):
    """What the student gets is what the teacher saw, bit for bit, for any batch size, order and number of workers."""
    seen_by_teacher = CropReader(shared_cache.view(0).path).read(np.arange(24))
    loader = loader_of(shared_cache, batch_rows, workers, arrays=[])
    for seed in range(2):
        order = np.random.default_rng(seed).permutation(24).reshape(-1, batch_rows)
        for raw in loader.batches(order):
            assert np.array_equal(raw.images, seen_by_teacher[raw.rows])


WAYS = [("fake", {}), ("fake", {"reader": "pread"}), ("fake", {"window": 2}), ("fake", {"reader": "pread", "window": 1}),
        ("fake-zstd", {}), ("fake-zstd", {"reader": "pread", "window": 1})]  # fmt: skip


@pytest.mark.parametrize("store, options", WAYS, ids=str)
def test_only_the_wanted_tokens(shared_cache, store, options):
    """Of a store of which K patches are kept a record holds CLS and the first K patches of each row's list, in its order."""
    view, kept = shared_cache.view(0), 5
    stores, plain = [StoreReader(view.store_path(store), **options)], StoreReader(view.store_path("fake"))
    loader = JoinedLoader(CropReader(view.path), stores, [ARRAYS], 4, 2, kept=[kept])
    draws = np.random.default_rng(0)
    order = draws.permutation(24).reshape(-1, 4)
    patches = [draws.permuted(np.tile(np.arange(plain.teacher.n_patches), (4, 1)), axis=1) for _ in order]
    for index, raw in enumerate(loader.batches(order, patches.__getitem__)):
        assert np.array_equal(raw.patches, patches[index])
        wanted = np.concatenate([np.zeros((4, 1), int), patches[index][:, :kept] + 1], 1)
        for part in loader.fields:
            whole = plain.read(part.array, raw.rows)
            if part.array != "attention":
                whole = np.stack([row.take(places, -2) for row, places in zip(whole, wanted, strict=True)])
            found = raw.records[:, part.offset : part.offset + part.n_bytes]
            assert np.array_equal(found, whole.reshape(4, -1).view("u1"))


@pytest.mark.parametrize(
    ("patches", "words"),
    [
        (np.full((4, 16), 40), "places 0 to 41 asked for"),
        (np.full((4, 16), -3), "places -2 to 0 asked for"),
        (np.full((4, 16), 1 << 28), "places 0 to 268435457 asked for"),
        (np.zeros((2, 16), int), r"places must be integers \[4, K\], not int32 \[2, 6\]"),
    ],
    ids=["beyond", "negative", "far away", "few"],
)
def test_tokens_that_are_not_there(shared_cache, patches, words):
    """Compiled code follows places without a look at them: what no row has, or not for every row, is refused before."""
    view = shared_cache.view(0)
    loader = JoinedLoader(CropReader(view.path), [StoreReader(view.store_path("fake"))], [ARRAYS], 4, 2, kept=[5])
    with pytest.raises(UsageError, match=words):
        next(loader.batches(np.arange(4)[None], lambda index: patches))


@pytest.mark.parametrize("store, options", WAYS, ids=str)
def test_records_are_the_rows(shared_cache, store, options):
    """A record is the stored bytes of its row, from every array, whichever way the store is read."""
    loader, plain = loader_of(shared_cache, store=store, **options), StoreReader(shared_cache.view(0).store_path("fake"))
    assert (loader.fetch is None) == (store != "fake")
    order = np.random.default_rng(0).permutation(24).reshape(-1, 4)
    for rows, _, records in copies(loader, order):
        stored = [plain.read(array, rows).reshape(len(rows), -1).view("u1") for array in ARRAYS]
        assert np.array_equal(records, np.concatenate(stored, 1))


def test_views_are_swapped_in(shared_cache):
    """One compiled loader reads any view, and goes back."""
    loader = loader_of(shared_cache)
    rows = np.arange(8).reshape(2, 4)
    first = copies(loader, rows)
    view = shared_cache.view(1)
    loader.open(CropReader(view.path), [StoreReader(view.store_path("fake"))])
    other = copies(loader, rows)
    assert np.array_equal(np.concatenate([images for _, images, _ in other]), CropReader(view.path).read(np.arange(8)))
    assert not np.array_equal(first[0][2], other[0][2])
    loader.open(CropReader(shared_cache.view(0).path), [StoreReader(shared_cache.view(0).store_path("fake"))])
    for before, after in zip(first, copies(loader, rows), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_more_batches_than_buffers(loader):
    """A long epoch goes round the ring of buffers without mixing batches up."""
    rows = np.tile(np.arange(24).reshape(6, 4), (10, 1))
    reference = {tuple(r): records for r, _, records in copies(loader, rows[:6])}
    for r, _, records in copies(loader, rows):
        assert np.array_equal(records, reference[tuple(r)])


def test_an_exception_reaches_the_consumer(loader, monkeypatch):
    """An operation that raises in the background raises in the consumer, with its cause, instead of hanging."""
    calls = []

    def fail_at_third(rows, slot, *patches, run=loader.run):
        calls.append(slot)
        if len(calls) == 3:
            raise ZeroDivisionError("the cause")
        return run(rows, slot)

    monkeypatch.setattr(loader, "run", fail_at_third)
    seen = []
    with pytest.raises(ZeroDivisionError, match="the cause"):
        for raw in loader.batches(np.arange(24).reshape(6, 4)):
            seen.append(raw)
    assert len(seen) == 2


def test_a_corrupt_crop_raises(cache):
    """One flipped bit inside a JPEG raises with the row, although the JPEG may decode without complaint."""
    crops = CropReader(cache.view(0).path)
    flip_bit(crops.path, 8 * int(crops.pointers[9] + crops.sizes[9] // 2))
    with pytest.raises(CacheCorruptError, match="row 9 "):
        list(loader_of(cache).batches(np.arange(24).reshape(6, 4)))


STORED = pytest.mark.parametrize(
    "store, reader", [("fake", "mmap"), ("fake", "pread"), ("fake-zstd", "mmap"), ("fake-zstd", "pread")]
)
SHARD = "tokens/06/c.1.0.0"  # rows 8 to 15


def swapped_in(shared_loaders, cache, store, reader) -> JoinedLoader:
    """A shared loader that reads a store of view 0 of `cache`."""
    loader, view = shared_loaders(store, reader), cache.view(0)
    loader.open(CropReader(view.path), [StoreReader(view.store_path(store), reader)])
    return loader


@STORED
def test_a_corrupt_target_raises(shared_loaders, cache, store, reader):
    """One flipped bit in a stored row raises with array and row at its first read; the batches before are there."""
    flip_bit(cache.view(0).store_path(store) / SHARD, 8 * (64 + 10))
    loader, seen = swapped_in(shared_loaders, cache, store, reader), []
    with pytest.raises(CacheCorruptError, match="tokens/06: row 8 "):
        seen += loader.batches(np.arange(24).reshape(6, 4))
    assert len(list(loader.batches(np.arange(8).reshape(2, 4)))) == 2


@STORED
def test_an_unextracted_row_raises(shared_loaders, cache, store, reader):
    """A row that was never extracted raises; it is never zeros."""
    name, store = store, cache.view(0).store_path(store)
    shards = np.load(store / "shards.npy")
    (store / "complete.json").unlink()
    (store / "commits").mkdir()
    Store.open(store).write_commit(0, shards[0])
    with pytest.raises(CropNotCachedError, match="row 8 "):
        list(swapped_in(shared_loaders, cache, name, reader).batches(np.arange(24).reshape(6, 4)))


def swap(shard: Path) -> None:
    aside, other = shard.rename(shard.with_name("aside")), shard.with_name("c.0.0.0")
    other.rename(shard)
    aside.rename(other)


def rewrite_by_zarr(shard: Path) -> None:
    """Put in its place what zarr-python makes of the same rows: sound for zarr, without the header of this format."""
    array = zarr.open_array(shard.parents[0], mode="r+")
    shard_number = int(shard.name.split(".")[1])
    rows = slice(shard_number * array.shards[0], (shard_number + 1) * array.shards[0])
    array[rows] = array[rows]


DAMAGE = {
    "written by zarr": rewrite_by_zarr,
    "deleted": Path.unlink,
    "emptied": lambda shard: os.truncate(shard, 0),
    "cut": lambda shard: os.truncate(shard, shard.stat().st_size // 2),
    "swapped": swap,
    "a wrong index": lambda shard: flip_bit(shard, -40),
}


@pytest.mark.parametrize("damage", DAMAGE)
@STORED
def test_damaged_shards_raise(shared_loaders, cache, damage, store, reader):
    """A shard that is gone, emptied, cut short or in another's place raises where its rows are asked for, with its name; the
    batches before are right."""
    loader, view = swapped_in(shared_loaders, cache, store, reader), cache.view(0)
    rows = np.arange(24)[::-1].reshape(6, 4)  # the third batch is the first of the shard
    reference = [records for _, _, records in copies(loader, rows[:2])]
    DAMAGE[damage](view.store_path(store) / SHARD)
    loader, seen = swapped_in(shared_loaders, cache, store, reader), []
    with pytest.raises(CacheCorruptError, match=SHARD):
        for raw in loader.batches(rows):
            seen.append(without_padding(loader, raw.records.numpy()))
    assert np.array_equal(seen, reference)


@pytest.mark.parametrize("damage", ["emptied", "cut"])
def test_cut_short_while_training(shared_loaders, cache, damage):
    """With pread, a shard that is cut short in place while it is open raises in the consumer, and the process lives on."""
    loader, view = swapped_in(shared_loaders, cache, "fake", "pread"), cache.view(0)
    rows = np.arange(24).reshape(6, 4)
    assert len(copies(loader, rows)) == 6
    DAMAGE[damage](view.store_path("fake") / SHARD)
    with pytest.raises(CacheCorruptError, match="tokens/06: row 8 is damaged .its shard was cut short"):
        copies(loader, rows)
    assert len(copies(loader, rows[4:])) == 2


def test_leaving_early_leaks_no_thread(loader):
    """Breaking out of an epoch ends its thread; the next epoch starts clean."""
    before = threading.active_count()
    for _ in range(5):
        for _raw in loader.batches(np.arange(24).reshape(6, 4)):
            break
    assert threading.active_count() == before
    assert len(copies(loader, np.arange(24).reshape(6, 4))) == 6


def test_torch_keeps_its_threads(shared_cache):
    """Making and running a loader leaves torch's thread count alone (FFCV's own sets it for the whole process)."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        copies(loader_of(shared_cache, workers=1), np.arange(8).reshape(2, 4))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_importing_the_loader_leaves_torch_its_threads():
    """FFCV sets torch to one thread when it is imported; a student on a CPU trains with all of them all the same."""
    code = "import torch; torch.set_num_threads(3); import pipelines.feed.loader; print(torch.get_num_threads())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout == "3\n", done.stderr


def test_two_loaders_at_once(shared_cache, loader):
    """Two live loaders do not disturb each other (numba's workqueue layer would abort the process)."""
    rows = np.arange(24).reshape(6, 4)
    alone = copies(loader, rows)
    other = loader_of(shared_cache)
    for first, second, reference in zip(loader.batches(rows), other.batches(rows), alone, strict=True):
        assert np.array_equal(without_padding(loader, first.records), reference[2])
        assert np.array_equal(without_padding(other, second.records), reference[2])


def test_few_shards_stay_open(shared_loaders, cache):
    """Going to another view closes the shards of the one before, and maps keep no file open."""
    loader, rows = shared_loaders("fake", "mmap"), np.arange(24).reshape(6, 4)
    before = len(list(Path("/proc/self/fd").iterdir()))
    readers = [(CropReader(view.path), [StoreReader(view.store_path("fake"))]) for view in cache.views()]
    for number in (0, 1, 0):
        loader.open(*readers[number])
        copies(loader, rows)
        maps = Path("/proc/self/maps").read_text()
        assert [view.number for view in cache.views() if f"{view.path}/fake.zarr" in maps] == [number]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + len(readers) + 1  # one a crops.beton


@pytest.mark.parametrize("store, reader", [("fake16", "mmap"), ("fake16", "pread")])
def test_float16_records(shared_cache, store, reader):
    """A record of a float16 store is the stored bytes of its row."""
    arrays, plain = ["tokens/02", "tokens/06"], StoreReader(shared_cache.view(0).store_path(store))
    loader = loader_of(shared_cache, store=store, arrays=arrays, reader=reader)
    for rows, _, records in copies(loader, np.random.default_rng(1).permutation(24).reshape(-1, 4)):
        stored = [plain.read(array, rows).reshape(len(rows), -1).view("u1") for array in arrays]
        assert np.array_equal(records, np.concatenate(stored, 1))


@pytest.mark.parametrize("store, reader, why", [
    ("fake", "mmap", None), ("fake", "pread", None),
    ("fake-zstd", "mmap", "tokens/05 of fake-zstd.zarr is compressed with zstd"),
])  # fmt: skip
def test_the_slower_way_is_said(shared_cache, caplog, store, reader, why):
    """A run whose targets cannot be copied by compiled code says so in one line, with the reason; others say nothing."""
    loader = loader_of(shared_cache, store=store, reader=reader)
    copies(loader, np.arange(8).reshape(2, 4))
    loader.open(CropReader(shared_cache.view(1).path), [StoreReader(shared_cache.view(1).store_path(store), reader)])
    said = [record.message for record in caplog.records]
    assert said == ([f"Targets are read outside of the compiled loader, which is slower: {why}."] if why else [])


@pytest.mark.parametrize("from_disk", [True, False])
def test_what_is_announced(shared_cache, loader, monkeypatch, from_disk):
    """While this process reads from a disk every batch is announced once, two batches before it is read; from memory only the
    first ones are."""
    loader.open(CropReader(shared_cache.view(0).path), [StoreReader(shared_cache.view(0).store_path("fake"))])
    usage, events, run = itertools.count(), [], loader.run
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_inblock=next(usage) if from_disk else 0))
    monkeypatch.setattr(loader, "announce", lambda rows: events.append(("announced", rows[0])))
    monkeypatch.setattr(loader, "run", lambda rows, slot: events.append(("run", rows[0])) or run(rows, slot))
    assert len(copies(loader, np.arange(24).reshape(6, 4))) == 6
    announced = [row for what, row in events if what == "announced"]
    assert announced == ([0, 4, 8, 12, 16, 20] if from_disk else [0, 4, 8])
    for place, row in enumerate(announced):
        assert events.index(("announced", row)) < events.index(("run", max(0, row - 8))), place


def test_announced_crops_and_rows(shared_cache, loader, monkeypatch):
    """Announced of a batch are the bytes of its crops, and of its rows in the arrays that are read."""
    view, told = shared_cache.view(0), []
    crops, store = CropReader(view.path), StoreReader(view.store_path("fake"))
    loader.open(crops, [store])
    monkeypatch.setattr(loops, "advise", lambda ranges, by_pread: told.append(ranges.copy()))
    rows = np.array([20, 3])
    loader.announce(rows)
    of_crops, *of_arrays = told
    assert of_crops[:, 0].tolist() == [crops.bytes.ctypes.data] * 2
    assert np.array_equal(of_crops[:, 1:], np.stack([crops.pointers[rows], crops.sizes[rows]], 1))
    assert len(of_arrays) == len(ARRAYS)
