"""A cache of format version 1, committed: this project and a reader that knows docs/format.md alone must read it for ever.

Nothing makes it any more. test_cache_golden_v4.py makes its like in the version of today.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from fakes import Bf16Teacher
from PIL import Image, __version__, features
from store_fakes import write_again
from zarr_oracle import rows_by_zarr

from teacher_cache.cache import Cache, write_cache
from teacher_cache.checking.verify import verify
from teacher_cache.crops.beton import CropReader, tables_sha256, write_beton
from teacher_cache.files.durable import npy_bytes, read_sealed, seal, sha256_file, write_whole
from teacher_cache.format.crop_plan import CropPlan
from teacher_cache.store.reader import READERS, StoreReader
from teacher_cache.store.spare import write_spare

GOLDEN = Path(__file__).parent / "golden" / "cache_v1"
NUMBERS = GOLDEN.with_suffix(".json")
DOCUMENT = Path(__file__).parents[1] / "docs" / "format.md"

N_IMAGES = 8
PLAN = CropPlan(seed=1, size=32, scale=(0.02, 0.05), jitter=0.4)
"""Small boxes make small JPEGs, and crops.beton has pages of at least 16 of the largest."""
STORES = ("fake", "fake16")
ROW, TOKEN = 7, 3
"""What NUMBERS writes out: the last row, which stands in the short shard; CLS and the third patch."""


def picked(row: np.ndarray) -> list:
    """Of one stored row: attention [N], scale [L, T, G] or tokens [T, D]."""
    return (row[:6] if row.ndim == 1 else row[:, [0, TOKEN]] if row.ndim == 3 else row[[0, TOKEN], :6]).tolist()


def software() -> dict[str, str]:
    """What the bytes of a JPEG depend on."""
    return {"pillow": __version__, "libjpeg_turbo": str(features.version("libjpeg_turbo"))}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def numbers() -> dict:
    return json.loads(NUMBERS.read_text())


# --- a reader written from docs/format.md, with numpy and json alone ---------------------------------------------------


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC_TABLE[(crc ^ byte) & 255] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _crc_of_byte(value: int) -> int:
    for _ in range(8):
        value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value


CRC_TABLE = [_crc_of_byte(byte) for byte in range(256)]


def unseal(path: Path) -> dict:
    data = path.read_bytes()
    line = re.search(rb'^ "crc32c": (\d+),\n', data, re.MULTILINE)
    assert crc32c(data[: line.start()] + data[line.end() :]) == int(line[1]), path
    return json.loads(data)


def encoded_crop(beton: bytes, row: int, n_rows: int) -> tuple[bytes, int]:
    """The encoded crop and the label of a row."""
    version, n_fields, _, n_samples, table = struct.unpack_from("<HHIQQ", beton, 0)
    assert (version, n_fields, n_samples, len(beton)) == (2, 2, n_rows, table + 24 * n_rows)
    mode, width, height, pointer, label = struct.unpack_from("<BHHQ3xq", beton, 24 + 2 * 1041 + 24 * row)
    sample_id, allocated, n_bytes = struct.unpack_from("<QQQ", beton, table + 24 * row)
    assert (mode, width, height, sample_id, allocated) == (0, 32, 32, row, pointer)
    return beton[pointer : pointer + n_bytes], label


def small_array(store: Path, name: str) -> np.ndarray:
    shape = json.loads((store / name / "zarr.json").read_text())["shape"]
    chunk = (store / name / ".".join(["c", *"0" * len(shape)])).read_bytes()
    assert crc32c(chunk[:-4]) == int.from_bytes(chunk[-4:], "little")
    return np.frombuffer(chunk[:-4], "<f4").reshape(shape)


def stored_row(store: Path, array: str, row: int) -> np.ndarray:
    about = json.loads((store / array / "zarr.json").read_text())
    sharding = about["codecs"][0]["configuration"]
    assert [codec["name"] for codec in sharding["codecs"]] == ["bytes", "crc32c"]
    n_slots, *shape = about["chunk_grid"]["configuration"]["chunk_shape"]
    shard, slot = divmod(row, n_slots)
    data = (store / array / ".".join(["c", str(shard), *"0" * len(shape)])).read_bytes()

    manifest = json.loads((store / "zarr.json").read_text())["attributes"]["teacher_cache"]
    column = [name for name, _ in manifest["store"]["codecs"]].index(array)
    assert (len(data), zlib.crc32(data)) == tuple(np.load(store / "shards.npy")[shard, column])

    head, zarr_json = data[:64], (store / "zarr.json").read_bytes()
    assert struct.unpack("<8s32sIQ8sI", head) == (
        b"TCSHARD1", hashlib.sha256(zarr_json).digest(), column, shard, bytes(8), crc32c(head[:-4])
    )  # fmt: skip

    index = data[-16 * n_slots - 4 :]
    assert crc32c(index[:-4]) == int.from_bytes(index[-4:], "little")
    offset, n_bytes = struct.unpack_from("<QQ", index, 16 * slot)
    chunk = data[offset : offset + n_bytes]
    assert crc32c(chunk[:-4]) == int.from_bytes(chunk[-4:], "little")
    dtypes = {"int8": "i1", "uint8": "u1", "int32": "<i4", "float16": "<f2", "float32": "<f4"}
    return np.frombuffer(chunk[:-4], dtypes[about["data_type"]]).reshape(shape)


def whitened(store: Path, layer: int, row: int) -> np.ndarray:
    """float32 [C+N, D]"""
    spec = json.loads((store / "zarr.json").read_text())["attributes"]["teacher_cache"]["store"]
    stored = stored_row(store, f"tokens/{layer:02d}", row).astype("float32")
    if spec["dtype"] == "float16":
        return stored
    scale = stored_row(store, "scale", row)[spec["layers"].index(layer)].astype("float32")
    per_channel = scale[:, np.arange(stored.shape[1]) // spec["group"]]
    return stored * per_channel * small_array(store, f"quant/{layer:02d}/spread") + small_array(
        store, f"quant/{layer:02d}/centre"
    )


def test_a_reader_written_from_the_document_reads_the_crop(numbers):
    """Name, label, box, checksums and pixels of a row are found by the offsets that docs/format.md gives."""
    cache = unseal(GOLDEN / "cache.json")
    assert (cache["format_version"], cache["n_images"], cache["crop_format"]) == (1, N_IMAGES, "jpeg95")
    assert (GOLDEN / "images.txt").read_bytes().split(b"\n")[ROW].decode() == numbers["name"]
    assert np.load(GOLDEN / "labels.npy")[ROW] == numbers["label"]

    view = GOLDEN / "view-000"
    records = np.load(view / "crops.npy")
    assert records.dtype.itemsize == 60 and records.dtype.fields["jitter"][1] == 25 and len(records) == N_IMAGES
    assert {name: records[ROW][name].tolist() for name in records.dtype.names} == numbers["crop"]
    encoded, label = encoded_crop((view / "crops.beton").read_bytes(), ROW, N_IMAGES)
    assert (len(encoded), crc32c(encoded), label) == (records[ROW]["bytes"], records[ROW]["crc32c"], numbers["label"])
    assert unseal(view / "checksums.json")["crops_id"] == cache["crops_id"]


def test_a_reader_written_from_the_document_reads_the_targets(numbers):
    """Stored numbers are found exactly; dequantised they are the teacher's, and so are its final norm and projection."""
    for name, arrays in numbers["stores"].items():
        store = GOLDEN / "view-000" / f"{name}.zarr"
        assert unseal(store / "store.json") and unseal(store / "complete.json")["n_rows"] == N_IMAGES
        for array, expected in arrays.items():
            assert picked(stored_row(store, array, ROW)) == expected, array

        tokens = whitened(store, 6, ROW)[[0, TOKEN]]
        tolerance = {"fake": 0.03, "fake16": 2e-3}[name]  # half a level, half a unit of float16
        np.testing.assert_allclose(tokens[:, :6], numbers["teacher"]["06"], atol=tolerance)
        final_norm = tokens * small_array(store, "head/gamma") + small_array(store, "head/beta")
        projection = final_norm @ small_array(store, "head/projection")
        np.testing.assert_allclose(final_norm[:, :6], numbers["teacher"]["final_norm"], atol=3 * tolerance)
        np.testing.assert_allclose(projection[:, :6], numbers["teacher"]["projection"], atol=10 * tolerance)
        np.testing.assert_allclose(stored_row(store, "attention", ROW)[:6], numbers["teacher"]["attention"], rtol=1e-6)
    np.testing.assert_allclose(
        whitened(GOLDEN / "view-000" / "fake.zarr", 5, ROW)[[0, TOKEN], :6], numbers["teacher"]["05"], atol=0.03
    )


