"""repair: any file of a cache may be lost or damaged; afterwards every byte is as before, or a sentence says why not."""

from __future__ import annotations

import itertools
import os
import shutil

import pytest
from cache_fakes import contents, crop_folder, failing_at, flip_bit
from store_fakes import compress

from teacher_cache.cache import Cache
from teacher_cache.checking import advice
from teacher_cache.checking.advice import mending_commands
from teacher_cache.checking.findings import Finding
from teacher_cache.checking.repair import repair_lists, repair_store, repair_view
from teacher_cache.checking.verify import verify_folder
from teacher_cache.crops import beton
from teacher_cache.errors import BadInputError, CacheCorruptError, MismatchError, UsageError
from teacher_cache.extraction.extract import ExtractPlan, extract_view
from teacher_cache.files.claims import claimed
from teacher_cache.files.range_claims import claimed_range
from teacher_cache.format.crop_plan import CropPlan
from teacher_cache.format.layout import CROPS_CLAIM
from teacher_cache.store.store import Store

PLAN = ExtractPlan("last", shard_rows=8)


@pytest.fixture(scope="module")
def images(image_folder, tmp_path_factory):
    """The originals; one of them cannot be decoded."""
    folder = shutil.copytree(image_folder, tmp_path_factory.mktemp("small") / "images")
    next(folder.glob("*/*.png")).write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def made(images, teacher):
    """One view, one compressed int8 store of one layer, an image left out: every kind of file."""
    cache = crop_folder(images.parent / "c", images, skip_bad=True)
    extract_view(cache.view(0), "fake", teacher, PLAN)
    compress(cache.view(0).store_path("fake"))
    return cache.path, contents(cache.path)


@pytest.fixture
def whole(made):
    """The path of the small cache; afterwards it must be as it was."""
    path, before = made
    yield path
    assert contents(path) == before


def put(path, files: dict[str, bytes]) -> None:
    """Give a folder these files and no others."""
    for name in contents(path).keys() | files.keys():
        (path / name).unlink(missing_ok=True)
        if name in files:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(files[name])


def mend(path, images, teacher, plan=PLAN) -> list[str]:
    """What `crop --repair` and then `extract --repair` do; returns what was mended."""
    lines = list(repair_lists(path))
    for view in Cache(path).views_on_disk():
        lines += repair_view(view, images)
        for store in sorted(view.path.glob("*.zarr")):
            lines += repair_store(view, store.name.removesuffix(".zarr"))
            extract_view(view, store.name.removesuffix(".zarr"), teacher, plan)
    return lines


DAMAGE = {
    "deleted": lambda data: None,
    "emptied": lambda data: b"",
    "cut": lambda data: data[: len(data) * 2 // 3],
    "changed": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1 :],
}


def damaged(path, how: str) -> None:
    data = DAMAGE[how](path.read_bytes())
    path.unlink()
    if data is not None:
        path.write_bytes(data)


def test_nothing_to_mend(whole, images, teacher):
    """Of a sound cache nothing is mended, and nothing is written."""
    before = {name: (whole / name).stat().st_ino for name in contents(whole)}
    assert mend(whole, images, teacher) == []
    assert {name: (whole / name).stat().st_ino for name in contents(whole)} == before


@pytest.mark.parametrize("how", DAMAGE)
def test_every_large_file_and_spare(whole, made, images, teacher, how):
    """Each shard file, crops.beton and spare.tar that is damaged is found, said to be mended, and as before afterwards."""
    for name in made[1]:
        if name.endswith(("spare.tar", "crops.beton")) or name.split("/")[-1].startswith("c.") and made[1][name][:4] == b"TCSH":
            damaged(whole / name, how)
            assert verify_folder(whole)[0], name
            lines = mend(whole, images, teacher)
            assert len(lines) == 1 and lines[0].startswith(f"{whole / name}: "), (name, lines)
            assert contents(whole) == made[1], name


def test_every_small_file(whole, made, images, teacher):
    """Each small file that is lost or damaged is found, and restored from its spare, to the byte."""
    ways = [*DAMAGE]
    small = [name for name in made[1] if not name.endswith(("spare.tar", "crops.beton")) and made[1][name][:4] != b"TCSH"]
    assert len(small) > 25
    for i, name in enumerate(small):
        damaged(whole / name, ways[i % len(ways)] if made[1][name] else "deleted")
        assert verify_folder(whole)[0], name
        lines = mend(whole, images, teacher)
        assert len(lines) == 1 and lines[0].startswith(f"{whole / name}: ") and lines[0].endswith("Restored from spare.tar."), (
            lines
        )
        assert contents(whole) == made[1], name


