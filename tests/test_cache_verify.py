"""verify: silent about a sound cache, and no file of it can be changed, lost, swapped or added without being found."""

from __future__ import annotations

import random
import shutil

import pytest
from cache_fakes import contents, crop_folder, failing_at, flip_bit

from teacher_cache import cropping, writer
from teacher_cache.cache import Cache
from teacher_cache.errors import CacheCorruptError
from teacher_cache.extract import ExtractPlan, extract_view
from teacher_cache.verify import verify


@pytest.fixture(scope="module")
def small(image_folder, teacher, tmp_path_factory) -> Cache:
    """One view, one compressed int8 store of one layer, an image left out: every kind of file."""
    folder = shutil.copytree(image_folder, tmp_path_factory.mktemp("small") / "images")
    next(folder.glob("*/*.png")).write_bytes(b"")
    cache = crop_folder(folder.parent / "c", folder, skip_bad=True)
    extract_view(cache.view(0), "fake", teacher, ExtractPlan("last", codec="zstd", shard_rows=8))
    return cache


def findings(path) -> list[str]:
    """What verify says of the cache at `path`, as `kind path: message`; a damaged identity counts as a finding."""
    try:
        found, _ = verify(Cache(path))
    except CacheCorruptError as error:
        return [f"damaged {error}"]
    return [f"{finding.kind} {finding.path}: {finding.message}" for finding in found]


@pytest.fixture
def whole(small):
    """The small cache's path; afterwards it must be as it was."""
    before = contents(small.path)
    yield small.path
    assert contents(small.path) == before


def files_of(path):
    return [file for file in sorted(path.rglob("*")) if file.is_file()]


def test_sound(small, shared_cache):
    """A sound and complete cache gives no findings, and every one of its files was checked."""
    for cache in (small, shared_cache):
        found, n_files = verify(cache)
        assert found == [] and n_files == len(contents(cache.path))


@pytest.mark.parametrize("seed", range(3))
def test_one_flipped_bit_in_any_file_is_found(whole, seed):
    """One flipped bit anywhere in any file of a cache is found, and the finding names the file or what it belongs to."""
    draw = random.Random(seed)
    for file in files_of(whole):
        bit = draw.randrange(8 * file.stat().st_size)
        flip_bit(file, bit)
        found = findings(whole)
        flip_bit(file, bit)
        assert any(file.name in finding for finding in found), (file, bit, found)
        assert not any(finding.startswith("unknown") for finding in found), (file, bit, found)


