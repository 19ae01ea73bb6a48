"""Rows for which a bf16 teacher gives no numbers: made in fp32, on record, and made so again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cache_fakes import contents, crop_folder
from fakes import Bf16Teacher, FakeTeacher, write_images

from teacher_cache.cache import Cache
from teacher_cache.checking.remake import teach_views_again
from teacher_cache.checking.repair import repair_store
from teacher_cache.checking.verify import verify
from teacher_cache.crops.beton import CropReader
from teacher_cache.errors import BadInputError, CacheCorruptError
from teacher_cache.extraction.extract import ExtractPlan, extract_view
from teacher_cache.files.durable import read_sealed, seal
from teacher_cache.inspecting.inspect import describe
from teacher_cache.store.folding import fold, unfold
from teacher_cache.store.reader import StoreReader
from teacher_cache.store.store import Store, is_complete

PLAN = ExtractPlan("last2", shard_rows=8, batch_size=3)


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Cache:
    """24 crops of 2 views, without targets."""
    folder = write_images(tmp_path_factory.mktemp("images"))
    return crop_folder(tmp_path_factory.mktemp("crops") / "c", folder, n_views=2)


@pytest.fixture
def cache(crops, tmp_path) -> Cache:
    return Cache(shutil.copytree(crops.path, tmp_path / "cache"))


def pixels(cache: Cache, *rows: int, view=0) -> np.ndarray:
    return CropReader(cache.view(view).path).read(list(rows))


def test_such_rows_are_made_in_fp32_and_on_record(cache, capsys):
    """The rows that bf16 gives no numbers for, and no others, are fp32's; the store, inspect and a note say so."""
    teacher = Bf16Teacher(pixels(cache, 4, 17, 18))
    extract_view(cache.view(0), "fake", teacher, PLAN)
    store = cache.view(0).store_path("fake")
    assert Store.open(store).read_fp32_rows().tolist() == [4, 17, 18] == read_sealed(store / "complete.json")["fp32_rows"]
    assert describe(cache)["views"][0]["stores"][0]["fp32_rows"] == 3
    assert "3 crops made in fp32" in capsys.readouterr().err

    extract_view(cache.view(0), "whole", FakeTeacher(), PLAN)  # all in fp32
    found, fp32 = (StoreReader(cache.view(0).store_path(name)).tokens(range(24), 6).mean((1, 2)) for name in ("fake", "whole"))
    apart = np.abs(found - fp32)
    assert (apart[[4, 17, 18]] < 0.004).all() and (np.delete(apart, [4, 17, 18]) > 0.006).all()
    assert [finding for finding in verify(cache)[0] if finding.kind == "damaged"] == []


def test_a_glitch_leaves_no_trace(cache):
    """A batch that is finite when it is run again is what it would have been, and nothing is run in fp32."""
    extract_view(cache.view(0), "plain", Bf16Teacher(), PLAN)
    for name in ("fit", "probe", "rows"):
        glitching = Bf16Teacher(glitches=1)
        if name != "fit":
            calls = {"probe": 8, "rows": 9}[name]
            glitching = Later(glitching, calls)
        extract_view(cache.view(0), name, glitching, PLAN)
        assert glitching.alone == 0
        assert contents(cache.view(0).store_path(name)) == contents(cache.view(0).store_path("plain"))


class Later(Bf16Teacher):
    """A Bf16Teacher with one glitch, at its call `at`."""

    def __init__(self, _, at):
        super().__init__()
        self.at = at

    def __call__(self, images, layers, precision=None):
        self.glitches = int(self.n_calls + 1 == self.at)
        return super().__call__(images, layers, precision)