@pytest.mark.parametrize("how", ["deleted", "emptied", "changed"])
def test_all_small_files_at_once(whole, made, images, teacher, how):
    """All small files of a cache may be lost together, as long as the spares are there."""
    for name, data in made[1].items():
        if not name.endswith(("spare.tar", "crops.beton")) and data[:4] != b"TCSH" and data:
            damaged(whole / name, how)
    mend(whole, images, teacher)
    assert contents(whole) == made[1]


@pytest.mark.parametrize("array", ["tokens/06", "scale", "attention"])
def test_exchanged_shards(whole, made, images, teacher, array):
    """Shards that changed places are made again; no other shard is touched."""
    first, second, third = sorted((whole / "view-000/fake.zarr" / array).glob("c.*"))
    untouched = third.stat().st_ino
    first.rename(second.with_name("aside")), second.rename(first), second.with_name("aside").rename(second)
    lines = mend(whole, images, teacher)
    assert [line.split(":")[0] for line in lines] == [str(first), str(second)] and third.stat().st_ino == untouched
    assert "is shard 1 of array" in lines[0] and contents(whole) == made[1]


def test_damage_everywhere_at_once(cache, image_folder, teacher):
    """Two views with three stores each, damaged in each of their parts, come back to the byte."""
    before = contents(cache.path)
    for name in (
        "labels.npy", "view-000/crops.npy", "view-001/spare.tar", "view-001/crops.beton", "view-000/fake16.zarr/store.json",
        "view-001/fake.zarr/complete.json", "view-001/fake.zarr/shards.npy", "view-000/fake.zarr/tokens/03/c.1.0.0",
        "view-001/fake-zstd.zarr/scale/c.2.0.0.0", "view-001/fake-zstd.zarr/tokens/04/c.0.0.0",
    ):  # fmt: skip
        damaged(cache.path / name, "changed")
    plans = {"fake": ExtractPlan(shard_rows=8, batch_size=5), "fake16": ExtractPlan(dtype="float16", shard_rows=8, batch_size=5),
             "fake-zstd": ExtractPlan(shard_rows=8, batch_size=5)}  # fmt: skip
    list(repair_lists(cache.path))
    for view in cache.views_on_disk():
        list(repair_view(view, image_folder))
        for name, plan in plans.items():
            list(repair_store(view, name))
            extract_view(view, name, teacher, plan)
    assert contents(cache.path) == before


# --- an unfinished store -----------------------------------------------------------------------------------------------


@pytest.fixture
def unfinished(cache, teacher, monkeypatch):
    """A store of view 0, the only one, with two of three shards."""
    shutil.rmtree(cache.view(1).path)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_commit", failing_at(Store.write_commit, 3, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            extract_view(cache.view(0), "new", teacher, PLAN)
    return cache.view(0).store_path("new")


@pytest.mark.parametrize("name", ["commits/000000.json", "commits/000001.json", "tokens/06/c.1.0.0", "attention/c.0.0"])
@pytest.mark.parametrize("how", ["deleted", "cut", "changed"])
def test_unfinished_store(unfinished, cache, teacher, name, how):
    """In an unfinished store a damaged record or shard costs its own shard, and nothing else."""
    damaged(unfinished / name, how)
    shard = int(name.split(".")[1]) if name.split("/")[-1].startswith("c.") else int(name[-6])
    other = unfinished / f"scale/c.{1 - shard}.0.0.0"
    inode = other.stat().st_ino
    lines = list(repair_store(cache.view(0), "new"))
    assert len(lines) == (0 if "commits" in name and how == "deleted" else 1)
    assert [path.name for path in (unfinished / "commits").glob("*")] == [f"00000{1 - shard}.json"]
    extract_view(cache.view(0), "new", teacher, PLAN)
    assert other.stat().st_ino == inode and verify_folder(cache.path)[0] == []


# --- killed in the middle ----------------------------------------------------------------------------------------------

STATES = {
    "lists": ["cache.json", "images.txt", "view-000/spare.tar"],
    "view": ["view-000/checksums.json", "view-000/crops.beton"],
    "store": ["view-000/fake.zarr/store.json", "view-000/fake.zarr/complete.json"],
    "shard": ["view-000/fake.zarr/tokens/06/c.1.0.0"],
}


