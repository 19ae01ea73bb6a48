"""Reading stores: two readers with equal bytes, few open files, and no damage, swap or hole is ever answered with numbers."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from cache_fakes import failing_at, flip_bit
from hypothesis import given
from hypothesis import strategies as st
from store_fakes import CODECS, begin, fill, make_store, same, shard_of, spec_of, values_of
from zarr_oracle import rows_by_zarr

from benchmarks import made_up
from teacher_cache.errors import CacheCorruptError, CropNotCachedError, NotInCacheError, UsageError
from teacher_cache.extraction.extract import ExtractPlan, extract_view
from teacher_cache.files.durable import crc32c
from teacher_cache.format.quantize import ChannelStatistics, dequantise
from teacher_cache.format.shards import HEADER_BYTES
from teacher_cache.kernels import decompress, loops, sigbus
from teacher_cache.store import writer
from teacher_cache.store.manifest import Manifest
from teacher_cache.store.reader import READERS, StoreReader
from teacher_cache.store.store import Store


@pytest.fixture(scope="module", autouse=True)
def no_fsync():
    """Nothing here is about durability, and stores of many shards are made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def store_of(tmp_path_factory):
    """A finished store of 7 rows, made once: (dtype, codec, shard_rows, layers) -> (path, spec, arrays). Not to be damaged."""

    @functools.cache
    def made(dtype="int8", codec="none", shard_rows=3, layers=(1, 3)):
        path, spec = tmp_path_factory.mktemp("stores") / "t.zarr", spec_of(7, shard_rows, layers, dtype, codec)
        return path, spec, make_store(path, spec)

    return made


@pytest.fixture
def store(tmp_path):
    """A finished store, uncompressed, that a test may damage."""
    arrays = make_store(tmp_path / "t.zarr", spec_of())
    return tmp_path / "t.zarr", arrays


def open_shards(store: Path) -> list[str]:
    """What this process holds open of a store, as maps and as files, by the names of the shards."""
    maps = [line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()]
    files = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return sorted(Path(name).relative_to(store).as_posix() for name in maps + files if name.startswith(f"{store}/"))


# --- reading ---------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(["int8", "float16"]), st.sampled_from(CODECS), st.sampled_from([1, 3, 7]), st.sampled_from([(3,), (1, 2, 3)]),
    st.lists(st.integers(0, 6), max_size=12), st.sampled_from(["never", "first", "always"]), st.sampled_from([1, 2, None]),
)  # fmt: skip
def test_readers_are_equal(store_of, dtype, codec, shard_rows, layers, rows, check, window):
    """Any rows, in any order, repeated or none, however few shards stay open: all readers give the bytes that were written."""
    path, spec, arrays = store_of(dtype, codec, shard_rows, layers)
    for name in READERS:
        reader = StoreReader(path, name, check, window)
        for array in spec.array_names:
            assert same(reader.read(array, rows), arrays[array][rows])


@given(
    st.sampled_from(["int8", "float16"]), st.sampled_from(CODECS), st.sampled_from([1, 3, 7]),
    st.lists(st.integers(0, 6), max_size=8), st.integers(0, 6), st.integers(0, 99), st.sampled_from(["never", "first", "always"]),
)  # fmt: skip
def test_readers_are_equal_by_token(store_of, dtype, codec, shard_rows, rows, n_places, seed, check):
    """Any tokens of any rows, in any order, repeated or none: all readers give what lies at those places of the whole rows."""
    path, spec, arrays = store_of(dtype, codec, shard_rows)
    places = np.random.default_rng(seed).integers(0, 5, (len(rows), n_places))
    for name in READERS:
        reader = StoreReader(path, name, check)
        for array in spec.array_names[:-1]:
            whole = arrays[array][rows]
            found = reader.read(array, rows, places=places)
            assert found.shape == (len(rows), *reader.row_shape(array, n_places)) and found.dtype == whole.dtype
            assert all(same(found[i], whole[i].take(places[i], -2)) for i in range(len(rows)))


@pytest.mark.parametrize(
    ("array", "places", "words"),
    [
        ("tokens/01", [[0, 5], [0, 1]], "places 0 to 5 asked for; tokens stand at 0 to 4"),
        ("tokens/01", [[0, -1], [0, 1]], "places -1 to 1 asked for"),
        ("tokens/01", [[0, 1]], r"places must be integers \[2, K\], not int64 \[1, 2\]"),
        ("scale", [[0.0], [1.0]], r"places must be integers \[2, K\], not float64"),
        ("attention", [[0], [1]], "attention has no tokens to choose from"),
    ],
)
def test_places_that_are_not_there(store_of, array, places, words):
    """Tokens that a row does not have are refused before anything is read."""
    with pytest.raises(UsageError, match=words):
        StoreReader(store_of()[0]).read(array, [0, 1], places=np.array(places))


