"""Stores: two routes with equal bytes, plain zarr can read all of it, and no damage or hole is ever answered with numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from cache_fakes import contents, failing_at, flip_bit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teacher_cache import writer
from teacher_cache.commits import count_commits, fold, is_complete
from teacher_cache.errors import BadInputError, CacheCorruptError, CropNotCachedError, NotInCacheError, UsageError
from teacher_cache.extract import ExtractPlan, extract_view
from teacher_cache.quantize import ChannelStatistics, dequantise
from teacher_cache.reader import StoreReader
from teacher_cache.spec import StoreSpec, TeacherSpec
from teacher_cache.store import Manifest, create_store, read_manifest
from teacher_cache.writer import ShardWriter, missing_shards

TEACHER = TeacherSpec(
    name="t", weights="random:0", weights_sha256="0" * 64, image_size=16, patch_size=8, grid=(2, 2), dim=6, depth=3, heads=1,
    has_cls=True, n_registers=0, mean=(0.5,) * 3, std=(0.5,) * 3, norm_eps=1e-5, projection_dim=4, resize="none",
)  # fmt: skip
ROUTES, CODECS = ("direct", "zarr"), ("none", "zstd", "lz4")


def spec_of(n_rows=7, shard_rows=3, layers=(1, 3), dtype="int8", codec="none") -> StoreSpec:
    names = [f"tokens/{layer:02d}" for layer in layers] + ["scale"] * (dtype == "int8") + ["attention"]
    group = 4 if dtype == "int8" else 0
    return StoreSpec(n_rows, shard_rows, layers, dtype, group, True, tuple((name, codec) for name in names))


def values_of(spec: StoreSpec, seed=0) -> dict[str, np.ndarray]:
    """Random content of every row array; half of it compressible."""
    rng, arrays = np.random.default_rng(seed), {}
    for array in spec.array_names:
        shape, dtype = (spec.n_rows, *spec.row_shape(array, TEACHER)), spec.row_dtype(array)
        levels = rng.integers(-127, 128, shape) * (rng.random(shape) < 0.5)
        arrays[array] = levels.astype(dtype) if dtype == "int8" else (levels / 8).astype(dtype)
    return arrays


def begin(path: Path, spec: StoreSpec) -> None:
    statistics = ChannelStatistics(np.arange(6, dtype="float32"), np.arange(1, 7, dtype="float32"))
    head = {"gamma": np.full(6, 2, "float32"), "beta": np.ones(6, "float32"), "projection": np.eye(6, 4, dtype="float32")}
    manifest = Manifest(TEACHER, spec, 0, "c" * 64, "d" * 64, "fp32", (), "e" * 64, {})
    probe = np.arange(6 * len(spec.layers), dtype="float32").reshape(-1, 6)
    create_store(path, manifest, dict.fromkeys(spec.layers, statistics) if spec.group else {}, head, probe)


def fill(path: Path, spec: StoreSpec, arrays: dict[str, np.ndarray], shards=None, batch=2) -> None:
    for shard in range(spec.n_shards) if shards is None else shards:
        rows = spec.rows_of(shard)
        with ShardWriter(path, spec, TEACHER, shard) as out:
            for start in range(rows.start, rows.stop, batch):
                out.append({name: values[start : min(start + batch, rows.stop)] for name, values in arrays.items()})


def make_store(path: Path, spec: StoreSpec, seed=0) -> dict[str, np.ndarray]:
    arrays = values_of(spec, seed)
    begin(path, spec)
    fill(path, spec, arrays)
    fold(path, spec)
    return arrays


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """{(dtype, codec, shard_rows): (path, spec, arrays)}: 7 rows in shards that divide them and that do not."""
    made = {}
    for dtype in ("int8", "float16"):
        for codec in CODECS:
            for shard_rows in (1, 3, 7):
                path, spec = tmp_path_factory.mktemp("stores") / "t.zarr", spec_of(7, shard_rows, dtype=dtype, codec=codec)
                made[dtype, codec, shard_rows] = path, spec, make_store(path, spec)
    return made


@pytest.fixture
def store(tmp_path):
    """A finished store, uncompressed, that a test may damage."""
    arrays = make_store(tmp_path / "t.zarr", spec_of())
    return tmp_path / "t.zarr", arrays


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# --- reading ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["int8", "float16"]), st.sampled_from(CODECS), st.sampled_from([1, 3, 7]),
    st.lists(st.integers(0, 6), max_size=12), st.sampled_from(["never", "first", "always"]),
)  # fmt: skip
def test_routes_are_equal(stores, dtype, codec, shard_rows, rows, check):
    """Any rows, in any order, repeated or none: both routes give the bytes that were written."""
    path, spec, arrays = stores[dtype, codec, shard_rows]
    for route in ROUTES:
        reader = StoreReader(path, route, check)
        for array in spec.array_names:
            assert same(reader.read(array, rows), arrays[array][rows])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", ["int8", "float16"])
@pytest.mark.parametrize("shard_rows", [1, 3, 7])
def test_plain_zarr_reads_everything(stores, dtype, codec, shard_rows):
    """Nothing needs our code: zarr.open finds every array with its values, and the manifest in the attributes."""
    path, spec, arrays = stores[dtype, codec, shard_rows]
    group = zarr.open_group(path, mode="r")
    for name, values in arrays.items():
        assert same(group[name][...], values) and group[name].shards[0] == shard_rows and group[name].chunks[0] == 1
    assert group["probe"][...].tolist() == np.arange(12).reshape(2, 6).tolist()
    assert same(group["head/projection"][...], np.eye(6, 4, dtype="float32")) and set(group["head/gamma"][...]) == {2}
    if dtype == "int8":
        assert same(group["quant/03/spread"][...], np.arange(1, 7, dtype="float32"))
    attributes = json.loads((path / "zarr.json").read_bytes())["attributes"]["teacher_cache"]
    assert Manifest.from_json(attributes) == read_manifest(path) and read_manifest(path).store == spec


@pytest.mark.parametrize("route", ROUTES)
def test_out_is_filled(stores, route):
    """Rows land in the caller's array, in a slice of one too, and nowhere else."""
    path, _, arrays = stores["int8", "none", 3]
    out = np.full((5, 5, 6), 77, "int8")
    returned = StoreReader(path, route).read("tokens/01", [6, 2], out[1:3])
    assert returned.base is out and same(out[1:3], arrays["tokens/01"][[6, 2]]) and set(out[[0, 3, 4]].flat) == {77}


