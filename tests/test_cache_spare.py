"""spare.tar: the second copy is exact, the same on every machine, and no way into or out of a folder."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from cache_fakes import contents, flip_bit
from store_fakes import begin, make_store, spec_of

from teacher_cache.errors import CacheCorruptError
from teacher_cache.files.durable import seal
from teacher_cache.format.layout import SPARE
from teacher_cache.store.spare import is_current, pack, pack_members, read_spare, spare_names, write_spare


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "t.zarr"
    make_store(folder, spec_of())
    return folder


@pytest.fixture
def store(made, tmp_path) -> Path:
    """A finished store that a test may damage."""
    return shutil.copytree(made, tmp_path / "t.zarr")


def is_shard(name: str) -> bool:
    return name.startswith(("tokens/", "scale/", "attention/")) and not name.endswith("zarr.json")


def test_it_holds_every_small_file(shared_cache, store):
    """In a cache, a view and a store the spare holds every file but crops.beton, the shards and itself, byte for byte."""
    view = shared_cache.view(0)
    folders = {shared_cache.path: lambda name: "/" in name, view.path: lambda name: "/" in name or name == "crops.beton",
               store: is_shard, view.store_path("fake16"): is_shard}  # fmt: skip
    for folder, is_other in folders.items():
        files = contents(folder)
        assert files.pop(SPARE) and is_current(folder)
        assert read_spare(folder) == {name: data for name, data in files.items() if not is_other(name)}


def test_a_begun_store_has_one(tmp_path):
    """Before the first shard the spare holds what the store was begun with."""
    begin(tmp_path / "t.zarr", spec_of())
    assert is_current(tmp_path / "t.zarr")
    assert "complete.json" not in spare_names(tmp_path / "t.zarr") and "store.json" in spare_names(tmp_path / "t.zarr")


def test_its_bytes_depend_on_nothing_else(store, tmp_path):
    """Owner, times, permissions and the order in the folder leave no trace; tar can read it."""
    before = (store / SPARE).read_bytes()
    again = shutil.copytree(store, tmp_path / "again", copy_function=shutil.copyfile)
    os.utime(again / "store.json", (1, 1))
    (again / "zarr.json").chmod(0o600)
    write_spare(again)
    assert (again / SPARE).read_bytes() == before == pack(again, spare_names(again))
    with tarfile.open(again / SPARE) as tar:
        assert tar.getnames() == spare_names(store)
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


@pytest.mark.parametrize("name", ["zarr.json", "probe/c.0.0", "store.json", "complete.json", "shards.npy"])
def test_damage_does_not_reach_the_spare(store, name):
    """With a damaged file beside it the spare is not written again, and still gives the sound bytes."""
    sound, data = (store / SPARE).read_bytes(), (store / name).read_bytes()
    for damage in ("a bit", "gone"):
        flip_bit(store / name, 80) if damage == "a bit" else (store / name).unlink()
        if (damage, name) != ("gone", "complete.json"):  # that one may be missing: the store is not complete, then
            with pytest.raises(CacheCorruptError):
                write_spare(store)
        assert (store / SPARE).read_bytes() == sound and read_spare(store)[name] == data


def test_no_bit_of_it_leads_astray(store):
    """Whatever bit is flipped, or wherever it is cut: it is not current, and what can still be read are plain files inside."""
    path, files = store / SPARE, read_spare(store)
    data = path.read_bytes()
    for bit in [*range(0, 8 * 1024, 101), *range(8 * 1024, 8 * len(data), 9001)]:
        flip_bit(path, bit)
        assert not is_current(store), bit
        try:
            read = read_spare(store)
        except CacheCorruptError as error:
            assert SPARE in str(error)
        else:
            assert sum(read[name] != files.get(name) for name in read) <= 1
        flip_bit(path, bit)
    for n_bytes in (0, 1, 511, 512, 5000, len(data) - 1, len(data)):
        path.write_bytes(data[:n_bytes])
        assert is_current(store) == (n_bytes == len(data))
        try:
            assert files.items() >= read_spare(store).items()
        except CacheCorruptError:
            pass
    path.unlink()
    assert not is_current(store)
    with pytest.raises(FileNotFoundError):
        read_spare(store)


def tar_of(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", pax: dict | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT if pax else tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.pax_headers = kind, link, pax or {}
        tar.addfile(member)
    return buffer.getvalue()


HOSTILE = {
    "absolute": tar_of("/etc/passwd"),
    "up": tar_of("../cache.json"),
    "up, later": tar_of("quant/../../x"),
    "a symlink": tar_of("zarr.json", tarfile.SYMTYPE, "/etc/passwd"),
    "a hard link": tar_of("zarr.json", tarfile.LNKTYPE, "store.json"),
    "a device": tar_of("zarr.json", tarfile.CHRTYPE),
    "a folder": tar_of("quant", tarfile.DIRTYPE),
    "sparse": tar_of("zarr.json", pax={"GNU.sparse.major": "0", "GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 50)}),
    "no tar": b"x" * 2000,
    "empty": pack_members({}),
    "behind a symlink": tar_of("elsewhere/x"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_spares(store, case):
    """Names that lead out of the folder, links, devices and sparse files are refused; nothing is ever extracted."""
    (store / "elsewhere").symlink_to("/")
    (store / SPARE).write_bytes(HOSTILE[case])
    before = contents(store)
    with pytest.raises(CacheCorruptError):
        read_spare(store)
    assert not is_current(store) and contents(store) == before


def test_a_foreign_folder_has_none(tmp_path):
    """Of a folder that is no cache, view or store there is nothing to pack."""
    with pytest.raises(CacheCorruptError, match=r"has none of cache.json, checksums.json, store.json"):
        write_spare(tmp_path)


def test_a_table_that_nobody_vouches_for(store):
    """A complete.json that is sealed but names no table does not let just any shards.npy into the spare."""
    sound = (store / SPARE).read_bytes()
    (store / "complete.json").write_bytes(seal({"n_rows": 7, "n_shards": 3}))
    with pytest.raises(CacheCorruptError, match="shards.npy: its SHA-256 is not the recorded one"):
        write_spare(store)
    assert (store / SPARE).read_bytes() == sound