def test_a_reader_written_from_the_document_finds_the_spares():
    """Each folder has a tar with its small files as they are; every other file is a crop, a shard or a spare."""
    spared = {folder / "spare.tar" for folder in (GOLDEN, GOLDEN / "view-000", *GOLDEN.glob("view-000/*.zarr"))}
    for folder in {path.parent for path in spared}:
        with tarfile.open(folder / "spare.tar") as tar:
            assert tar.getnames() == sorted(tar.getnames())
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
                assert tar.extractfile(member).read() == (folder / member.name).read_bytes()
                spared.add(folder / member.name)
    others = {path for path in GOLDEN.rglob("*") if path.is_file()} - spared
    assert {path.relative_to(GOLDEN / "view-000").parts[1] for path in others if "c." in path.name} >= {"tokens", "attention"}
    assert {path.name for path in others if not path.name.startswith("c.")} == {"crops.beton"}


def test_the_examples_of_the_document_run(monkeypatch):
    """Both Python examples of docs/format.md run as they stand there, and agree with the reader above."""
    monkeypatch.chdir(DOCUMENT.parents[1])
    examples = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        names: dict = {}
        exec(example, names)  # our own document
        np.testing.assert_array_equal(names["tokens"], whitened(Path(names["store"]), names["layer"], names["row"]))