@pytest.mark.parametrize("state", STATES)
def test_killed_at_every_step(made, images, teacher, monkeypatch, state):
    """A repair that is killed before a rename or removal (every second one is tried) is finished by the next one."""
    path, before = made
    for call in itertools.count(1, 2):
        for name in STATES[state]:
            damaged(path / name, "changed")
        with monkeypatch.context() as patch:
            calls = itertools.count(1)
            for function in ("replace", "unlink"):
                patch.setattr(os, function, killing_at(getattr(os, function), calls, call))
            try:
                mend(path, images, teacher)
                was_killed = False
            except KeyboardInterrupt:
                was_killed = True
        mend(path, images, teacher)
        assert contents(path) == before, call
        if not was_killed:
            assert call > len(STATES[state])
            return


def killing_at(function, calls, call: int):
    """`function`, but raising KeyboardInterrupt when the shared count of `calls` comes to `call`; claims are let go as ever."""

    def wrapper(path, *arguments, **options):
        if ".claim" not in str(path) and next(calls) == call:
            raise KeyboardInterrupt
        return function(path, *arguments, **options)

    return wrapper


# --- what cannot be mended ---------------------------------------------------------------------------------------------

LOST = {
    "images.txt": "Without one, move the views out of the way",
    "cache.json": "Without one, move the views out of the way",
    "view-000/crops.npy": "Without one, move the stores (*.zarr) out of this folder",
    "view-000/checksums.json": "Without one, move the stores (*.zarr) out of this folder",
    "view-000/fake.zarr/head/gamma/c.0": "delete the store and extract it again: rm -r ",
    "view-000/fake.zarr/store.json": "delete the store and extract it again: rm -r ",
    "view-000/fake.zarr/complete.json": "delete the store and extract it again: rm -r ",
}


@pytest.mark.parametrize("name", LOST)
def test_verify_tells_when_both_copies_are_lost(made, name):
    """Where repair will refuse, verify advises no repair but says with the file what helps then."""
    path, before = made
    folder = path / ("view-000/fake.zarr" if "fake.zarr" in name else "view-000" if "view-000" in name else "")
    (path / name).unlink()
    (folder / "spare.tar").unlink()
    findings, _ = verify_folder(path)
    put(path, before)
    assert LOST[name] in "".join(finding.message for finding in findings)
    (path / name).unlink()
    (folder / "spare.tar").unlink()
    assert mending_commands(path, findings) == []
    put(path, before)


@pytest.mark.parametrize("name", ["labels.npy", "view-000/checksums.json", "view-000/fake.zarr/store.json", "view-000/spare.tar",
                                  "view-000/fake.zarr/tokens/06/c.1.0.0", "view-000/fake.zarr/quant/06/centre/c.0"])  # fmt: skip
def test_links_in_the_place_of_files(made, images, teacher, tmp_path, name):
    """A file that was moved away behind a symlink is said to be one, in verify and in repair, which puts a file there again."""
    path, before = made
    moved = shutil.move(path / name, tmp_path / "elsewhere")
    (path / name).symlink_to(moved)
    of_file = [finding for finding in verify_folder(path)[0] if finding.path == str(path / name)]
    assert [(f.kind, f.message) for f in of_file] == [
        ("damaged", f"is a symbolic link to {moved}. Put the file or folder itself there.")
    ]
    mended = mend(path, images, teacher)
    assert any(line.startswith(f"{path / name}: ") for line in mended) and not (path / name).is_symlink()
    assert contents(path) == before and verify_folder(path)[0] == []


@pytest.mark.parametrize("name", LOST)
def test_both_copies_lost(made, images, name):
    """Where a small file and its spare are both lost, a sentence says what to do, and nothing that is left is touched."""
    path, before = made
    folder = path / ("view-000/fake.zarr" if "fake.zarr" in name else "view-000" if "view-000" in name else "")
    (path / name).unlink()
    (folder / "spare.tar").unlink()
    left = contents(path)
    with pytest.raises(CacheCorruptError) as error:
        mend(path, images, None)
    kind = "list of its finished shards (complete.json" if "complete" in name else (path / name).relative_to(folder).as_posix()
    assert str(error.value).startswith(f"{folder}: ") and f"{kind}" in str(error.value)
    assert "in spare.tar, are lost. Restore it from a backup" in str(error.value) and LOST[name] in str(error.value)
    assert contents(path).items() >= left.items()
    put(path, before)


