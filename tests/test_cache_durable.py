"""What is read from a cache is not trusted: sizes, shapes, names and links are judged before memory is taken or a path opened."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from cache_fakes import flip_bit
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.errors import BadInputError, CacheCorruptError
from teacher_cache.files import durable
from teacher_cache.files.durable import (
    create_aside,
    inside,
    is_safe_name,
    listed_files,
    make_folder,
    npy_bytes,
    open_plain,
    read_npy,
    read_plain,
    read_sealed,
    seal,
    unseal,
    write_whole,
)

# --- names -----------------------------------------------------------------------------------------------------------


ESCAPES = ["..", "../x", "a/../../x", "a/..", "/etc/passwd", "", ".", "a//b", "a/", "./a", "a\0b", 7, None]


@pytest.mark.parametrize("name", ESCAPES, ids=repr)
def test_names_that_lead_out(tmp_path, name):
    """A name that is absolute, steps up or is no name at all is refused, whether or not something is there."""
    with pytest.raises(CacheCorruptError, match="is no name of a file in it"):
        inside(tmp_path, name)
    with pytest.raises(CacheCorruptError, match="must give the SHA-256 of files in this folder"):
        listed_files({"files": {name: "0" * 64}}, tmp_path)


@pytest.mark.parametrize(
    "files", [{"x" * 101: "0" * 64}, {"ä": "0" * 64}, {"a": "0" * 63}, {"a": "A" * 64}, {"a": 7}, ["a"], None]
)
def test_listings_that_are_none(tmp_path, files):
    """Names that no tar would hold, and sums that are none, are refused."""
    assert listed_files({"files": {"x" * 100: "0" * 64}}, tmp_path) == {"x" * 100: "0" * 64}
    with pytest.raises(CacheCorruptError, match="must give the SHA-256 of files in this folder"):
        listed_files({"files": files}, tmp_path)


@given(st.text())
def test_any_name_stays_inside(name):
    """Whatever the name: it is refused, or its path lies below the folder."""
    root = Path("/nowhere/cache")
    try:
        path = inside(root, name)
    except CacheCorruptError:
        return
    assert is_safe_name(name) and os.path.normpath(path).startswith(f"{root}/")


def test_symlinks(tmp_path):
    """A symlink that leads out of the folder is refused wherever it stands in a path; one that stays inside is followed."""
    root, outside = tmp_path / "cache", tmp_path / "outside"
    (root / "a").mkdir(parents=True)
    outside.mkdir()
    (outside / "b").write_text("")
    (root / "out").symlink_to(outside)
    (root / "up").symlink_to("../outside/b")
    (root / "in").symlink_to("a")
    (root / "loop").symlink_to("loop")
    for name in ("out", "out/b", "out/missing", "up"):
        with pytest.raises(CacheCorruptError, match="a symlink that leads out of .*cache"):
            inside(root, name)
    with pytest.raises(CacheCorruptError, match="leads nowhere"):
        inside(root, "loop/x")
    assert inside(root, "in/new") == root / "in/new"
    (tmp_path / "door").symlink_to(root)
    assert inside(tmp_path / "door", "a") == tmp_path / "door/a"  # the cache itself may be reached through a symlink


def test_only_plain_files_are_opened(tmp_path):
    """A symlink, a folder or a pipe in the place of a file is refused with its name, without waiting for it."""
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "folder", "pipe"):
        with pytest.raises(CacheCorruptError, match=f"{name}: cannot be read"):
            open_plain(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        open_plain(tmp_path / "nothing")
    assert read_plain(tmp_path / "file", 5) == b"12345"
    with pytest.raises(CacheCorruptError, match="file: has 5 bytes; a sound one has at most 4"):
        read_plain(tmp_path / "file", 4)


def test_a_huge_file_takes_no_memory(tmp_path):
    """A JSON file of a terabyte is refused by its size."""
    with open(tmp_path / "cache.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CacheCorruptError, match="cache.json: has 1099511627776 bytes; a sound one has at most"):
        read_sealed(tmp_path / "cache.json")


# --- writing ---------------------------------------------------------------------------------------------------------


def test_folders_are_durable(tmp_path, monkeypatch):
    """Every folder that is made has the entry in its parent synced; one that is there is left alone; a file is in the way."""
    synced = []
    monkeypatch.setattr(durable, "sync_folder", lambda path: synced.append(path))
    make_folder(tmp_path / "a/b/c")
    make_folder(tmp_path / "a/b")
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a/b"]
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="a file stands where a folder is needed"):
        make_folder(tmp_path / "file")


def test_what_stands_aside_is_not_followed(tmp_path):
    """A symlink or an old file under the name aside is replaced by a new file."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "new.partial").symlink_to("precious")
    with create_aside(tmp_path / "new") as file:
        assert file.name == str(tmp_path / "new.partial")
    write_whole(tmp_path / "new", b"yours")
    assert (tmp_path / "precious").read_text() == "mine" and (tmp_path / "new").read_bytes() == b"yours"


