"""A cache with stores of version 5, committed: it must be readable for ever, and is what is made today.

    python tests/test_cache_golden_v5.py --rewrite

makes golden/cache_v5/ and golden/cache_v5.json again. A version that has been released is never rewritten: a change of the
format gets a new version and a golden cache of its own beside these.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import FakeTeacher, image_of
from test_cache_golden import GOLDEN as GOLDEN_V1
from test_cache_golden import (
    PLAN,
    ROW,
    crc32c,
    files_of,
    picked,
    require_written_again,
    rewrite,
    software,
    stored_row,
    stores_that_read_alike,
)

from teacher_cache.cache import Cache
from teacher_cache.crops.beton import CropReader
from teacher_cache.extraction.cropping import make_crops, plan_job
from teacher_cache.extraction.extract import ExtractPlan, extract_view
from teacher_cache.extraction.recode import recode
from teacher_cache.format.quantize import token_errors
from teacher_cache.store.reader import READERS, StoreReader

GOLDEN = GOLDEN_V1.with_name("cache_v5")
NUMBERS = GOLDEN.with_suffix(".json")
N_IMAGES, DIM = 24, 8
STORES = {
    "klt": ExtractPlan(layers="last2", dtype="klt:4.25", shard_rows=10, batch_size=6),  # the last of its 3 shards has empty slots
    "visible": ExtractPlan(layers="last", dtype="klt:3", visible=9, shard_rows=24, batch_size=24),
    "plain": ExtractPlan(layers="last2", shard_rows=24, batch_size=24),
}
RECODED = ("plain", "klt:5", "recoded")


class Narrow(FakeTeacher):
    """The fake teacher, 8 channels wide, so that few images are enough to fit a transform on."""

    def __init__(self):
        super().__init__()
        self.blocks = self.blocks[:, :, :DIM]
        self.head = {name: values[:DIM] for name, values in self.head.items()}
        self.spec = replace(self.spec, dim=DIM)


def make_cache(folder: Path) -> Path:
    """The golden cache, made in `folder` from nothing."""
    for index in range(N_IMAGES):
        path = folder / f"images/class-{index // 12}/image-{index:02d}.ppm"
        path.parent.mkdir(parents=True, exist_ok=True)
        image_of(index).save(path)
    cache = make_crops(plan_job(folder / "cache", folder / "images", PLAN, "jpeg95", 1))
    for name, plan in STORES.items():
        extract_view(cache.view(0), name, Narrow(), plan)
    recode(cache, *RECODED, device="cpu")
    return cache.path


def taught(cache: Path) -> np.ndarray:
    """float32 [N_IMAGES, 2, C+N, D]: what the teacher itself says of blocks 5 and 6."""
    pixels = CropReader(Cache(cache).view(0).path).read(range(N_IMAGES))
    return Narrow()(torch.from_numpy(pixels), (5, 6)).tokens.numpy()


def numbers_of(cache: Path) -> dict:
    """What a reader has to find in the cache: stored numbers of row ROW, and what the teacher said of it."""
    stores = {}
    for name in (*STORES, "recoded"):
        reader = StoreReader(Cache(cache).view(0).store_path(name))
        stores[name] = {array: picked(reader.read(array, [ROW])[0]) for array in reader.spec.array_names}
    return {"made_with": software(), "stores": stores, "teacher": taught(cache)[ROW].tolist()}


@pytest.fixture(scope="module")
def numbers() -> dict:
    return json.loads(NUMBERS.read_text())


def small(store: Path, name: str, *shape: int) -> np.ndarray:
    """A small array, by docs/format.md alone."""
    data = (store / name / ".".join(["c", *["0"] * len(shape)])).read_bytes()
    assert crc32c(data[:-4]) == int.from_bytes(data[-4:], "little")
    return np.frombuffer(data[:-4], "<f4").reshape(shape)


def by_the_document(store: Path, layer: int, row: int) -> np.ndarray:
    """Whitened tokens of one layer of a klt store, float32 [T, D], by docs/format.md alone."""
    spec = json.loads((store / "zarr.json").read_text())["attributes"]["teacher_cache"]["store"]
    layers, place = spec["layers"], spec["layers"].index(layer)
    stop = len(layers) - (len(layers) - 1 - place) // spec["group"] * spec["group"]
    levels, scales = small(store, "quant/levels", 2046), small(store, "quant/scales", 256)
    y = []
    for other in reversed(layers[place:stop]):
        tokens, bits = stored_row(store, f"tokens/{other:02d}", row), small(store, f"quant/{other:02d}/bits", DIM).astype(int)
        assert tokens.shape[1] == int(float(spec["dtype"].split(":")[1]) * DIM / 8) and sum(bits) == 8 * (tokens.shape[1] - 1)
        for_layer = np.zeros((len(tokens), DIM), "float32")
        for token, (number, *codes) in enumerate(tokens.tolist()):
            stream = int.from_bytes(bytes(codes), "little")
            for k, b in enumerate(bits):
                if b:
                    for_layer[token, k] = levels[2**b - 2 + stream % 2**b] * scales[number]
                stream >>= int(b)
        y.append(for_layer)
        assert (tokens[:, 0] < 128).all()  # none is coded by itself: the rest of the document is held by test_pipelines_klt.py
    y = np.concatenate(y, 1)
    return y @ small(store, f"quant/{layer:02d}/basis", y.shape[1], DIM) + small(store, f"quant/{layer:02d}/mean", DIM)


def test_a_reader_written_from_the_document_reads_the_store(numbers):
    """Stored numbers and tokens are found with what docs/format.md says alone, and are the teacher's as near as is on record."""
    for name in ("klt", "visible", "recoded"):
        store = GOLDEN / "view-000" / f"{name}.zarr"
        manifest = json.loads((store / "zarr.json").read_text())["attributes"]["teacher_cache"]
        assert manifest["format_version"] == 5 and (manifest["source"] is None) == (name != "recoded")
        for array, expected in numbers["stores"][name].items():
            assert picked(stored_row(store, array, ROW)) == expected
        for fidelity in manifest["fidelity"]:
            layer = fidelity["layer"]
            true = np.array(numbers["teacher"][layer - 5])
            if name == "visible":
                true = true[[0, *stored_row(store, "index", ROW) + 1]]
            read = by_the_document(store, layer, ROW)
            off = np.linalg.norm(read - true) / np.linalg.norm(true)
            assert off < 3 * fidelity["median"] + 0.01
            mine = StoreReader(store).tokens([ROW], layer)[0]
            np.testing.assert_allclose(mine, read, atol=1e-5)