@pytest.mark.parametrize("check", ["never", "first", "always"])
@pytest.mark.parametrize("reader", READERS)
def test_damage_beside_the_wanted_tokens(store, reader, check):
    """Where a row's checksum is compared, it is that of the whole row: damage to a token that nobody asked for is found too."""
    path, arrays = store
    places = np.zeros((2, 1), int)
    opened = StoreReader(path, reader, check)
    before = opened.read("tokens/01", [0, 1], places=places)
    flip_bit(shard_of(path, "tokens/01", 0), 8 * (HEADER_BYTES + arrays["tokens/01"][0].nbytes - 1))  # in the last token of row 0
    if check == "always":
        with pytest.raises(CacheCorruptError, match="row 0 is damaged"):
            opened.read("tokens/01", [0, 1], places=places)
    else:
        assert same(opened.read("tokens/01", [0, 1], places=places), before)
    with contextlib.nullcontext() if check == "never" else pytest.raises(CacheCorruptError, match="row 0"):
        StoreReader(path, reader, check).read("tokens/01", [0, 1], places=places)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", ["int8", "float16"])
@pytest.mark.parametrize("shard_rows", [1, 3, 7])
def test_plain_zarr_reads_everything(store_of, dtype, codec, shard_rows):
    """Nothing needs our code: zarr.open finds every array with its values, and the manifest in the attributes."""
    path, spec, arrays = store_of(dtype, codec, shard_rows)
    group = zarr.open_group(path, mode="r")
    for name, values in arrays.items():
        assert same(group[name][...], values) and group[name].shards[0] == shard_rows and group[name].chunks[0] == 1
    assert group["probe"][...].tolist() == np.arange(12).reshape(2, 6).tolist()
    assert same(group["head/projection"][...], np.eye(6, 4, dtype="float32")) and set(group["head/gamma"][...]) == {2}
    if dtype == "int8":
        assert same(group["quant/03/spread"][...], np.arange(1, 7, dtype="float32"))
    attributes = json.loads((path / "zarr.json").read_bytes())["attributes"]["teacher_cache"]
    assert Manifest.from_json(attributes) == Store.open(path).manifest and Store.open(path).spec == spec


@pytest.mark.parametrize("reader", READERS)
def test_out_is_filled(store_of, reader):
    """Rows land in the caller's array, in a slice of one too, and nowhere else."""
    path, _, arrays = store_of()
    out = np.full((5, 5, 6), 77, "int8")
    returned = StoreReader(path, reader).read("tokens/01", [6, 2], out[1:3])
    assert returned.base is out and same(out[1:3], arrays["tokens/01"][[6, 2]]) and set(out[[0, 3, 4]].flat) == {77}


UNFIT = [np.empty((2, 5, 6), "uint8"), np.empty((3, 5, 6), "int8"), np.empty((2, 6, 5), "int8").swapaxes(1, 2)]


@pytest.mark.parametrize("out", UNFIT, ids=["dtype", "shape", "layout"])
def test_unfit_out_is_refused(store_of, out):
    """An array of another dtype, shape or layout is refused, saying what is needed."""
    with pytest.raises(UsageError, match=r"tokens/01: out must be C-contiguous int8 \(2, 5, 6\)"):
        StoreReader(store_of()[0]).read("tokens/01", [0, 1], out)


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_tokens_are_dequantised(store_of, dtype):
    """`tokens` gives float32 values: (int8 * scale) * spread + centre, or the float16 as they are."""
    path, _, arrays = store_of(dtype, "zstd")
    tokens = StoreReader(path).tokens([5, 0], 3)
    expected = arrays["tokens/03"][[5, 0]].astype("float32")
    if dtype == "int8":
        statistics = ChannelStatistics(np.arange(6, dtype="float32"), np.arange(1, 7, dtype="float32"))
        expected = dequantise(arrays["tokens/03"][[5, 0]], arrays["scale"][[5, 0], 1], statistics, "int8", 4)
    assert same(tokens, expected)


@pytest.mark.parametrize("reader", READERS)
def test_what_is_not_there(store_of, reader):
    """Rows out of range, unknown layers, readers and stores are refused with what there is."""
    path, name = store_of()[0], reader
    reader = StoreReader(path, name)
    for rows in ([7], [-1], [0, 10**12]):
        with pytest.raises(NotInCacheError, match="it has 0 to 6"):
            reader.read("tokens/01", rows)
    with pytest.raises(NotInCacheError, match="no tokens/02; it has tokens/01, tokens/03, scale, attention"):
        reader.read("tokens/02", [0])
    with pytest.raises(NotInCacheError, match="no such store"):
        StoreReader(path.with_name("other.zarr"), name)
    with pytest.raises(UsageError, match="reader is mmap, pread, .*given 'http'"):
        StoreReader(path, "http")
    with pytest.raises(UsageError, match="never, first, always"):
        StoreReader(path, name, "sometimes")