# --- arrays ----------------------------------------------------------------------------------------------------------

RECORD = np.dtype([("bytes", "<u8"), ("crc32", "<u4")])


@pytest.mark.parametrize("array", [np.arange(6), np.zeros((2, 0), "f4"), np.ones((2, 3), RECORD), np.int64(7)], ids=str)
def test_arrays_come_back(tmp_path, array):
    """An array is read as it was written, of any shape, records too."""
    write_whole(tmp_path / "a.npy", npy_bytes(array))
    back = read_npy(tmp_path / "a.npy", array.dtype, array.shape)
    assert back.dtype == array.dtype and back.shape == array.shape and back.tobytes() == array.tobytes()


def promise(shape: str, descr: str = "'<i8'", order: str = "False", version: int = 1) -> bytes:
    """A .npy of 80 bytes of values whose header says something else."""
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    header += b" " * (-(10 + len(header) + 1) % 64) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(2, "little") + header + bytes(80)


FALSE_PROMISES = {
    "a terabyte": promise("(137438953472,)"),
    "more dimensions": promise("(10, 10)"),
    "one value less": promise("(9,)"),
    "negative": promise("(-10,)"),
    "negative twice": promise("(-2, -5)"),
    "overflow": promise("(4294967296, 4294967296, 10)"),
    "another type": promise("(10,)", "'<f8'"),
    "objects": promise("(10,)", "'|O'"),
    "no size": promise("(99999999999999,)", "'|V0'"),
    "columns first": promise("(2, 5)", order="True"),
    "another version": promise("(10,)", version=3),
    "an expression": promise("__import__('os').getpid()"),
    "deep": promise("(" * 5000 + ")" * 5000),
    "text": b"not a .npy at all",
    "nothing": b"",
}


@pytest.mark.parametrize("case", FALSE_PROMISES)
def test_false_promises(tmp_path, case):
    """A .npy whose header promises what the file does not hold, objects or another layout is refused before memory is taken."""
    path = tmp_path / "a.npy"
    path.write_bytes(FALSE_PROMISES[case])
    tracemalloc.start()
    try:
        with pytest.raises(CacheCorruptError, match="a.npy: "):
            read_npy(path, "int64")
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def test_other_shapes(tmp_path):
    """A sound array of another shape than is needed is refused with both."""
    write_whole(tmp_path / "a.npy", npy_bytes(np.arange(6)))
    assert read_npy(tmp_path / "a.npy", "int64").shape == (6,)
    with pytest.raises(CacheCorruptError, match=r"a.npy: has shape \(6,\), \(7,\) is needed"):
        read_npy(tmp_path / "a.npy", "int64", (7,))


# --- sealed JSON -----------------------------------------------------------------------------------------------------


def test_sealed_json(tmp_path):
    """A sealed value comes back; a flipped bit, a cut, another spelling or another file does not, and is named."""
    value = {"b": [1, 2.5, None, True, "ä\n"], "a": {"x": {}}}
    path = tmp_path / "v.json"
    write_whole(path, seal(value))
    assert read_sealed(path) == value
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), 5):
        flip_bit(path, bit)
        with pytest.raises(CacheCorruptError, match=r"v\.json: its own checksum does not fit"):
            read_sealed(path)
        flip_bit(path, bit)
    others = [data[:-1], data + b"\n", data.replace(b"2.5", b"2.50"), b"", b"7", b"[]", b"[" * 100_000, b'{"crc32c": 1e999}',
              b'{"crc32c": ' + b"9" * 5000 + b"}", b'{"crc32c": "\xff"}']  # fmt: skip
    for other in others:
        with pytest.raises(CacheCorruptError, match="the copy: its own checksum"):
            unseal(other, "the copy")


def test_too_much_json_is_not_written(monkeypatch):
    """What no reader would take is refused when it is sealed."""
    monkeypatch.setattr(durable, "MAX_JSON", 1000)
    with pytest.raises(BadInputError, match="too many classes or names"):
        seal({"classes": ["dog"] * 300})