@pytest.mark.parametrize("reader", READERS)
def test_the_golden_stores_are_readable(reader):
    """Every reader, and zarr, gives every row of every array as it stands in the files, and verify finds them sound."""
    stores = stores_that_read_alike(GOLDEN, [*STORES, "recoded"], reader)
    assert stores[-1].manifest.source["sha256"] == stores[2].store.sha256


def test_the_writers_give_the_same_bytes_again(tmp_path):
    """From the same manifests and stored rows every file is written again bit for bit, on any machine."""
    require_written_again(GOLDEN, [*STORES, "recoded"], tmp_path)


def test_the_same_images_and_teacher_give_the_same_cache(tmp_path, numbers):
    """Made again, all files are there, and tokens as near as they were: a transform's sums may round otherwise elsewhere."""
    again = make_cache(tmp_path)
    old, new = files_of(GOLDEN), files_of(again)
    assert old.keys() == new.keys()
    if software() == numbers["made_with"]:
        assert old["view-000/crops.beton"] == new["view-000/crops.beton"]
    true = taught(again)
    for name in ("klt", "recoded"):
        errors = []
        for cache in (GOLDEN, again):
            reader = StoreReader(Cache(cache).view(0).store_path(name))
            for layer in (5, 6):
                read = reader.tokens(range(N_IMAGES), layer)
                errors.append(np.median(token_errors(true[:, layer - 5], read, reader.statistics[layer])))
        assert errors[:2] == pytest.approx(errors[2:], rel=0.05) and max(errors) < 0.08


if __name__ == "__main__":
    if sys.argv[1:] != ["--rewrite"]:
        sys.exit(__doc__)
    rewrite(GOLDEN, make_cache, numbers_of)