@pytest.mark.parametrize("remembered", [True, False])
def test_mended_shards_have_the_same_bytes(cache, remembered):
    """A shard that is made again has the same rows in fp32, also on a machine where bf16 would give numbers for them now."""
    extract_view(cache.view(0), "fake", Bf16Teacher(pixels(cache, 4, 17, 18)), PLAN)
    store = cache.view(0).store_path("fake")
    before = contents(store)
    shard = next((store / "tokens/06").glob("c.2.*"))
    shard.write_bytes(shard.read_bytes()[:-100] + bytes(100))
    assert len(list(repair_store(cache.view(0), "fake"))) == 1
    assert not is_complete(store) and Store.open(store).read_fp32_rows().tolist() == [4]
    assert Store.open(store).read_fp32_rows_to_make().tolist() == [17, 18]
    unfold(Store.open(store), np.array([False, True, False]))  # again, before the shard was made
    assert Store.open(store).read_fp32_rows_to_make().tolist() == [4, 17, 18]
    extract_view(cache.view(0), "fake", Bf16Teacher(pixels(cache, 4, 17, 18) if remembered else ()), PLAN)
    assert contents(store) == before


def test_the_teacher_says_the_same_again(cache):
    """`verify --weights` runs the rows on record in fp32, and finds nothing, whether or not bf16 gives numbers for them there."""
    extract_view(cache.view(0), "fake", Bf16Teacher(pixels(cache, 4, 17, 18)), PLAN)
    for broken in (pixels(cache, 4, 17, 18), ()):
        teacher = Bf16Teacher(broken)
        assert list(teach_views_again(cache, teacher, "fake", 24)) == [] and teacher.alone == 3


def test_interrupted_and_continued(cache):
    """Continued after an interruption, a store has the rows of both parts on record."""
    teacher = Bf16Teacher(pixels(cache, 4, 17, 18))
    extract_view(cache.view(0), "whole", teacher, PLAN)
    extract_view(cache.view(0), "fake", teacher, PLAN, range(0, 1))
    store = cache.view(0).store_path("fake")
    assert Store.open(store).read_fp32_rows().tolist() == [4]
    extract_view(cache.view(0), "fake", teacher, PLAN, range(1, 3))
    assert contents(store) == contents(cache.view(0).store_path("whole"))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_what_fp32_cannot_do_either(cache, precision):
    """The error names row and image and what works; shards that were whole before that batch are kept, and the rest goes on."""
    bad = pixels(cache, 17)
    teacher = Bf16Teacher(bad, bad)
    teacher.precision = precision
    image = cache.images().names[17]
    with pytest.raises(BadInputError, match=f"non-finite values in fp32 for row 17, {image} .*SHA-256.*leave the image out"):
        extract_view(cache.view(0), "fake", teacher, PLAN)
    store = cache.view(0).store_path("fake")
    assert Store.open(store).read_commits()[1].tolist() == [True, True, False]
    sound = Bf16Teacher()
    sound.precision = precision
    assert extract_view(cache.view(0), "fake", sound, PLAN)


def test_without_the_image_it_works(cache, tmp_path):
    """What the error advises helps: with the image out of the folder, a new cache is made in another one."""
    folder = write_images(tmp_path / "images")
    bad = cache.images().names[1]
    with pytest.raises(BadInputError, match=f"row 1, {bad} "):  # here the quantiser's fit meets it
        extract_view(cache.view(0), "fake", Bf16Teacher(pixels(cache, 1), pixels(cache, 1)), PLAN)
    assert not cache.view(0).store_path("fake").exists()
    (folder / bad).unlink()
    again = crop_folder(tmp_path / "again", folder)
    assert again.n_images == 23
    assert extract_view(again.view(0), "fake", Bf16Teacher(pixels(cache, 1), pixels(cache, 1)), PLAN)


def test_too_many(cache, monkeypatch):
    """More such rows than a shard may have stop the extraction, which then says that bf16 is wrong; a fit stops likewise."""
    monkeypatch.setattr("teacher_cache.store.nonfinite.most_fp32_rows", lambda n_rows: 2)
    with pytest.raises(BadInputError, match="for 3 of the 8 rows of shard 2 of .*bf16 is wrong .*--precision fp32 and another"):
        extract_view(cache.view(0), "fake", Bf16Teacher(pixels(cache, 4, 16, 17, 18)), PLAN)
    fp32 = FakeTeacher()
    assert extract_view(cache.view(0), "other", fp32, PLAN)
    with pytest.raises(BadInputError, match="for 3 of the 16 rows of the quantiser's sample.*bf16 is wrong .*--precision fp32"):
        extract_view(cache.view(0), "third", Bf16Teacher(pixels(cache, 1, 2, 3)), PLAN)


