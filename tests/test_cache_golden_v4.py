"""A cache with stores of version 4, committed: it must be readable for ever, and is what is made today, byte by byte.

    python tests/test_cache_golden_v4.py --rewrite

makes golden/cache_v4/ and golden/cache_v4.json again. A version that has been released is never rewritten: a change of the
format gets a new version and a golden cache of its own beside these.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import Bf16Teacher, FakeTeacher, image_of
from oracles import race
from test_cache_golden import GOLDEN as GOLDEN_V1
from test_cache_golden import (
    N_IMAGES,
    PLAN,
    ROW,
    TOKEN,
    changed,
    crc32c,
    files_of,
    picked,
    require_the_teachers_tokens,
    require_written_again,
    rewrite,
    software,
    stored_row,
    stores_that_read_alike,
    unseal,
    whitened,
)
from test_cache_golden_v3 import IN_FP32, NAME_SOFTWARE, behind_header

from teacher_cache.cache import Cache
from teacher_cache.checking.verify import verify
from teacher_cache.crops.beton import CropReader
from teacher_cache.errors import MismatchError
from teacher_cache.extraction import extract
from teacher_cache.extraction.cropping import make_crops, plan_job
from teacher_cache.extraction.extract import ExtractPlan, extract_view
from teacher_cache.format.crop_plan import CROP_FORMATS
from teacher_cache.store.folding import unfold
from teacher_cache.store.reader import READERS, StoreReader
from teacher_cache.store.store import Store

GOLDEN = GOLDEN_V1.with_name("cache_v4")
NUMBERS = GOLDEN.with_suffix(".json")
STORES = {
    "plain": ExtractPlan(layers="last2", shard_rows=3, batch_size=2),  # the last of its 3 shards has an empty slot
    "mixed": ExtractPlan(layers="last", dtype="float16", shard_rows=4, batch_size=3),
    "pooled": ExtractPlan(layers="last", visible=5, shard_rows=4, batch_size=2),
}


def teachers(pixels: np.ndarray) -> dict[str, FakeTeacher]:
    """Of each store; pixels: uint8 [n, 32, 32, 3], of all crops."""
    pooled = FakeTeacher(has_cls=False, pools=True, has_head=False)
    return {"plain": FakeTeacher(), "mixed": Bf16Teacher(pixels[IN_FP32]), "pooled": pooled}


def write_images(folder: Path) -> Path:
    """The images of all golden caches. PPM files, because they have no encoder that could change."""
    for index in range(N_IMAGES):
        path = folder / f"class-{index // 4}" / f"image-{index}.ppm"
        path.parent.mkdir(parents=True, exist_ok=True)
        image_of(index).save(path)
    return folder


def make_cache(folder: Path) -> Path:
    """The golden cache, made in `folder` from nothing."""
    cache = make_crops(plan_job(folder / "cache", write_images(folder / "images"), PLAN, "jpeg95", 1))
    for name, teacher in teachers(CropReader(cache.view(0).path).read(range(N_IMAGES))).items():
        extract_view(cache.view(0), name, teacher, STORES[name])
    return cache.path


def numbers_of(cache: Path) -> dict:
    """What a reader has to find in the cache: stored numbers, and what the teacher itself said about row ROW."""
    view = Cache(cache).view(0)
    crop, pixels = view.crops()[ROW], CropReader(view.path).read(range(N_IMAGES))
    teacher = FakeTeacher()
    images = torch.from_numpy(pixels[ROW : ROW + 1])
    said = teacher(images, (5, 6))
    last = said.tokens[0, -1, [0, TOKEN]].numpy()
    final_norm = last * teacher.head["gamma"] + teacher.head["beta"]
    stores = {}
    for name in STORES:
        reader = StoreReader(view.store_path(name))
        stores[name] = {array: picked(reader.read(array, [ROW])[0]) for array in reader.spec.array_names}
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
            "06 of all patches": said.tokens[0, -1, 1:, :6].tolist(),
            "attention": said.attention[0, :6].tolist(),
            "pool attention": FakeTeacher(has_cls=False, pools=True)(images, (6,)).attention[0, :6].tolist(),
            "final_norm": final_norm[:, :6].tolist(),
            "projection": (final_norm @ teacher.head["projection"])[:, :6].tolist(),
        },
    }


@pytest.fixture(scope="module")
def numbers() -> dict:
    return json.loads(NUMBERS.read_text())


def test_a_reader_written_from_the_document_reads_the_store(numbers):
    """Manifest, head and stored numbers are found with what docs/format.md says alone, and are the teacher's."""
    for name in STORES:
        store = GOLDEN / "view-000" / f"{name}.zarr"
        manifest = json.loads((store / "zarr.json").read_text())["attributes"]["teacher_cache"]
        has_head = name != "pooled"
        assert manifest["format_version"] == 4 and manifest["store"]["attention"]
        assert manifest["teacher"]["attention_source"] == ("cls" if has_head else "pool")
        assert manifest["teacher"]["head"] == ("layernorm" if has_head else "none")
        assert (store / "head").exists() == has_head
        assert unseal(store / "complete.json")["fp32_rows"] == (IN_FP32 if name == "mixed" else [])
        for array, expected in numbers["stores"][name].items():
            assert picked(stored_row(store, array, ROW)) == expected
    require_the_teachers_tokens(GOLDEN, numbers["teacher"]["06"])

    pooled, index = GOLDEN / "view-000/pooled.zarr", stored_row(GOLDEN / "view-000/pooled.zarr", "index", ROW)
    np.testing.assert_allclose(stored_row(pooled, "attention", ROW)[:6], numbers["teacher"]["pool attention"], rtol=1e-6)
    assert np.array_equal(index, race(stored_row(pooled, "attention", ROW)[None], np.array([ROW]), 0, 5)[0])
    patches = np.array(numbers["teacher"]["06 of all patches"])  # [N, 6]: the same teacher without CLS token
    np.testing.assert_allclose(whitened(pooled, 6, ROW)[:, :6], patches[index], atol=0.05)


