"""What made a store: on record, told where it differs, and no reason to refuse."""

from __future__ import annotations

import re
import shutil
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from cache_fakes import crop_folder
from fakes import Bf16Teacher, FakeTeacher, write_images
from PIL import __version__ as PILLOW
from store_fakes import TEACHER

from teacher_cache.cache import Cache
from teacher_cache.crops.beton import CropReader
from teacher_cache.encoding.fit import Sample, fit, fit_bytes
from teacher_cache.errors import BadInputError, UsageError
from teacher_cache.extraction import extract
from teacher_cache.extraction.extract import ExtractPlan, extract_view
from teacher_cache.extraction.planning import plan_targets
from teacher_cache.extraction.record import jpeg_decoder, software
from teacher_cache.format.quantize import ChannelStatistics
from teacher_cache.format.spec import MadeWith
from teacher_cache.inspecting.compare import compare
from teacher_cache.inspecting.inspect import describe
from teacher_cache.store.folding import unfold
from teacher_cache.store.manifest import create_store
from teacher_cache.store.store import Store

PLAN = ExtractPlan("last2", shard_rows=8, batch_size=3)


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Cache:
    folder = write_images(tmp_path_factory.mktemp("images"))
    return crop_folder(tmp_path_factory.mktemp("crops") / "c", folder, n_views=2)


@pytest.fixture
def cache(crops, tmp_path) -> Cache:
    return Cache(shutil.copytree(crops.path, tmp_path / "cache"))


def test_the_decoder_is_named():
    """The library that FFCV decodes with is named with its version, which is not that of Pillow's own."""
    assert re.fullmatch(r"libjpeg-turbo \d+\.\d+.* \(build \d+\)", jpeg_decoder())
    assert software()["jpeg_decoder"] == jpeg_decoder() and software()["pillow"] == PILLOW


def test_on_record(cache):
    """A store says its batch size, whether the teacher was compiled, the device and all versions; inspect repeats it."""
    teacher = FakeTeacher()
    teacher.is_compiled = True
    extract_view(cache.view(0), "fake", teacher, PLAN)
    manifest = cache.view(0).store("fake").manifest
    assert manifest.made.batch_size == 3 and manifest.made.compile and manifest.made.device.startswith("cpu")
    assert {"torch", "timm", "open_clip_torch", "pillow", "jpeg_decoder"} <= manifest.software.keys()
    store = describe(cache)["views"][0]["stores"][0]
    assert store["made"] == manifest.made.to_json() and store["software"] == manifest.software


def test_what_differs_is_told(cache, monkeypatch, capsys):
    """Who goes on with other software, batches or compilation, or begins another view so, is told then and now of each."""
    extract_view(cache.view(0), "fake", FakeTeacher(), PLAN)
    store = cache.view(0).store_path("fake")
    teacher = FakeTeacher()
    teacher.is_compiled = True
    monkeypatch.setattr(extract, "software", lambda: {**software(), "torch": "9.9", "new": "1"})
    other = ExtractPlan("last2", shard_rows=8, batch_size=5)
    capsys.readouterr()
    extract_view(cache.view(0), "fake", teacher, other)  # nothing to do
    assert "bytes may differ" not in capsys.readouterr().err
    for number in (0, 1):
        if number == 0:
            unfold(Store.open(store), np.array([True, True, False]))
        assert extract_view(cache.view(number), "fake", teacher, other)
        said = capsys.readouterr().err
        assert f"{store} was begun with other software or another machine; bytes may differ:\n" in said
        assert f"\n  torch: {software()['torch']} then, 9.9 now\n" in said and "new" not in said
        assert "\n  batch_size: 3 then, 5 now\n" in said and "\n  compile: False then, True now\n" in said
        assert "numpy" not in said
    assert Store.open(store).manifest.made.batch_size == 3  # of when it was begun


def test_the_batch_size_is_taken_over(cache):
    """Unless it is given, a store goes on with the batches it was begun with."""
    extract_view(cache.view(0), "fake", FakeTeacher(), PLAN)
    assert plan_targets(cache.path, "fake", None)[0].batch_size == 3
    assert plan_targets(cache.path, "fake", None, batch_size=7)[0].batch_size == 7