# --- holes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("codec", CODECS)
def test_holes_are_never_numbers(tmp_path, reader, codec):
    """A row that was never extracted raises CropNotCachedError by every reader; finished shards are readable meanwhile."""
    spec = spec_of(7, 3, codec=codec)
    path, arrays = tmp_path / "t.zarr", values_of(spec)
    begin(path, spec)
    with pytest.raises(CropNotCachedError, match="row 0 was never extracted"):
        StoreReader(path, reader).read("attention", [0])
    fill(path, spec, arrays, shards=[2, 0])
    reader = StoreReader(path, reader)
    assert not reader.is_complete and reader.finished.tolist() == [True, False, True] and Store.open(path).missing_shards() == [1]
    for array in spec.array_names:
        assert same(reader.read(array, [6, 0]), arrays[array][[6, 0]])
        with pytest.raises(CropNotCachedError, match=r"row 4 was never extracted \(1 of 2 asked for\). Run teacher-cache"):
            reader.read(array, [0, 4])


@pytest.mark.parametrize("reader", READERS)
def test_interrupted_extraction_has_holes(cache, teacher, monkeypatch, reader):
    """After an interrupted extraction the finished rows are there and the others say so."""
    monkeypatch.setattr(Store, "write_commit", failing_at(Store.write_commit, 2, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        extract_view(cache.view(0), "new", teacher, ExtractPlan(shard_rows=8, layers="last"))
    begun, finished = (StoreReader(cache.view(0).store_path(name), reader) for name in ("new", "fake"))
    assert same(begun.read("attention", range(8)), finished.read("attention", range(8)))
    with pytest.raises(CropNotCachedError, match="row 8 was never extracted .16 of 24"):
        begun.read("tokens/06", range(24))


# --- checks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_first_checks_once_and_always_each_time(tmp_path, codec):
    """With `first` a row is checked the first time only, with `always` every time, with `never` not at all."""
    spec = spec_of(codec=codec)
    arrays = make_store(tmp_path / "t.zarr", spec)
    readers = {check: StoreReader(tmp_path / "t.zarr", check=check) for check in ("first", "always", "never")}
    for reader in readers.values():
        reader.read("attention", [4])
    shard = shard_of(tmp_path / "t.zarr", "attention", 1)
    with open(shard, "r+b") as file:  # in place: the readers' maps see it; the payload of the shard's third row, its last byte
        offset, length = np.frombuffer(shard.read_bytes()[-52:-4], "<u8").reshape(3, 2)[2].tolist()
        file.seek(offset + length - 5)
        file.write(bytes([shard.read_bytes()[offset + length - 5] ^ 1]))
    for check, reader in readers.items():
        assert same(reader.read("attention", [4]), arrays["attention"][[4]])
        if check == "never" and codec == "none":
            assert not same(reader.read("attention", [5]), arrays["attention"][[5]])
        elif check != "never":
            with pytest.raises(CacheCorruptError, match="attention: row 5 is damaged"):
                reader.read("attention", [5])
    with open(shard, "r+b") as file:
        file.seek(np.frombuffer(shard.read_bytes()[-52:-4], "<u8")[2] + 2)
        file.write(b"\x55\xaa\x55")
    if codec == "none":
        readers["first"].read("attention", [4])  # found right before: not looked at again
    with pytest.raises(CacheCorruptError, match="attention: row 4 is damaged"):
        readers["always"].read("attention", [4])


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("check", ["never", "first", "always"])
def test_no_bit_of_a_shard_leads_astray(tmp_path, reader, codec, check):
    """Whatever bit of a shard is flipped: the right bytes or an error naming the file; unchecked, only that row differs."""
    spec = spec_of(6, 6, layers=(1,), codec=codec)
    path = tmp_path / "t.zarr"
    arrays = make_store(path, spec)
    shard = shard_of(path, "tokens/01", 0)
    n_bits, n_found = 8 * shard.stat().st_size, 0
    for bit in [*range(0, n_bits - 8 * 100, 97), *range(n_bits - 8 * 100, n_bits, 23)]:
        flip_bit(shard, bit)
        try:
            got = StoreReader(path, reader, check).read("tokens/01", range(6))
            if check != "never":
                assert same(got, arrays["tokens/01"]), bit
            else:
                assert (got != arrays["tokens/01"]).reshape(6, -1).any(1).sum() <= 1
        except CacheCorruptError as error:
            assert "tokens/01" in str(error)
            n_found += 1
        flip_bit(shard, bit)
    assert n_found > 30


DAMAGE = {
    "deleted": lambda shard: shard.unlink(),
    "truncated": lambda shard: os.truncate(shard, shard.stat().st_size - 1),
    "grown": lambda shard: shard.write_bytes(shard.read_bytes() + b"x"),
    "emptied": lambda shard: os.truncate(shard, 0),
    "a folder": lambda shard: (shard.unlink(), shard.mkdir()),
    "a pipe": lambda shard: (shard.unlink(), os.mkfifo(shard)),
    "a symlink": lambda shard: shard.symlink_to(shard.rename(shard.with_name("elsewhere"))),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_shard_files(tmp_path, reader, codec, damage):
    """A committed shard that is gone, shorter, longer or something else is named when a row of it is needed, and not before."""
    path = tmp_path / "t.zarr"
    arrays = make_store(path, spec_of(codec=codec))
    DAMAGE[damage](shard_of(path, "tokens/03", 1))
    opened = StoreReader(path, reader)
    assert same(opened.read("tokens/03", [0, 6]), arrays["tokens/03"][[0, 6]])
    for _ in range(2):
        with pytest.raises(
            CacheCorruptError, match=r"tokens/03/c\.1\.0\.0: (has [\d,]+ bytes|a committed shard cannot be opened)"
        ):
            opened.read("tokens/03", [0, 4])
    assert same(opened.read("tokens/01", range(7)), arrays["tokens/01"])


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("codec", ["none", "lz4"])
@pytest.mark.parametrize("one, other", [(("tokens/01", 0), ("tokens/01", 1)), (("tokens/01", 1), ("tokens/03", 1))], ids=str)
def test_swapped_shards(tmp_path, reader, codec, one, other):
    """Two sound shards of equal size that changed places, within an array or between two, are never read for each other."""
    path, spec = tmp_path / "t.zarr", spec_of(6, 3, codec=codec)
    arrays = values_of(spec)
    arrays = {name: np.zeros_like(values) for name, values in arrays.items()} if codec == "lz4" else arrays  # of equal size
    begin(path, spec)
    fill(path, spec, arrays)
    first, second = shard_of(path, *one), shard_of(path, *other)
    assert first.stat().st_size == second.stat().st_size
    aside = first.rename(path / "aside")
    second.rename(first)
    aside.rename(second)
    for array, shard in (one, other):
        with pytest.raises(
            CacheCorruptError, match=f"{array}/c.{shard}.*: is shard . of array ., in the place of shard {shard} of"
        ):
            StoreReader(path, reader).read(array, [3 * shard])


@pytest.mark.parametrize("reader", READERS)
def test_shard_of_another_store(store, tmp_path, reader):
    """A shard of a store with the same arrays and sizes, but another teacher's, is refused."""
    path, _ = store
    other = tmp_path / "other.zarr"
    make_store(other, spec_of(), seed=1, view=1)
    shutil.copy(shard_of(other, "scale", 1), shard_of(path, "scale", 1))
    with pytest.raises(CacheCorruptError, match="scale/c.1.0.0.0: is a shard of another store"):
        StoreReader(path, reader).read("scale", [4])


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("share", [0, 0.5, 0.75])
def test_cut_short_while_open(tmp_path, codec, share):
    """A shard that is cut short in place under an open reader raises; other shards are read on."""
    path = tmp_path / "t.zarr"
    arrays = make_store(path, spec_of(codec=codec))
    opened, out = StoreReader(path, "pread"), np.full((3, 5, 6), 77, "int8")
    assert same(opened.read("tokens/01", [3, 4, 5]), arrays["tokens/01"][[3, 4, 5]])
    shard = shard_of(path, "tokens/01", 1)
    os.truncate(shard, int(share * shard.stat().st_size))
    for rows in ([3, 4, 5], [5]):
        with pytest.raises(CacheCorruptError, match=r"tokens/01.*(was cut short|has [\d,]+ bytes)"):
            opened.read("tokens/01", rows, out[: len(rows)])
    assert same(opened.read("tokens/01", [0, 6]), arrays["tokens/01"][[0, 6]])


@pytest.mark.parametrize("reader", READERS)
def test_replaced_while_open(store, reader):
    """A shard that is replaced by rename under an open reader is read as it was; opened again, its rows are checked again."""
    path, arrays = store
    opened, shard = StoreReader(path, reader), shard_of(path, "tokens/01", 1)
    opened.read("tokens/01", [3, 4, 5])
    aside = shutil.copy(shard, path / "aside")
    flip_bit(Path(aside), 8 * (64 + 34 + 3))  # a token of row 4
    os.replace(aside, shard)
    assert same(opened.read("tokens/01", [3, 4, 5]), arrays["tokens/01"][[3, 4, 5]])
    opened.close()
    with pytest.raises(CacheCorruptError, match="tokens/01: row 4 is damaged"):
        opened.read("tokens/01", [3, 4, 5])


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("codec", CODECS)
def test_sound_checksum_around_wrong_data(tmp_path, monkeypatch, reader, codec):
    """Rows whose checksum fits but which are too short, or no compressed data at all, are refused."""
    spec, path = spec_of(3, 3, layers=(1,), codec=codec), tmp_path / "t.zarr"
    begin(path, spec)
    chunk = b"garbage, but not compressed"[:20]
    sealed = chunk + crc32c(chunk).to_bytes(4, "little")

    def chunks(file, rows):
        data = np.frombuffer(sealed * len(rows), "u1")
        file.index[file.n_rows : file.n_rows + len(rows)] = [
            (file.n_bytes + i * len(sealed), len(sealed)) for i in range(len(rows))
        ]
        file.n_rows += len(rows)
        file.note(data)
        return data

    monkeypatch.setattr(writer._ShardFile, "chunks", chunks)
    fill(path, spec, values_of(spec))
    for check in ("first", "never"):
        with pytest.raises(CacheCorruptError, match="tokens/01: row 0 is damaged"):
            StoreReader(path, reader, check).read("tokens/01", [0])


def bombs(codec: str, n_bytes: int) -> dict[str, bytes]:
    """Chunks of a sound encoding that promise other than the `n_bytes` of a row."""
    encode = writer.encoder(codec)
    if codec == "lz4":
        sound = encode(bytes(n_bytes))
        changed = {
            "much more": (4, 2**31 - 17),
            "one more": (4, n_bytes + 1),
            "one less": (4, n_bytes - 1),
            "longer": (12, 2**30),
        }
        return {name: sound[:at] + struct.pack("<I", value) + sound[at + 4 :] for name, (at, value) in changed.items()}
    magic = b"\x28\xb5\x2f\xfd"
    rest = encode(bytes(n_bytes))[6:]  # behind a content size of one byte
    return {
        "a real gigabyte": encode(bytes(1 << 20)),
        "much more": magic + b"\xe0" + struct.pack("<Q", 1 << 50) + rest,
        "one more": magic + b"\x20" + bytes([n_bytes + 1]) + rest,
        "says nothing": magic + b"\x00\x58" + rest,
        "cut in the size": magic + b"\xe0\x01",
        "only magic": magic,
    }


@pytest.mark.parametrize("codec, name", [(codec, name) for codec in ("zstd", "lz4") for name in bombs(codec, 30)])
def test_decompression_bombs(tmp_path, monkeypatch, codec, name):
    """A chunk that promises more or less than a row is refused by every reader before anything is decoded."""
    spec, path = spec_of(3, 3, layers=(1,), codec=codec), tmp_path / "t.zarr"
    begin(path, spec)
    chunk = bombs(codec, 30)[name]
    with monkeypatch.context() as patch:
        patch.setattr(writer, "encoder", lambda _: lambda row: chunk)
        fill(path, spec, values_of(spec))
    monkeypatch.setattr(decompress, "_codec", lambda name: pytest.fail("it was decoded"))
    for reader in READERS:
        with pytest.raises(CacheCorruptError, match="tokens/01: row 1 is damaged .it (promises|does not say)"):
            StoreReader(path, reader).read("tokens/01", [1])


@given(st.sampled_from(["zstd", "lz4"]), st.integers(1, 70_000), st.integers(0, 255))
def test_promised_bytes(codec, n_bytes, value):
    """What a chunk promises is what was encoded, at every length at which the header changes its form."""
    assert decompress.promised_bytes(codec, bytes(writer.encoder(codec)(bytes([value]) * n_bytes))) == n_bytes


# --- the window ------------------------------------------------------------------------------------------------------


def test_opening_opens_no_shard(store_of):
    """Opening a store looks at none of its shards, and afterwards at those alone that are read."""
    for reader in READERS:
        path, _, _ = store_of(shard_rows=1)
        opened = StoreReader(path, reader)
        assert open_shards(path) == []
        opened.read("attention", [2, 2, 5])
        assert open_shards(path) == ["attention/c.2.0", "attention/c.5.0"]
        opened.close()
        assert open_shards(path) == []


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("codec", ["none", "lz4"])
def test_the_window(tmp_path, reader, codec):
    """However many shards are read in whatever order, few are open, the last used ones; a batch may need more and has them."""
    path, spec = tmp_path / "t.zarr", spec_of(40, 1, layers=(1,), codec=codec)
    arrays = make_store(path, spec)
    opened, draws = StoreReader(path, reader, window=5), np.random.default_rng(0)
    for _ in range(30):
        rows = draws.choice(40, 4, replace=False)
        for array in ("tokens/01", "attention"):
            assert same(opened.read(array, rows), arrays[array][rows])
        is_open = open_shards(path)
        assert len(is_open) == 5 and {f"attention/c.{row}.0" for row in rows} <= set(is_open)
    everything = draws.permutation(40)
    assert same(opened.read("scale", everything), arrays["scale"][everything]) and len(open_shards(path)) == 40
    opened.read("scale", [1])
    assert len(open_shards(path)) == 5
    del opened
    assert open_shards(path) == []


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_threads_share_a_reader(tmp_path, reader, codec):
    """Threads that read through one small window at once close no shard under each other, also where reading fails."""
    path, spec = tmp_path / "t.zarr", spec_of(30, 1, layers=(1,), codec=codec)
    arrays = make_store(path, spec)
    flip_bit(shard_of(path, "tokens/01", 29), 8 * 70)
    opened = StoreReader(path, reader, "always", window=2)

    def work(seed: int) -> int:
        draws, n_failed = np.random.default_rng(seed), 0
        for _ in range(60):
            rows = draws.choice(30, 5, replace=False)
            try:
                assert same(opened.read("tokens/01", rows), arrays["tokens/01"][rows]) and 29 not in rows
            except CacheCorruptError as error:
                assert 29 in rows and "row 29 is damaged" in str(error)
                n_failed += 1
        return n_failed

    with ThreadPoolExecutor(4) as pool:
        assert min(pool.map(work, range(4))) > 0


def test_a_failure_leaves_nothing_open(tmp_path):
    """Shards that are refused leave no file open behind them."""
    path, spec = tmp_path / "t.zarr", spec_of(20, 1)
    make_store(path, spec)
    for shard in range(20):
        flip_bit(shard_of(path, "attention", shard), -40 if shard % 2 else 40)  # index or header
    for reader in READERS:
        opened = StoreReader(path, reader)
        for row in range(20):
            with pytest.raises(CacheCorruptError, match="its (index|header) is damaged"):
                opened.read("attention", [row])
        assert open_shards(path) == []


def test_too_few_files(tmp_path):
    """With fewer files allowed than a store has shards, pread reads it all; one batch of more says what to do."""
    path, spec = tmp_path / "t.zarr", spec_of(60, 1, layers=(1,))
    arrays = make_store(path, spec)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}
    thirtieth_free = [number for number in range(len(taken) + 30) if number not in taken][29]
    resource.setrlimit(resource.RLIMIT_NOFILE, (thirtieth_free, before[1]))
    try:
        opened = StoreReader(path, "pread", window=12)
        for start in range(0, 60, 10):
            rows = range(start, start + 10)
            assert same(opened.read("tokens/01", rows), arrays["tokens/01"][start : start + 10])
        with pytest.raises(OSError, match=r"Too many open files; allow more \(ulimit -n\), take smaller batches") as raised:
            opened.read("tokens/01", range(60))
        assert "tokens/01/c." in raised.value.filename
        assert same(opened.read("scale", [7]), arrays["scale"][[7]])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


FULL_OF_MAPS = """
import ctypes, mmap, sys
import numcodecs, numpy as np
from teacher_cache.store.reader import StoreReader

libc, n_maps = ctypes.CDLL(None), int(open("/proc/sys/vm/max_map_count").read()) - len(open("/proc/self/maps").readlines())
filler = mmap.mmap(-1, 4096 * n_maps)
start = ctypes.addressof(ctypes.c_char.from_buffer(filler))
for page in range(0, n_maps - 150, 2):  # every other page gets rights of its own and so counts as a map
    assert libc.mprotect(ctypes.c_void_p(start + 4096 * page), 4096, mmap.PROT_READ) == 0
reader = StoreReader(sys.argv[1], window=int(sys.argv[2]))
for shard in np.random.default_rng(0).permutation(200):
    assert reader.read("tokens/01", [shard]).tolist() == np.load(sys.argv[3])[[shard]].tolist()
print("read all")
"""


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
    """A store of 200 shards of one array, and its values in a file."""
    folder, spec = tmp_path_factory.mktemp("many"), spec_of(200, 1, (1,), "float16", "zstd", attention=False)
    np.save(folder / "tokens.npy", make_store(folder / "t.zarr", spec)["tokens/01"])
    return folder / "t.zarr", folder / "tokens.npy"


@pytest.mark.parametrize("window", [40, 1000])
def test_too_few_maps(many_shards, window):
    """A store with more shards than there are maps left is read through a small window; a large one says what to do."""
    n_maps = int(Path("/proc/sys/vm/max_map_count").read_text())
    if n_maps > 1 << 18:
        pytest.skip(f"this kernel grants {n_maps:,} maps: too many to use them up")
    path, values = many_shards
    result = subprocess.run([sys.executable, "-c", FULL_OF_MAPS, path, str(window), values], capture_output=True, text=True)
    if window == 40:
        assert (result.stdout, result.stderr) == ("read all\n", "")
    else:
        assert "cannot be mapped (Cannot allocate memory); allow more maps (sysctl vm.max_map_count)" in result.stderr


@pytest.mark.parametrize("reader", READERS)
def test_a_store_can_be_moved(store, tmp_path, reader):
    """A reader keeps reading the shards it has open while its store is moved; of the others it says that they are gone."""
    path, arrays = store
    opened = StoreReader(path, reader)
    opened.read("tokens/01", [0])
    shutil.move(path, tmp_path / "moved.zarr")
    assert same(opened.read("tokens/01", range(3)), arrays["tokens/01"][:3])
    with pytest.raises(CacheCorruptError, match="tokens/01/c.1.0.0: a committed shard cannot be opened .No such file"):
        opened.read("tokens/01", range(7))
    assert same(StoreReader(tmp_path / "moved.zarr", reader).read("scale", range(7)), arrays["scale"])


# --- SIGBUS ----------------------------------------------------------------------------------------------------------


CUT_SHORT = """
import os, sys
from teacher_cache.kernels import sigbus
from teacher_cache.store.reader import StoreReader
path, array, shard, install = sys.argv[1:]
if install == "install":
    sigbus.install()
    sigbus.install()
reader = StoreReader(path)
reader.read(array, range(7))
os.truncate(shard, 0)
try:
    reader.read(array, [0])
finally:
    print("still there")
"""


def run_cut_short(path: Path, array: str, install: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", CUT_SHORT, path, array, shard_of(path, array, 0), install]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_a_map_cut_short_says_which_shard(tmp_path, codec):
    """A shard that is cut short in place under its map ends the process with exit code 1 and one sentence that names it."""
    path = tmp_path / "t.zarr"
    make_store(path, spec_of(7, 7, layers=(1,), codec=codec))
    result = run_cut_short(path, "tokens/01", "install")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"Error: {path}/tokens/01/c.0.0.0 was cut short, or its disk failed, while it was read. Run teacher-cache verify on this "
        "cache. With --reader pread it is an error instead.\n"
    )


def test_crops_cut_short_say_so(cache):
    """crops.beton that is cut short in place is named likewise; it has no other reader to advise."""
    code = """
import os, sys
from teacher_cache.kernels import sigbus
from teacher_cache.crops.beton import CropReader
sigbus.install()
crops = CropReader(sys.argv[1])
os.truncate(crops.path, 0)
print(crops.bytes.sum())
"""
    view = cache.view(0).path
    result = subprocess.run([sys.executable, "-c", code, view], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    sentence = "was cut short, or its disk failed, while it was read. Run teacher-cache verify on this cache."
    assert result.stderr == f"Error: {view}/crops.beton {sentence}\n"


def test_other_bus_errors_take_their_way(tmp_path):
    """Without the handler, or at an address that is no shard's, the process ends by SIGBUS as ever, after any handler before."""
    path = tmp_path / "t.zarr"
    make_store(path, spec_of(7, 7, layers=(1,), codec="zstd"))
    assert run_cut_short(path, "tokens/01", "no").returncode == -signal.SIGBUS
    code = """
import faulthandler, mmap, sys
from teacher_cache.kernels import sigbus
faulthandler.enable()
sigbus.install()
with open(sys.argv[1], "r+b") as file:
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    sigbus.forget(sigbus.watch(id(data), 1, "something else"))
    file.truncate(0)
    print(data[0])
"""
    result = subprocess.run([sys.executable, "-c", code, path / "shards.npy"], capture_output=True, text=True)
    assert result.returncode == -signal.SIGBUS and result.stdout == ""
    assert "Fatal Python error: Bus error" in result.stderr and "was cut short" not in result.stderr


def test_closed_maps_are_forgotten(store_of):
    """The table of maps holds those that are open, each with its file, and no other."""
    path, spec, _ = store_of(shard_rows=1)
    before = dict(sigbus._watched)
    opened = StoreReader(path, window=3)
    for row in range(7):
        opened.read("scale", [row])
    new = {address: line for address, (line, _) in sigbus._watched.items() if address not in before}
    assert len(new) == 3
    for address, line in new.items():
        assert sigbus._table[line, :2].tolist() == [address, 64 + 2 * 20 + 4 + 20]
    opened.close()
    assert sigbus._watched == before and not sigbus._table[list(new.values()), 1].any()


# --- large rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1, 8, 16])
@pytest.mark.parametrize("n_bytes", [0, 63, 64, loops.STREAMED - 1, loops.STREAMED, loops.STREAMED + 37, 151_296])
def test_copies_are_equal(n_bytes, shift):
    """However many bytes are copied, whether past the caches or not, and wherever they lie: these and no others."""
    source, start = np.random.default_rng(n_bytes).integers(1, 256, n_bytes + 64, dtype="uint8"), 16 + shift
    for is_read_soon in (False, True):
        target = np.zeros(n_bytes + 96, "uint8")
        begin = start - target.ctypes.data % 16  # from a multiple of 16 if `shift` is one
        addresses = np.uint64(target.ctypes.data + begin), np.uint64(source.ctypes.data + 3)
        loops.copy_bytes(*addresses, np.uint64(n_bytes), is_read_soon)
        assert np.array_equal(target[begin : begin + n_bytes], source[3 : 3 + n_bytes])
        assert not target[:begin].any() and not target[begin + n_bytes :].any()


def test_large_rows_are_equal(tmp_path):
    """Rows of a full-size teacher are zarr's bytes at their first, checked read and at any later one, by every reader."""
    path, teacher = tmp_path / "t.zarr", made_up.VIT_B16
    spec = made_up.store_spec(teacher, 5, "last", shard_rows=2)
    made_up.begin_store(path, teacher, spec)
    made_up.fill_store(path, teacher, spec)
    rows = np.array([4, 0, 3, 1, 2, 0])
    reference = rows_by_zarr(path, "tokens/12", rows)
    for reader, check in itertools.product(READERS, ("never", "first", "always")):
        opened = StoreReader(path, reader, check)
        for _ in range(2):
            assert same(opened.read("tokens/12", rows), reference)


# --- announcing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_announced_ranges(store_of, monkeypatch, reader, codec):
    """What the kernel is told to read are the very bytes of the rows asked for, with their CRC-32C, and it takes the advice."""
    path, spec, _ = store_of(codec=codec)
    opened, told, advise = StoreReader(path, reader), [], loops.advise
    monkeypatch.setattr(loops, "advise", lambda *arguments: told.append((arguments[0], advise(*arguments))))
    rows = np.array([6, 0, 4, 4])
    opened.announce(["tokens/03", "scale"], rows)
    assert [n_refused for _, n_refused in told] == [0, 0]
    for array, (ranges, _) in zip(["tokens/03", "scale"], told, strict=True):
        for row, (handle, offset, n_bytes) in zip(rows.tolist(), ranges.tolist(), strict=True):
            found = os.pread(handle, n_bytes, offset) if reader == "pread" else ctypes.string_at(handle + offset, n_bytes)
            chunk = opened._chunk(array, row)
            assert found == chunk + crc32c(chunk).to_bytes(4, "little"), row


@pytest.mark.parametrize("reader", READERS)
def test_announcing_never_raises(tmp_path, reader):
    """Rows that are damaged, missing or out of range are left to the read that follows, which says so."""
    spec, path = spec_of(), tmp_path / "t.zarr"
    begin(path, spec)
    fill(path, spec, values_of(spec), shards=[0, 1])
    os.truncate(shard_of(path, "tokens/03", 1), 100)
    opened = StoreReader(path, reader)
    for rows, error in (([6], CropNotCachedError), ([3], CacheCorruptError), ([70], NotInCacheError), ([-1], NotInCacheError)):
        opened.announce(["tokens/03"], np.array(rows))
        with pytest.raises(error):
            opened.read("tokens/03", rows)
    opened.announce(["tokens/03", "attention"], np.array([0, 2]))
    assert len(open_shards(path)) == 2


@pytest.mark.parametrize("reader", READERS)
def test_announcing_a_wrong_index(tmp_path, reader):
    """An index that points outside of its file makes nobody announce, or touch, what lies there."""
    path, spec = tmp_path / "t.zarr", spec_of(3, 3)
    make_store(path, spec)
    shard = shard_of(path, "attention", 0)
    data = bytearray(shard.read_bytes())
    data[-52:-44] = (1 << 60).to_bytes(8, "little")  # the offset of row 0
    data[-4:] = crc32c(bytes(data[-52:-4])).to_bytes(4, "little")
    shard.write_bytes(data)
    opened = StoreReader(path, reader)
    with opened.opened(["attention"], np.array([0, 1])):
        column = opened.columns["attention"]
        ranges = loops.row_ranges(np.array([0, 1]), opened.shards.handles[column], opened.shards.sizes[column],
                                     opened.shards.by_pread, 3)  # fmt: skip
    assert ranges[0].tolist() == [0, 0, 0] and ranges[1, 2] == 4 * 4 + 4