@pytest.mark.parametrize("reader", READERS)
def test_the_golden_stores_are_readable(reader):
    """Every reader, and zarr, gives every row of every array as it stands in the files, and verify finds them sound."""
    for name, store in zip(STORES, stores_that_read_alike(GOLDEN, STORES, reader), strict=True):
        assert store.store.read_fp32_rows().tolist() == (IN_FP32 if name == "mixed" else [])


def test_the_writers_give_the_same_bytes_again(tmp_path):
    """From the same manifests and stored rows every file is written again bit for bit, on any machine."""
    require_written_again(GOLDEN, STORES, tmp_path)


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
    assert (again / "view-000/plain.zarr/zarr.json").read_bytes() != (GOLDEN / "view-000/plain.zarr/zarr.json").read_bytes()


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
        assert {name for name in changed(old, new) if behind_header(name, old) != behind_header(name, new)} <= follow
    assert np.abs(pixels[0].astype(int) - pixels[1]).mean() < 2
    for name in STORES:
        readers = [StoreReader(view.store_path(name)) for view in views]
        same_manifest(*(reader.manifest.to_json() for reader in readers), exactly=not reasons)
        for layer in readers[0].spec.layers:
            before, after = (reader.tokens(range(N_IMAGES), layer) for reader in readers)
            assert np.linalg.norm(after - before) < 0.1 * np.linalg.norm(before)
    return reasons


def same_manifest(old: dict, new: dict, exactly: bool) -> None:
    """Assert that two manifests differ in what made them, and unless `exactly` in what follows from the pixels, alone."""
    free = ["software", "made"] if exactly else ["software", "made", "crops_sha256", "probe_sha256"]
    fidelities = [[list(layer.values()) for layer in manifest.pop("fidelity")] for manifest in (old, new)]
    np.testing.assert_allclose(*fidelities, rtol=1e-4 if exactly else 0.5)
    assert {**old, **dict.fromkeys(free)} == {**new, **dict.fromkeys(free)}


@pytest.mark.parametrize("name", ["plain", "mixed"])
def test_a_version_changes_no_number(name):
    """Stores that were made of the same crops and teacher in version 3 have the same quantiser, probe, head and rows."""
    old, new = (files_of(path / f"view-000/{name}.zarr") for path in (GOLDEN.with_name("cache_v3"), GOLDEN))
    assert old.keys() == new.keys()
    arrays = [file for file in old if not file.endswith(NAME_SOFTWARE)]
    assert len(arrays) > 5 and [file for file in arrays if behind_header(file, old) != behind_header(file, new)] == []


# --- older stores go on ------------------------------------------------------------------------------------------------

OLD = {"v1 int8": ("cache_v1", "fake", 1), "v1 float16": ("cache_v1", "fake16", 1), "v2 int4": ("cache_v2", "four", 2),
       "v2 visible": ("cache_v2", "seen", 2), "v3 int8": ("cache_v3", "plain", 3),
       "v3 visible": ("cache_v3", "seen", 3)}  # fmt: skip


def of_now(version: int) -> FakeTeacher:
    """The teacher of the old stores, as it is described now: what they do not say is no difference."""
    teacher = FakeTeacher()
    if version < 3:
        teacher.spec = replace(teacher.spec, activation="quick_gelu", positions="as it is done now")
    return teacher


def plan_of(store: Path) -> ExtractPlan:
    spec = Store.open(store).spec
    layers = ",".join(map(str, spec.layers))
    return ExtractPlan(layers, spec.dtype, shard_rows=spec.shard_rows, batch_size=2, visible=spec.visible)