def test_any_bit_of_the_beton_is_found(whole):
    """No bit of crops.beton is unguarded: header, field table, samples, padding, crops or allocation table."""
    file = whole / "view-000" / "crops.beton"
    n_bits = 8 * file.stat().st_size
    for bit in [*range(0, 256, 7), *range(256, n_bits, n_bits // 300)]:
        flip_bit(file, bit)
        assert any("crops.beton" in finding for finding in findings(whole)), bit
        flip_bit(file, bit)


DAMAGE = {
    "deleted": lambda data: None,
    "emptied": lambda data: b"",
    "cut": lambda data: data[:-1],
    "grown": lambda data: data + b"\0",
    "zeroed": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_is_found(whole, damage):
    """Any file of a cache that is deleted, emptied, cut, grown or zeroed is found."""
    for file in files_of(whole):
        if file.name == "cache.json" and damage == "deleted":
            continue  # then it is no cache
        data = file.read_bytes()
        changed = DAMAGE[damage](data)
        file.unlink()
        if changed is not None:
            file.write_bytes(changed)
        found = findings(whole)
        file.write_bytes(data)
        name = "fake.zarr" if file.name == "complete.json" else file.name  # without it, the store is unfinished
        assert any(name in finding for finding in found), (file, found)


@pytest.mark.parametrize("path", ["view-000/fake.zarr/tokens/06", "view-000/fake.zarr/attention"])
def test_swapped_shards_are_found(whole, path):
    """Two shards that changed places are found, although each is sound in itself."""
    first, second = sorted((whole / path).glob("c.*"))[:2]
    data = first.read_bytes(), second.read_bytes()
    first.write_bytes(data[1]), second.write_bytes(data[0])
    found = findings(whole)
    first.write_bytes(data[0]), second.write_bytes(data[1])
    assert len(found) == 2 and all(finding.startswith("damaged") for finding in found)


def test_swapped_views_are_found(cache):
    """Views, their crops or their stores that changed places are found."""
    first, second = (view.path for view in cache.views())
    for name in ("", "crops.beton", "crops.npy", "fake.zarr"):
        a, b, aside = first / name, second / name, cache.path.with_name("aside")
        for swap in range(2):
            a.rename(aside), b.rename(a), aside.rename(b)
            assert bool(findings(cache.path)) == (swap == 0), name


def test_every_damage_is_reported(cache):
    """One damaged file does not hide another: each is named, in one run."""
    damaged = [
        "images.txt", "view-000/crops.npy", "view-001/crops.beton", "view-000/fake.zarr/store.json",
        "view-001/fake.zarr/tokens/03/c.1.0.0", "view-001/fake.zarr/scale/c.0.0.0.0", "view-000/fake16.zarr/quant",
        "view-001/fake-zstd.zarr/quant/04/spread/c.0",
    ]  # fmt: skip
    for name in damaged:
        if name.endswith("quant"):
            (cache.path / name).mkdir()
            (cache.path / name / "left.txt").touch()
        else:
            flip_bit(cache.path / name, 5000)
    found = findings(cache.path)
    missing = [name for name in damaged if not any(str(cache.path / name) in finding for finding in found)]
    assert missing == [], found


STRAY = [
    "notes.txt", "view-7x/a", "view-000/core.123", "view-000/fake.zarr/tokens/06/c.9.0.0",
    "view-000/fake.zarr/tokens/06/c.1.0.0.partial", "view-000/fake.zarr/commits/000000.json",
]  # fmt: skip


@pytest.mark.parametrize("name", STRAY)
def test_files_that_do_not_belong_are_found(whole, name):
    """A file that this program did not write is reported as unknown."""
    file = whole / name
    is_new = not file.parent.exists()
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"x")
    found = findings(whole)
    file.unlink()
    if is_new:
        file.parent.rmdir()
    assert found == [f"unknown {file}: belongs to nothing in this cache. Remove it."]


LEFT = {
    "view-000/fake.zarr.claim": "a writer is at work, or was killed",
    "crops.claim": "a writer is at work, or was killed",
    "images.txt.partial": "left by an interrupted writer",
    "view-000/new.zarr.partial/zarr.json": "left by an interrupted writer",
    "view-001.partial/crops.npy": "left by an interrupted writer",
    "crops.partial/job.json": "a crop stage was begun and not finished",
}


@pytest.mark.parametrize("name", LEFT)
def test_leftovers_are_found(whole, name):
    """What an interrupted writer left aside is reported as unfinished, once."""
    file = whole / name
    is_new = not file.parent.exists()
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"x")
    found = findings(whole)
    file.unlink()
    if is_new:
        file.parent.rmdir()
    assert len(found) == 1 and found[0].startswith("unfinished") and LEFT[name] in found[0]


def test_unfinished_store(cache, teacher, monkeypatch):
    """A half-made store is unfinished, not damaged, and says how much is done; damage in its finished part is still found."""
    monkeypatch.setattr(writer, "write_commit", failing_at(writer.write_commit, 3, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        extract_view(cache.view(0), "new", teacher, ExtractPlan("last", shard_rows=8))
    store = cache.view(0).store_path("new")
    (store / "tokens/06/c.2.0.0.partial").touch()  # a killed writer leaves the files of its shard
    assert findings(cache.path) == [
        f"unfinished {store}: 2 of 3 shards are finished. Run the same teacher-cache extract command again."
    ]
    for name in ("tokens/06/c.1.0.0", "commits/000001.json", "store.json", "zarr.json"):
        flip_bit(store / name, 800)
        found = findings(cache.path)
        flip_bit(store / name, 800)
        assert any(finding.startswith("damaged") and name in finding for finding in found)


def test_unfinished_crops(image_folder, tmp_path, monkeypatch):
    """A half-made view is unfinished; a cache without any view says so."""
    cache = crop_folder(tmp_path / "c", image_folder, 1)
    monkeypatch.setattr(cropping, "_commit_part", failing_at(cropping._commit_part, 1, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        crop_folder(tmp_path / "c", image_folder, 2)
    assert findings(cache.path) == [
        f"unfinished {cache.path / 'crops.partial'}: a crop stage was begun and not finished. Run the same command again."
    ]
    shutil.rmtree(cache.path / "crops.partial")
    shutil.rmtree(cache.path / "view-000")
    assert findings(cache.path) == [f"unfinished {cache.path / 'view-000'}: the cache has no finished view."]


def test_a_view_or_store_may_be_deleted(cache):
    """Views and stores are complete in themselves: without one of them the others are sound."""
    shutil.rmtree(cache.view(0).store_path("fake16"))
    shutil.rmtree(cache.view(1).path)
    assert findings(cache.path) == []


def test_a_cache_can_be_copied(cache, tmp_path):
    """A cache is sound wherever it is copied to, under any name."""
    assert findings(shutil.copytree(cache.path, tmp_path / "wéird name; with 'quotes'\n")) == []