UNFIT = [np.empty((2, 5, 6), "uint8"), np.empty((3, 5, 6), "int8"), np.empty((2, 6, 5), "int8").swapaxes(1, 2)]


@pytest.mark.parametrize("out", UNFIT, ids=["dtype", "shape", "layout"])
def test_unfit_out_is_refused(stores, out):
    """An array of another dtype, shape or layout is refused, saying what is needed."""
    with pytest.raises(UsageError, match=r"tokens/01: out must be C-contiguous int8 \(2, 5, 6\)"):
        StoreReader(stores["int8", "none", 3][0]).read("tokens/01", [0, 1], out)


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_tokens_are_dequantised(stores, dtype):
    """`tokens` gives float32 values: (int8 * scale) * spread + centre, or the float16 as they are."""
    path, _, arrays = stores[dtype, "zstd", 3]
    tokens = StoreReader(path).tokens([5, 0], 3)
    expected = arrays["tokens/03"][[5, 0]].astype("float32")
    if dtype == "int8":
        statistics = ChannelStatistics(np.arange(6, dtype="float32"), np.arange(1, 7, dtype="float32"))
        expected = dequantise(arrays["tokens/03"][[5, 0]], arrays["scale"][[5, 0], 1], statistics, 4)
    assert same(tokens, expected)


@pytest.mark.parametrize("route", ROUTES)
def test_what_is_not_there(stores, route):
    """Rows out of range, unknown layers, routes and stores are refused with what there is."""
    path = stores["int8", "none", 3][0]
    reader = StoreReader(path, route)
    for rows in ([7], [-1], [0, 10**12]):
        with pytest.raises(NotInCacheError, match="it has 0 to 6"):
            reader.read("tokens/01", rows)
    with pytest.raises(NotInCacheError, match="no tokens/02; it has tokens/01, tokens/03, scale, attention"):
        reader.read("tokens/02", [0])
    with pytest.raises(NotInCacheError, match="no such store"):
        StoreReader(path.with_name("other.zarr"), route)
    with pytest.raises(UsageError, match="direct or zarr"):
        StoreReader(path, "http")
    with pytest.raises(UsageError, match="never, first, always"):
        StoreReader(path, route, "sometimes")