# --- this project's reader and writers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
def test_the_golden_cache_is_readable(numbers, reader):
    """Cache and StoreReader read the committed cache; every reader, and zarr, gives the numbers beside it and every row."""
    cache = Cache(GOLDEN)
    assert cache.images().names[ROW] == numbers["name"] and cache.plan == PLAN
    view = cache.finished_view(0)
    assert view.store_names() == sorted(STORES)
    for name, arrays in numbers["stores"].items():
        store = StoreReader(view.store_path(name), reader=reader)
        assert store.is_complete
        for array, expected in arrays.items():
            rows = store.read(array, range(N_IMAGES))
            assert picked(rows[ROW]) == expected
            np.testing.assert_array_equal(rows, [stored_row(store.path, array, row) for row in range(N_IMAGES)])
            np.testing.assert_array_equal(rows, rows_by_zarr(store.path, array, range(N_IMAGES)))
        np.testing.assert_array_equal(store.tokens([ROW], 6)[0], whitened(store.path, 6, ROW))


def test_the_golden_crops_decode(numbers):
    """A committed JPEG decodes to the pixels that were there when it was written, within a level or two."""
    view = GOLDEN / "view-000"
    pixels = CropReader(view).read([ROW])[0]
    np.testing.assert_allclose(pixels.mean((0, 1)), numbers["pixel_means"], atol=2)
    encoded, _ = encoded_crop((view / "crops.beton").read_bytes(), ROW, N_IMAGES)
    accurate = np.asarray(Image.open(io.BytesIO(encoded)), int)  # Pillow's DCT, not FFCV's fast one
    assert np.abs(pixels - accurate).mean() < 2


def test_verify_finds_the_golden_cache_sound():
    """`verify` has nothing to say about the committed cache."""
    findings, checked = verify(Cache(GOLDEN))
    assert findings == [] and checked.n_files > 50


