"""Stores with compressed rows, committed: nothing begins one any more; they are read, verified and gone on with for ever.

`zstd` and `lz4` of golden/codecs_v3 hold the crops of golden/cache_v3, and the targets of its stores `plain` and `seen`.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from fakes import FakeTeacher
from test_cache_golden import N_IMAGES, PLAN, changed, files_of
from test_cache_golden_v3 import GOLDEN
from test_cache_golden_v4 import plan_of, write_images
from zarr_oracle import rows_by_zarr

from teacher_cache.cache import Cache
from teacher_cache.checking.verify import verify
from teacher_cache.extraction.cropping import make_crops, plan_job
from teacher_cache.extraction.extract import extract_view
from teacher_cache.store.folding import unfold
from teacher_cache.store.reader import READERS, StoreReader
from teacher_cache.store.store import Store

COMPRESSED = GOLDEN.with_name("codecs_v3")
TWINS = {"zstd": "plain", "lz4": "seen"}
"""Codec, and name of its store -> the store of cache_v3 with the same targets."""
ROWS = range(N_IMAGES)


@pytest.fixture
def cache(tmp_path) -> Cache:
    """cache_v3 with the compressed stores, and none of its own but the twins."""
    path = shutil.copytree(GOLDEN, tmp_path / "cache", ignore=lambda *_: {"mixed.zarr"})
    for name in TWINS:
        shutil.copytree(COMPRESSED / f"{name}.zarr", path / "view-000" / f"{name}.zarr")
    return Cache(path)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", TWINS)
def test_compressed_stores_are_readable(cache, name, reader):
    """Every array is compressed; every reader, and zarr alone, gives the rows that the uncompressed twin has."""
    view = cache.view(0)
    store, twin = (StoreReader(view.store_path(which), reader, "always") for which in (name, TWINS[name]))
    assert {codec for _, codec in store.spec.codecs} == {name} and store.spec.array_names == twin.spec.array_names
    for array in store.spec.array_names:
        expected = twin.read(array, ROWS)
        np.testing.assert_array_equal(store.read(array, ROWS), expected)
        np.testing.assert_array_equal(rows_by_zarr(store.path, array, ROWS), expected)


def test_compressed_stores_are_verified(cache):
    """They are sound, and a byte that is changed in a shard file is found."""
    assert verify(cache)[0] == []
    shards = [cache.view(0).store_path(name) / "tokens/06/c.1.0.0" for name in sorted(TWINS)]
    for shard in shards:
        data = bytearray(shard.read_bytes())
        data[100] ^= 1
        shard.write_bytes(data)
    found, _ = verify(cache)
    assert [finding.path for finding in found] == [str(shard) for shard in shards]


@pytest.mark.parametrize("name", TWINS)
def test_an_unfinished_compressed_store_goes_on(cache, name):
    """What was begun compressed is finished in its codec: no record of it changes, and its rows are the teacher's."""
    store = cache.view(0).store_path(name)
    before, spec = files_of(store), Store.open(store).spec
    rows = StoreReader(store).tokens(ROWS, 6)
    unfold(Store.open(store), np.arange(spec.n_shards) == 0)
    assert extract_view(cache.view(0), name, FakeTeacher(), plan_of(store))
    after = files_of(store)
    assert after.keys() == before.keys() and not [file for file in changed(before, after) if file.endswith("zarr.json")]
    assert verify(cache)[0] == []
    np.testing.assert_allclose(StoreReader(store).tokens(ROWS, 6), rows, atol=0.2)  # decoders differ between machines


@pytest.mark.parametrize("name", TWINS)
def test_another_view_of_a_compressed_store(cache, name, tmp_path):
    """A view that is added has the codec of view 0: the stores of one name are alike."""
    plan = plan_of(cache.view(0).store_path(name))
    cache = make_crops(plan_job(cache.path, write_images(tmp_path / "images"), PLAN, "jpeg95", 2))
    assert extract_view(cache.view(1), name, FakeTeacher(), plan)
    assert cache.view(1).store(name).spec == cache.view(0).store(name).spec
    assert [finding for finding in verify(cache)[0] if f"{name}.zarr" in finding.path] == []
