"""A cache of format version 1, committed: this project and a reader that knows docs/format.md alone must read it for ever.

    python tests/test_cache_golden.py --rewrite

makes golden/cache_v1/ and golden/cache_v1.json again. A version that has been released is never rewritten: a change of the
format gets a new version and a golden cache of its own beside this one.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import struct
import sys
import tarfile
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import FakeTeacher, image_of
from PIL import Image, __version__, features

from teacher_cache import extract
from teacher_cache.beton import CropReader, tables_sha256, write_beton
from teacher_cache.cache import Cache, write_cache
from teacher_cache.commits import fold
from teacher_cache.cropping import make_crops, plan_job
from teacher_cache.crops import CROP_FORMATS, CropPlan
from teacher_cache.durable import npy_bytes, read_sealed, seal, sha256_file, write_whole
from teacher_cache.extract import ExtractPlan, extract_view
from teacher_cache.reader import READERS, StoreReader
from teacher_cache.spare import write_spare
from teacher_cache.spec import NOT_BEFORE_3
from teacher_cache.store import create_store, read_small_array
from teacher_cache.verify import verify
from teacher_cache.writer import ShardWriter

GOLDEN = Path(__file__).parent / "golden" / "cache_v1"
NUMBERS = GOLDEN.with_suffix(".json")
DOCUMENT = Path(__file__).parents[1] / "docs" / "format.md"

N_IMAGES = 8
PLAN = CropPlan(seed=1, size=32, scale=(0.02, 0.05), jitter=0.4)
"""Small boxes make small JPEGs, and crops.beton has pages of at least 16 of the largest."""
STORES = {
    "fake": ExtractPlan(layers="last2", shard_rows=3, batch_size=2),  # the last of its 3 shards has an empty slot
    "fake16": ExtractPlan(layers="last", dtype="float16", shard_rows=4),
}
NAME_SOFTWARE = ("zarr.json", "store.json", "complete.json", "shards.npy", "spare.tar")
"""Files of a store that follow from the versions in its manifest. The header of a shard, 64 bytes, does so too."""
ROW, TOKEN = 7, 3
"""What NUMBERS writes out: the last row, which stands in the short shard; CLS and the third patch."""


def make_cache(folder: Path) -> Path:
    """The golden cache, made in `folder` from nothing. PPM files, because they have no encoder that could change."""
    for index in range(N_IMAGES):
        path = folder / "images" / f"class-{index // 4}" / f"image-{index}.ppm"
        path.parent.mkdir(parents=True, exist_ok=True)
        image_of(index).save(path)
    cache = make_crops(plan_job(folder / "cache", folder / "images", PLAN, "jpeg95", 1))
    for name, plan in STORES.items():
        extract_view(cache.view(0), name, FakeTeacher(), plan)
    return cache.path


def numbers_of(cache: Path) -> dict:
    """What a reader has to find in the cache: stored numbers, and what the teacher itself said about row ROW."""
    view = Cache(cache).view(0)
    crop, pixels = view.crops()[ROW], CropReader(view.path).read(range(N_IMAGES))
    teacher = FakeTeacher()
    said = teacher(torch.from_numpy(pixels[ROW : ROW + 1]), (5, 6))
    last = said.tokens[0, -1, [0, TOKEN]].numpy()
    final_norm = last * teacher.head["gamma"] + teacher.head["beta"]
    stores = {}
    for name in STORES:
        reader = StoreReader(view.store_path(name), reader="zarr")
        stores[name] = {array: _picked(reader.read(array, [ROW])[0]) for array in reader.spec.array_names}
    return {
        "made_with": software(),
        "name": Cache(cache).images().names[ROW],
        "label": int(Cache(cache).images().labels[ROW]),
        "crop": {name: crop[name].tolist() for name in crop.dtype.names},
        "pixel_means": pixels[ROW].mean((0, 1)).tolist(),
        "decoded_crc32c": crc32c(pixels.tobytes()),
        "stores": stores,
        "teacher": {
            "05": said.tokens[0, 0, [0, TOKEN], :6].tolist(),
            "06": last[:, :6].tolist(),
            "attention": said.attention[0, :6].tolist(),
            "final_norm": final_norm[:, :6].tolist(),
            "projection": (final_norm @ teacher.head["projection"])[:, :6].tolist(),
        },
    }


def _picked(row: np.ndarray) -> list:
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
            assert _picked(stored_row(store, array, ROW)) == expected, array

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
    """Cache and StoreReader read the committed cache; every reader gives the numbers beside it and every row."""
    cache = Cache(GOLDEN)
    assert cache.images().names[ROW] == numbers["name"] and cache.plan == PLAN
    view = cache.finished_view(0)
    assert view.store_names() == sorted(STORES)
    for name, arrays in numbers["stores"].items():
        store = StoreReader(view.store_path(name), reader=reader)
        assert store.is_complete
        for array, expected in arrays.items():
            rows = store.read(array, range(N_IMAGES))
            assert _picked(rows[ROW]) == expected
            np.testing.assert_array_equal(rows, [stored_row(store.path, array, row) for row in range(N_IMAGES)])
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


def write_again(path: Path, store: Path) -> None:
    """Write a store from the manifest, the small arrays and the stored rows of another."""
    reader = StoreReader(path, reader="zarr")
    create_store(store, reader.manifest, reader.statistics, reader.head, read_small_array(path, "probe"))
    for shard in range(reader.spec.n_shards):
        rows = reader.spec.rows_of(shard)
        with ShardWriter(store, reader.spec, reader.teacher, shard) as out:
            out.append({array: reader.read(array, rows) for array in reader.spec.array_names})
    fold(store, reader.spec)


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


def test_the_same_images_and_teacher_give_the_same_cache(tmp_path, numbers):
    """Made again from images and teacher, every file is the same, if the machine's JPEG codec and arithmetic are the same.

    Where they are not, a warning says which, and pixels and tokens have been compared by value instead of bytes.
    """
    for reason in compare_with_golden(make_cache(tmp_path), numbers):
        warnings.warn(f"compared by value, not by bytes: {reason}", stacklevel=1)


def test_another_encoder_is_noticed_and_compared_by_value(tmp_path, numbers, monkeypatch):
    """With another JPEG encoder the comparison says so, and still holds the lists, the boxes, and all values nearly."""
    monkeypatch.setitem(CROP_FORMATS, "jpeg95", 94)  # stands for another libjpeg: nearly the same pixels
    reasons = compare_with_golden(make_cache(tmp_path), numbers)
    assert len(reasons) == 1 and "encodes" in reasons[0]


def test_other_software_is_no_other_cache(tmp_path, numbers, monkeypatch):
    """A cache that other versions made differs in its manifests and what names them, and is compared by bytes all the same."""
    monkeypatch.setattr(extract, "software", lambda: {"python": "4.0"})
    again = make_cache(tmp_path)
    assert compare_with_golden(again, numbers) == compare_with_golden(GOLDEN, numbers)
    assert (again / "view-000/fake.zarr/zarr.json").read_bytes() != (GOLDEN / "view-000/fake.zarr/zarr.json").read_bytes()


def compare_with_golden(again: Path, numbers: dict) -> list[str]:
    """Assert that a cache made again is the golden one. Returns why it had to be compared by value; none: it was by bytes.

    Never compared: software versions. Nearly: fidelity, a sum whose order numpy does not promise.
    """
    old, new = files_of(GOLDEN), files_of(again)
    views = Cache(GOLDEN).view(0), Cache(again).view(0)
    assert old.keys() == new.keys() and verify(Cache(again))[0] == []
    assert [name for name in changed(old, new) if "/" not in name] == []
    crops = [view.crops() for view in views]
    drawn = [name for name in crops[0].dtype.names if name not in ("bytes", "crc32c")]
    np.testing.assert_array_equal(crops[0][drawn], crops[1][drawn])

    pixels = [CropReader(view.path).read(range(N_IMAGES)) for view in views]
    reasons = []
    if not np.array_equal(*crops):
        reasons.append(f"{software()} encodes JPEGs otherwise than {numbers['made_with']}, which wrote the golden cache")
    if crc32c(pixels[0].tobytes()) != numbers["decoded_crc32c"]:
        reasons.append("the libjpeg-turbo of this system decodes JPEGs otherwise than the one that wrote the golden cache")
    for name in STORES:
        if changed(old, new, f"view-000/{name}.zarr/probe/c.0.0"):
            reasons.append(f"torch {torch.__version__} computes {name} otherwise on this machine")

    if not reasons:
        follow = {f"view-000/{name}.zarr/{file}" for name in STORES for file in NAME_SOFTWARE}
        assert {name for name in changed(old, new) if _behind_header(name, old) != _behind_header(name, new)} <= follow
    assert np.abs(pixels[0].astype(int) - pixels[1]).mean() < 2
    for name in STORES:
        readers = [StoreReader(view.store_path(name), reader="zarr") for view in views]
        same_manifest(*(reader.manifest.to_json() for reader in readers), exactly=not reasons)
        for layer in readers[0].spec.layers:
            before, after = (reader.tokens(range(N_IMAGES), layer) for reader in readers)
            assert np.linalg.norm(after - before) < 0.1 * np.linalg.norm(before)
    return reasons


def _behind_header(name: str, files: dict[str, bytes]) -> bytes:
    """All bytes of a file; of a shard file those behind its header."""
    return files[name][64 if "c." in name and re.search("/(tokens|scale|attention)/", name) else 0 :]


def same_manifest(old: dict, new: dict, exactly: bool) -> None:
    """Assert that manifests differ in software, what version 1 lacks, and unless `exactly` what follows from pixels, alone."""
    for manifest in (old, new):
        manifest["teacher"] = {key: value for key, value in manifest["teacher"].items() if key not in NOT_BEFORE_3}
        manifest["store"] = {"visible": 0, **manifest["store"]}
    free = ["format_version", "software"] + ([] if exactly else ["crops_sha256", "probe_sha256"])
    fidelities = [[list(layer.values()) for layer in manifest.pop("fidelity")] for manifest in (old, new)]
    np.testing.assert_allclose(*fidelities, rtol=1e-4 if exactly else 0.5)
    assert {**old, **dict.fromkeys(free)} == {**new, **dict.fromkeys(free)}


def changed(old: dict[str, bytes], new: dict[str, bytes], *names: str) -> list[str]:
    """Which of the files `names` (by default all) differ."""
    return [name for name in names or old if old[name] != new[name]]


def rewrite() -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = make_cache(Path(folder))
        shutil.rmtree(GOLDEN, ignore_errors=True)
        shutil.copytree(made, GOLDEN)
    NUMBERS.write_text(json.dumps(numbers_of(GOLDEN), indent=1) + "\n")
    print(f"{GOLDEN}: {sum(map(len, files_of(GOLDEN).values())):,} bytes")


if __name__ == "__main__":
    if sys.argv[1:] != ["--rewrite"]:
        sys.exit(__doc__)
    rewrite()