def test_more_than_the_record_holds(cache, monkeypatch):
    """A store with more such rows than complete.json may name is not declared complete, and the way out is said."""
    extract_view(cache.view(0), "fake", Bf16Teacher(pixels(cache, 4, 17)), PLAN)
    store = cache.view(0).store_path("fake")
    unfold(Store.open(store), np.array([True, True, False]))
    extract_view(cache.view(0), "fake", Bf16Teacher(pixels(cache, 4, 17)), PLAN, range(0, 2))
    monkeypatch.setattr("teacher_cache.store.folding.MAX_FP32_ROWS", 1)
    with pytest.raises(BadInputError, match="2 rows were made in fp32, more than 1: bf16 is wrong"):
        extract_view(cache.view(0), "fake", Bf16Teacher(pixels(cache, 4, 17)), PLAN)


def test_damaged_weights_are_told_before_anything_is_made(cache):
    """A final norm that is not finite would make a store that nobody can open: it is refused, and nothing is begun."""
    teacher = FakeTeacher()
    teacher.head["gamma"] = np.full(24, np.nan, "float32")
    with pytest.raises(BadInputError, match="gamma of its final norm holds non-finite values"):
        extract_view(cache.view(0), "fake", teacher, PLAN)
    assert not cache.view(0).store_path("fake").exists()


BAD_ROWS = {"missing": None, "text": "4", "foreign": [24], "twice": [4, 4], "descending": [5, 4], "true": [True], "float": [4.0]}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_records_that_lie(cache, case):
    """Rows that a record cannot have are corruption, in complete.json and in the record of a shard."""
    extract_view(cache.view(0), "fake", Bf16Teacher(pixels(cache, 4)), PLAN)
    store = cache.view(0).store_path("fake")
    _lie(store / "complete.json", BAD_ROWS[case])
    with pytest.raises(CacheCorruptError, match="complete.json: fp32_rows must be"):
        Store.open(store).read_fp32_rows()
    assert any("fp32_rows" in finding.message for finding in verify(cache)[0])
    _lie(store / "complete.json", [4])
    unfold(Store.open(store), np.array([True, True, False]))
    _lie(store / "commits/000000.json", BAD_ROWS[case])
    with pytest.raises(CacheCorruptError, match="000000.json: fp32_rows must be"):
        Store.open(store).read_fp32_rows()
    _lie(store / "commits/000000.json", [4])
    assert Store.open(store).read_fp32_rows().tolist() == [4]


def _lie(path: Path, rows) -> None:
    value = read_sealed(path)
    value.pop("crc32c", None)
    value["fp32_rows"] = rows
    if rows is None:
        del value["fp32_rows"]
    path.write_bytes(seal(value))


def test_an_unreadable_list_of_rows_to_make(cache):
    """What was kept of an undone record and is damaged stops the extraction, which names the file; without it, it goes on."""
    teacher = Bf16Teacher(pixels(cache, 4))
    extract_view(cache.view(0), "fake", teacher, PLAN)
    store = cache.view(0).store_path("fake")
    unfold(Store.open(store), np.array([False, True, True]))
    kept = store / "commits/000000.fp32"
    kept.write_text(json.dumps({"shard": 0}))
    with pytest.raises(CacheCorruptError, match="000000.fp32.*Delete that file"):
        extract_view(cache.view(0), "fake", teacher, PLAN)
    kept.unlink()
    assert extract_view(cache.view(0), "fake", teacher, PLAN) and not (store / "commits").exists()


def test_fold_keeps_them(cache):
    """A fold that was killed half-way and is done again has the same rows on record."""
    extract_view(cache.view(0), "fake", Bf16Teacher(pixels(cache, 4, 17)), PLAN)
    store = cache.view(0).store_path("fake")
    before = contents(store)
    unfold(Store.open(store), np.array([True, True, False]))
    (store / "shards.npy").write_bytes(b"half")
    extract_view(cache.view(0), "fake", Bf16Teacher(pixels(cache, 4, 17)), PLAN, range(2, 3))
    fold(Store.open(store))
    assert contents(store) == before