def test_two_caches(cache, tmp_path):
    """`inspect` of two caches notes in what they were made differently, which makes no other targets."""
    other = Cache(shutil.copytree(cache.path, tmp_path / "other"))
    extract_view(cache.view(0), "fake", FakeTeacher(), PLAN)
    extract_view(other.view(0), "fake", FakeTeacher(), ExtractPlan("last2", shard_rows=8, batch_size=5))
    lines = compare(cache, other)
    assert ("note", "made with batch_size 3 and 5") in {(line.kind, line.text) for line in lines}


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"batch_size": True}, {"compile": 1}, {"device": None}])
def test_records_that_cannot_be(bad):
    """A record with a value that no run has is refused."""
    with pytest.raises(UsageError):
        MadeWith(**{"batch_size": 1, "compile": False, "device": "cpu", **bad})


def test_an_old_store_has_no_place_for_rows_in_fp32(cache):
    """A store of an older version stops at a row that bf16 gives no numbers for, and the other name it advises works."""
    broken = Bf16Teacher(CropReader(cache.view(0).path).read([17]))
    extract_view(cache.view(0), "new", Bf16Teacher(), PLAN)
    path, store = cache.view(0).store_path("new"), cache.view(0).store_path("fake")
    manifest = Store.open(path).manifest
    teacher = replace(manifest.teacher, activation=None, positions=None)
    old = replace(manifest, teacher=teacher, made=None, format_version=1)
    probe = Store.open(path).small_array("probe")
    create_store(store, old, Store.open(path).statistics(), Store.open(path).head(), probe)
    words = f"in bf16 for row 17, {cache.images().names[17]}. fp32 gives numbers, but .* of version 1, .*another --name"
    with pytest.raises(BadInputError, match=words):
        extract_view(cache.view(0), "fake", broken, PLAN)
    assert extract_view(cache.view(0), "other", broken, PLAN)


# --- the sample that the quantiser is fitted on ---------------------------------------------------------------------------


def test_the_sample_costs_a_layer(tmp_path, monkeypatch):
    """However many layers, fitting holds one of them and as much again; the file has the bytes foretold, and is gone after."""
    monkeypatch.setattr(
        "teacher_cache.encoding.fit.BLOCK_VALUES", 1 << 14
    )  # blocks as small beside a layer as they are in earnest
    monkeypatch.setattr("teacher_cache.format.quantize.BLOCK_CHANNELS", 16)
    teacher = replace(TEACHER, dim=128, depth=12, grid=(8, 8))
    spec = ExtractPlan("last12").store_spec(teacher, 1024)
    draws = np.random.default_rng(0)
    with Sample(tmp_path, spec, teacher) as sample:
        assert list(tmp_path.iterdir()) == []  # no name, so nothing is left by a process that is killed
        for _ in range(0, 128, 32):
            tokens = draws.standard_normal((32, 12, 65, 128), "float32")
            sample.add(tokens[:, :, :32])
        del tokens
        assert sample._file.seek(0, 2) == fit_bytes(spec, teacher)
        fit(sample, spec)  # what is imported is imported now
        tracemalloc.start()
        fitted = fit(sample, spec)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    layer = 128 * 32 * 128 * 4
    assert len(fitted.statistics) == len(fitted.fidelity) == 12 and layer < peak < 2.5 * layer < fit_bytes(spec, teacher) / 4
    assert list(tmp_path.iterdir()) == []


def test_statistics_in_blocks_are_those_of_the_whole():
    """Worked out some channels at a time, centre and spread have the bits of the formula on all of them."""
    tokens = np.random.default_rng(0).standard_normal((301, 150), "float32") ** 3
    centre = np.median(tokens, axis=0)
    spread = 1.4826 * np.median(np.abs(tokens - centre), axis=0)
    found = ChannelStatistics.fit(tokens)
    assert found.centre.tobytes() == centre.astype("float32").tobytes()
    assert found.spread.tobytes() == np.maximum(spread, 0.1 * float(np.median(spread))).astype("float32").tobytes()