def test_crops_need_the_originals(whole, made, tmp_path, images):
    """Damaged crops ask for --images, and refuse originals that changed; the damaged file stays, and nothing else is left."""
    view, file = Cache(whole).view(0), whole / "view-000/crops.beton"
    flip_bit(file, 8 * int(beton.CropReader(view.path).pointers[4]) + 999)
    left = contents(whole)
    with pytest.raises(
        UsageError, match="1 of its 23 crops are damaged and have to be cut again from the originals, e.g. row 4. Give"
    ):
        list(repair_view(view, None))
    name = Cache(whole).images().names[4]
    changed = shutil.copytree(images, tmp_path / "images")
    (changed / name).write_bytes((changed / name).read_bytes() + b"\0")
    with pytest.raises(
        BadInputError, match=f"row 4, {name}, is damaged and cannot be had again: the original is not the file it was"
    ):
        list(repair_view(view, changed))
    (changed / name).unlink()
    with pytest.raises(BadInputError, match="cannot be had again: .* has no such original"):
        list(repair_view(view, changed))
    assert contents(whole) == left
    assert list(repair_view(view, images)) == [
        f"{file}: was damaged. Written again: 22 crops as they were in it, 1 cut again from {images}."
    ]


def test_tables_need_no_originals(whole, made):
    """A crops.beton whose header, tables or padding are damaged is written again from its own crops alone."""
    for bit in (9, 8 * 2200, -9):
        flip_bit(whole / "view-000/crops.beton", bit)
        lines = list(repair_view(Cache(whole).view(0), None))
        assert len(lines) == 1 and lines[0].endswith("Written again: 23 crops as they were in it.")
        assert contents(whole) == made[1]


def test_raw_crops(images, tmp_path):
    """Crops that are stored raw are salvaged and cut again too."""
    cache = crop_folder(tmp_path / "c", images, crop_format="raw", skip_bad=True, plan=CropPlan(size=16))
    before = contents(cache.path)
    damaged(cache.view(0).path / "crops.beton", "cut")
    assert len(list(repair_view(cache.view(0), images))) == 1 and contents(cache.path) == before


def test_a_view_of_another_cache_is_not_mended(whole, made, tmp_path, images):
    """A sound view of other crops is not turned into one of these."""
    other = crop_folder(tmp_path / "c", images, skip_bad=True, plan=CropPlan(size=16))
    shutil.rmtree(whole / "view-000")
    shutil.copytree(other.view(0).path, whole / "view-000")
    with pytest.raises(CacheCorruptError, match="it is of another cache. Put the right folder there"):
        list(repair_view(Cache(whole).view(0), images))
    shutil.rmtree(whole / "view-000")
    put(whole, made[1])


def test_no_cache_there(tmp_path):
    """A folder that is no cache is the command's fault."""
    with pytest.raises(UsageError, match="is no cache"):
        list(repair_lists(tmp_path))
    assert contents(tmp_path) == {}


def test_a_writer_at_work_is_left_alone(whole, images):
    """Nothing is mended under the hands of another writer."""
    view = Cache(whole).view(0)
    with claimed(whole / CROPS_CLAIM, "it"):
        for begin in (lambda: repair_lists(whole), lambda: repair_view(view, images)):
            with pytest.raises(MismatchError, match="being written by process"):
                list(begin())
    with (
        claimed_range(view.path / "fake.zarr.claims", 1, 2, "it"),
        pytest.raises(MismatchError, match="being written by process"),
    ):
        list(repair_store(view, "fake"))


# --- the commands to type ----------------------------------------------------------------------------------------------


def test_mending_commands(cache):
    """One command for lists and crops, one for each store, with what it needs; nothing for what no command mends."""

    def commands(*found: tuple[str, str]) -> list[str]:
        findings = [Finding(kind, str(cache.path / name), "") for kind, name in found]
        return [command.replace(str(cache.path), "C") for command in mending_commands(cache.path, findings)]

    assert commands(("unknown", "x"), ("foreign", "view-000/crops.beton"), ("unfinished", "crops.partial")) == []
    assert commands(("damaged", "labels.npy"), ("damaged", "view-000/spare.tar")) == ["teacher-cache crop --repair C"]
    assert commands(("damaged", "view-000/crops.beton"), ("damaged", "labels.npy")) == [
        "teacher-cache crop --repair --images DIR C"
    ]
    fake = "--teacher fake --weights random:0"
    assert commands(("unfinished", "view-001/fake.zarr")) == [f"teacher-cache extract {fake} C"]
    both = [
        ("unfinished", "view-001/fake.zarr"),
        ("damaged", "view-000/fake.zarr/probe"),
        ("damaged", "view-000/fake16.zarr/scale"),
    ]
    mending = f"teacher-cache extract --repair {fake}"
    assert commands(*both) == [f"{mending} C", f"{mending} --name fake16 C"]
    for name in ("zarr.json", "spare.tar"):
        (cache.view(0).store_path("fake") / name).unlink()
    assert commands(("damaged", "view-000/fake.zarr")) == []
    assert advice.BOTH_LOST.keys() == {"cache", "view", "store"}