def test_the_writers_give_the_same_bytes_again(tmp_path):
    """From the same lists, records, encoded crops and stored rows every file is written again bit for bit, on any machine."""
    golden, view = Cache(GOLDEN), Cache(GOLDEN).view(0)
    images, crops, size, crop_format = golden.images(), view.crops(), golden.plan.size, golden.identity.crop_format
    write_cache(tmp_path, images, golden.plan, crop_format, [])

    again, beton = tmp_path / "view-000", (view.path / "crops.beton").read_bytes()
    again.mkdir()
    write_whole(again / "crops.npy", npy_bytes(crops))
    encoded = (encoded_crop(beton, row, N_IMAGES)[0] for row in range(N_IMAGES))
    write_beton(again / "crops.beton", crops, images.labels, size, crop_format, encoded)
    files = {"crops.npy": sha256_file(again / "crops.npy")}
    record = {"bytes": len(beton), "tables_sha256": tables_sha256(again / "crops.beton")}
    decoded = read_sealed(view.path / "checksums.json")["decoded"]  # what the machine's own decoder made of them
    checksums = {"crops_id": golden.crops_id, "files": files, "crops.beton": record, "decoded": decoded}
    write_whole(again / "checksums.json", seal(checksums))
    write_spare(again)

    for name in STORES:
        write_again(view.store_path(name), again / f"{name}.zarr")

    old, new = files_of(GOLDEN), files_of(tmp_path)
    assert old.keys() == new.keys() and changed(old, new) == []


def stores_that_read_alike(golden: Path, names: Iterable[str], reader: str) -> list[StoreReader]:
    """The stores of a golden cache, read by `reader`, in the order of `names`.

    Asserts that it, and zarr, gives every row of every array as it stands in the files, and that verify finds them sound.
    """
    view = Cache(golden).finished_view(0)
    assert view.store_names() == sorted(names)
    stores = [StoreReader(view.store_path(name), reader=reader) for name in names]
    for store in stores:
        for array in store.spec.array_names:
            expected = [stored_row(store.path, array, row) for row in range(N_IMAGES)]
            np.testing.assert_array_equal(store.read(array, range(N_IMAGES)), expected)
            np.testing.assert_array_equal(rows_by_zarr(store.path, array, range(N_IMAGES)), expected)
    assert verify(Cache(golden))[0] == []
    return stores


def require_written_again(golden: Path, names: Iterable[str], folder: Path) -> None:
    """Assert that the stores of a golden cache, written in `folder` from their manifests and rows, have the same files."""
    for name in names:
        path, store = Cache(golden).view(0).store_path(name), folder / f"{name}.zarr"
        write_again(path, store)
        assert files_of(store) == files_of(path)


def require_the_teachers_tokens(golden: Path, last: list) -> None:
    """Assert that the stores `plain` and `mixed` hold the teacher's tokens `last`, of CLS and patch TOKEN of row ROW."""
    np.testing.assert_allclose(whitened(golden / "view-000/plain.zarr", 6, ROW)[[0, TOKEN], :6], last, atol=0.05)
    mixed = whitened(golden / "view-000/mixed.zarr", 6, ROW)[[0, TOKEN], :6]  # in bf16, which the fake tells by an offset
    np.testing.assert_allclose(mixed - Bf16Teacher.OFFSET, last, atol=0.002)


def rewrite(golden: Path, make_cache: Callable[[Path], Path], numbers_of: Callable[[Path], dict]) -> None:
    """Make a golden cache, and what a reader has to find in it, anew."""
    with tempfile.TemporaryDirectory() as folder:
        made = make_cache(Path(folder))
        shutil.rmtree(golden, ignore_errors=True)
        shutil.copytree(made, golden)
    golden.with_suffix(".json").write_text(json.dumps(numbers_of(golden), indent=1) + "\n")
    print(f"{golden}: {sum(map(len, files_of(golden).values())):,} bytes")


def changed(old: dict[str, bytes], new: dict[str, bytes], *names: str) -> list[str]:
    """Which of the files `names` (by default all) differ."""
    return [name for name in names or old if old[name] != new[name]]