def old_cache(folder: Path, case: str) -> tuple[Cache, str, int]:
    """A copy of an old golden cache with one of its stores; decoders differ between machines, and pixels are none of this."""
    golden, name, version = OLD[case]
    others = [path.name for path in GOLDEN_V1.with_name(golden).glob("view-000/*.zarr") if path.stem != name]
    ignore = shutil.ignore_patterns(*others)
    return Cache(shutil.copytree(GOLDEN_V1.with_name(golden), folder / "cache", ignore=ignore)), name, version


@pytest.mark.parametrize("case", OLD)
def test_an_unfinished_old_store_goes_on(tmp_path, case):
    """A store that an older version left unfinished is finished in that version: its manifest stays, its values are right."""
    cache, name, version = old_cache(tmp_path, case)
    store = cache.view(0).store_path(name)
    before, spec = files_of(store), Store.open(store).spec
    rows = StoreReader(store).tokens(range(N_IMAGES), 6)
    unfold(Store.open(store), np.arange(spec.n_shards) == 0)
    assert extract_view(cache.view(0), name, of_now(version), plan_of(store))
    assert Store.open(store).manifest.format_version == version and verify(cache)[0] == []
    assert ("fp32_rows" in unseal(store / "complete.json")) == (version >= 3)
    after = files_of(store)
    assert after.keys() == before.keys() and {file for file in changed(before, after) if file.endswith("zarr.json")} == set()
    np.testing.assert_allclose(StoreReader(store).tokens(range(N_IMAGES), 6), rows, atol=0.2)


@pytest.mark.parametrize("case", ["v1 int8", "v2 visible", "v3 visible"])
def test_another_view_of_an_old_store(tmp_path, case):
    """A new view of a cache whose view 0 has an old store gets one of that version, with the same quantiser."""
    cache, name, version = old_cache(tmp_path, case)
    first = cache.view(0).store_path(name)
    cache = make_crops(plan_job(cache.path, write_images(tmp_path / "images"), PLAN, "jpeg95", 2))
    assert extract_view(cache.view(1), name, of_now(version), plan_of(first))
    manifest = cache.view(1).store(name).manifest
    assert manifest.format_version == version and (manifest.made is None) == (version < 3)
    assert manifest.teacher.resize == "none" and verify(cache)[0] == []


def test_a_store_of_version_3_goes_on_with_equal_bytes(tmp_path, monkeypatch):
    """Of a teacher whose pooling head has since become a source of attention, too: such a store has none, and gets none."""
    cache = make_crops(plan_job(tmp_path / "cache", write_images(tmp_path / "images"), PLAN, "jpeg95", 1))
    plan = ExtractPlan(layers="last2", shard_rows=3, batch_size=2)
    monkeypatch.setattr(extract, "new_version", lambda spec: 3)
    for name, then, now in [("cls", FakeTeacher(), FakeTeacher()),
                            ("no cls", FakeTeacher(has_cls=False), FakeTeacher(has_cls=False, pools=True))]:  # fmt: skip
        assert extract_view(cache.view(0), name, then, plan)
        store = cache.view(0).store_path(name)
        before = files_of(store)
        manifest = json.loads(before["zarr.json"])["attributes"]["teacher_cache"]
        assert manifest["format_version"] == 3 and not {"attention_source", "head"} & manifest["teacher"].keys()
        unfold(Store.open(store), np.array([True, False, False]))
        assert extract_view(cache.view(0), name, now, plan) and changed(before, files_of(store)) == []
        assert Store.open(store).spec.attention == Store.open(store).teacher.has_cls
    monkeypatch.undo()
    extract_view(cache.view(0), "anew", FakeTeacher(has_cls=False, pools=True), plan)
    assert cache.view(0).store("anew").spec.attention and verify(cache)[0] == []


def test_an_old_store_of_another_teacher_is_refused(tmp_path):
    """What an old store does say still has to agree."""
    cache, name, _ = old_cache(tmp_path, "v1 int8")
    store = cache.view(0).store_path(name)
    unfold(Store.open(store), np.array([True, True, False]))
    teacher = of_now(1)
    teacher.spec = replace(teacher.spec, resize="bilinear")
    with pytest.raises(MismatchError, match="resize: none in the store, bilinear given"):
        extract_view(cache.view(0), name, teacher, plan_of(store))
    teacher.spec = replace(teacher.spec, resize="none; position table likewise")
    assert extract_view(cache.view(0), name, teacher, plan_of(store))


if __name__ == "__main__":
    if sys.argv[1:] != ["--rewrite"]:
        sys.exit(__doc__)
    rewrite(GOLDEN, make_cache, numbers_of)