# --- holes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("codec", CODECS)
def test_holes_are_never_numbers(tmp_path, route, codec):
    """A row that was never extracted raises CropNotCachedError on both routes; finished shards are readable meanwhile."""
    spec = spec_of(7, 3, codec=codec)
    path, arrays = tmp_path / "t.zarr", values_of(spec)
    begin(path, spec)
    with pytest.raises(CropNotCachedError, match="row 0 was never extracted"):
        StoreReader(path, route).read("attention", [0])
    fill(path, spec, arrays, shards=[2, 0])
    reader = StoreReader(path, route)
    assert not reader.is_complete and reader.finished.tolist() == [True, False, True] and missing_shards(path, spec) == [1]
    for array in spec.array_names:
        assert same(reader.read(array, [6, 0]), arrays[array][[6, 0]])
        with pytest.raises(CropNotCachedError, match=r"row 4 was never extracted \(1 of 2 asked for\). Run teacher-cache"):
            reader.read(array, [0, 4])


@pytest.mark.parametrize("route", ROUTES)
def test_interrupted_extraction_has_holes(cache, teacher, monkeypatch, route):
    """After an interrupted extraction the finished rows are there and the others say so."""
    monkeypatch.setattr(writer, "write_commit", failing_at(writer.write_commit, 2, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        extract_view(cache.view(0), "new", teacher, ExtractPlan(shard_rows=8, layers="last"))
    reader = StoreReader(cache.view(0).store_path("new"), route)
    finished = StoreReader(cache.view(0).store_path("fake"), route)
    assert same(reader.read("attention", range(8)), finished.read("attention", range(8)))
    with pytest.raises(CropNotCachedError, match="row 8 was never extracted .16 of 24"):
        reader.read("tokens/06", range(24))


# --- writing ---------------------------------------------------------------------------------------------------------


def test_batches_do_not_matter(tmp_path):
    """Rows appended one by one or all at once make the same files, and a second store the same again."""
    spec = spec_of(codec="zstd")
    for batch in (1, 3):
        begin(tmp_path / f"{batch}.zarr", spec)
        fill(tmp_path / f"{batch}.zarr", spec, values_of(spec), batch=batch)
        fold(tmp_path / f"{batch}.zarr", spec)
    assert contents(tmp_path / "1.zarr") == contents(tmp_path / "3.zarr")


def test_order_of_shards_does_not_matter(tmp_path):
    """Shards written in any order, some of them twice, make the same store."""
    spec = spec_of()
    for name, shards in (("a", (0, 1, 2)), ("b", (2, 0, 2, 1))):
        begin(tmp_path / name, spec)
        fill(tmp_path / name, spec, values_of(spec), shards)
        fold(tmp_path / name, spec)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_failed_shard_leaves_no_trace(tmp_path):
    """A shard that fails, or gets too few rows or rows of another shape, is not committed and leaves no file aside."""
    spec, path = spec_of(), tmp_path / "t.zarr"
    begin(path, spec)
    before, arrays = contents(path), values_of(spec)
    with pytest.raises(KeyboardInterrupt), ShardWriter(path, spec, TEACHER, 0) as out:
        out.append({name: values[:2] for name, values in arrays.items()})
        raise KeyboardInterrupt
    with pytest.raises(UsageError, match="shard 0 of tokens/01 has 2 of 3 rows"), ShardWriter(path, spec, TEACHER, 0) as out:
        out.append({name: values[:2] for name, values in arrays.items()})
    with pytest.raises(UsageError, match="tokens/01: rows must be int8"), ShardWriter(path, spec, TEACHER, 0) as out:
        out.append({name: values[:3].astype("float64") for name, values in arrays.items()})
    assert contents(path) == before


@pytest.mark.parametrize("call", range(1, 6))
def test_a_disk_that_fills_up_at_the_end(tmp_path, monkeypatch, call):
    """If a shard cannot be made durable, whichever of its files it is, nothing is committed and nothing stays aside."""
    spec, path = spec_of(), tmp_path / "t.zarr"
    begin(path, spec)
    monkeypatch.setattr(writer.os, "fsync", failing_at(writer.os.fsync, call, OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        fill(path, spec, values_of(spec), [1])
    assert not list(path.rglob("*.partial")) and missing_shards(path, spec) == [0, 1, 2]


def test_fold_needs_every_shard(tmp_path):
    """A store with a missing shard is not declared complete."""
    spec, path = spec_of(), tmp_path / "t.zarr"
    begin(path, spec)
    fill(path, spec, values_of(spec), [0, 2])
    with pytest.raises(CacheCorruptError, match="1 of 3 shards are not finished"):
        fold(path, spec)
    assert not is_complete(path) and count_commits(path, spec) == 2


@pytest.mark.parametrize("name", ["write_whole-2", "write_whole-1", "rmtree-1"])
def test_killed_while_folding(tmp_path, monkeypatch, name):
    """Killed at any point of the last step, folding again gives the same store."""
    from teacher_cache import commits

    spec, path = spec_of(), tmp_path / "t.zarr"
    arrays = make_store(tmp_path / "whole.zarr", spec)
    begin(path, spec)
    fill(path, spec, arrays)
    function, call = name.split("-")
    owner = commits if function == "write_whole" else commits.shutil
    with monkeypatch.context() as patch:
        patch.setattr(owner, function, failing_at(getattr(owner, function), int(call), KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            fold(path, spec)
    assert same(StoreReader(path).read("tokens/03", range(7)), arrays["tokens/03"])
    fold(path, spec)
    fold(path, spec)
    assert contents(path) == contents(tmp_path / "whole.zarr")


def test_creating_is_all_or_nothing(tmp_path, monkeypatch):
    """A store whose creation was interrupted is not there, and can be created again."""
    from teacher_cache import store

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_whole", failing_at(store.write_whole, 1, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            begin(tmp_path / "t.zarr", spec_of())
    assert not (tmp_path / "t.zarr").exists()
    begin(tmp_path / "t.zarr", spec_of())
    assert not list(tmp_path.glob("*.partial"))


# --- checks ----------------------------------------------------------------------------------------------------------


def shard_of(path: Path, array: str, shard: int) -> Path:
    return next((path / array).glob(f"c.{shard}.*"))


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


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("check", ["never", "first", "always"])
def test_no_bit_of_a_shard_leads_astray(tmp_path, route, codec, check):
    """Whatever bit of a shard is flipped: the right bytes or an error naming the file; unchecked, only that row differs."""
    spec = spec_of(6, 6, layers=(1,), codec=codec)
    path = tmp_path / "t.zarr"
    arrays = make_store(path, spec)
    shard = shard_of(path, "tokens/01", 0)
    n_bits, n_found = 8 * shard.stat().st_size, 0
    for bit in [*range(0, n_bits - 8 * 100, 97), *range(n_bits - 8 * 100, n_bits, 23)]:
        flip_bit(shard, bit)
        try:
            got = StoreReader(path, route, check).read("tokens/01", range(6))
            if check != "never" or route == "zarr":
                assert same(got, arrays["tokens/01"]), bit
            else:
                assert (got != arrays["tokens/01"]).reshape(6, -1).any(1).sum() <= 1
        except CacheCorruptError as error:
            assert "tokens/01" in str(error)
            n_found += 1
        flip_bit(shard, bit)
    assert n_found > 30


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("damage", ["deleted", "truncated", "grown", "emptied", "a folder"])
def test_shard_files(tmp_path, route, codec, damage):
    """A committed shard that is gone, shorter, longer or something else is named, never answered with fill values."""
    path = tmp_path / "t.zarr"
    make_store(path, spec_of(codec=codec))
    shard = shard_of(path, "tokens/03", 1)
    data = shard.read_bytes()
    shard.unlink()
    if damage == "a folder":
        shard.mkdir()
    elif damage != "deleted":
        shard.write_bytes({"truncated": data[:-1], "grown": data + b"x", "emptied": b""}[damage])
    with pytest.raises(CacheCorruptError, match=r"tokens/03/c\.1\.0\.0: (has \d+ bytes|a committed shard cannot be opened)"):
        StoreReader(path, route).read("tokens/03", [0])


@pytest.mark.parametrize("codec", CODECS)
def test_sound_checksum_around_wrong_data(tmp_path, monkeypatch, codec):
    """Rows whose checksum fits but which are too short, or no compressed data at all, are refused."""
    spec, path = spec_of(3, 3, layers=(1,), codec=codec), tmp_path / "t.zarr"
    begin(path, spec)
    monkeypatch.setattr(writer, "encoder", lambda _: lambda row: b"garbage, but not compressed"[:20])
    fill(path, spec, values_of(spec))
    for check in ("first", "never"):
        with pytest.raises(CacheCorruptError, match="tokens/01: (row 0|a row)"):
            StoreReader(path, check=check).read("tokens/01", [0])


# --- records ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["complete.json", "shards.npy", "store.json", "zarr.json"])
def test_damaged_records_of_a_finished_store(store, name):
    """A flipped bit anywhere in a record of a store, or an empty one, is refused when the store is opened, naming it."""
    path, _ = store
    data = (path / name).read_bytes()
    for bit in range(0, 8 * len(data), max(1, len(data) // 40) * 3):
        flip_bit(path / name, bit)
        with pytest.raises(CacheCorruptError, match=name.replace(".", r"\.")):
            StoreReader(path)
        (path / name).write_bytes(data)
    (path / name).write_bytes(b"")
    with pytest.raises(CacheCorruptError):
        StoreReader(path)


@pytest.mark.parametrize("name", ["shards.npy", "zarr.json", "quant/01/spread/c.0", "head/beta/zarr.json"])
def test_missing_records(store, name):
    """A missing record is named when what it holds is needed."""
    path, _ = store
    (path / name).unlink()
    with pytest.raises(CacheCorruptError, match=name):
        reader = StoreReader(path)
        assert reader.statistics and reader.head


@pytest.mark.parametrize("name", ["quant/03/centre", "head/projection", "probe"])
def test_damaged_small_arrays(store, name):
    """A flipped bit in values or shape of a small array is found before it is used."""
    from teacher_cache.store import read_small_array

    path, _ = store
    for file in (path / name).iterdir():
        for bit in range(0, 8 * file.stat().st_size, 97):
            flip_bit(file, bit)
            with pytest.raises(CacheCorruptError, match=f"{name}.*not the file this store was begun with"):
                read_small_array(path, name)
            flip_bit(file, bit)


def test_edited_array_description(store):
    """zarr.json of an array that was edited is not believed by the zarr route."""
    path, arrays = store
    file = path / "tokens/01/zarr.json"
    file.write_text(file.read_text().replace('"int8"', '"uint8"').replace("-128", "128"))
    with pytest.raises(CacheCorruptError, match="tokens/01/zarr.json: not the file this store was begun with"):
        StoreReader(path, "zarr").read("tokens/01", [0])


def test_damaged_commit_records(tmp_path):
    """Of an unfinished store, a commit record that is damaged, foreign, misnamed or from a smaller store is refused."""
    spec, path = spec_of(), tmp_path / "t.zarr"
    begin(path, spec)
    fill(path, spec, values_of(spec), [0, 1])
    record = path / "commits" / "000001.json"
    data = record.read_bytes()
    for bit in range(0, 8 * len(data), 7):
        flip_bit(record, bit)
        with pytest.raises(CacheCorruptError, match="commits/000001.json"):
            StoreReader(path)
        record.write_bytes(data)
    for other in ((path / "store.json").read_bytes(), (path / "commits" / "000000.json").read_bytes()):
        record.write_bytes(other)
        with pytest.raises(CacheCorruptError, match="000001.json: not a commit record of this store"):
            StoreReader(path)
    record.rename(path / "commits" / "000007.json")
    with pytest.raises(CacheCorruptError, match="000007.json: not a commit record"):
        StoreReader(path)


def test_other_format_version(store):
    """A store of a later format says so instead of being misread."""
    from teacher_cache.durable import read_sealed, seal, sha256_file

    path, _ = store
    (path / "zarr.json").write_text((path / "zarr.json").read_text().replace('"format_version": 1', '"format_version": 2'))
    files = {**read_sealed(path / "store.json")["files"], "zarr.json": sha256_file(path / "zarr.json")}
    (path / "store.json").write_bytes(seal({"files": files}))
    with pytest.raises(BadInputError, match="t.zarr: a store of format version 2; this program reads version 1. Use the version"):
        StoreReader(path)


def test_a_store_can_be_moved_and_deleted(store, tmp_path):
    """A reader keeps working while its store is moved: files are mapped, names are not looked up again."""
    path, arrays = store
    reader = StoreReader(path)
    reader.read("tokens/01", [0])
    shutil.move(path, tmp_path / "moved.zarr")
    assert same(reader.read("tokens/01", range(7)), arrays["tokens/01"])
    assert same(StoreReader(tmp_path / "moved.zarr").read("scale", range(7)), arrays["scale"])
