"""teacher-cache inspect A B: what is equal, what differs, a line each; and the bar of shards that inspect shows of one cache."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from cache_fakes import PLAN, crop_folder
from click.testing import CliRunner
from fakes import FakeTeacher
from store_fakes import compress

from teacher_cache.cache import Cache
from teacher_cache.cli.main import main
from teacher_cache.extraction.extract import extract_view
from teacher_cache.extraction.planning import ExtractPlan
from teacher_cache.files.durable import seal, write_whole
from teacher_cache.inspecting.compare import compare
from teacher_cache.inspecting.inspect import describe, ranges
from teacher_cache.inspecting.table import Bar
from teacher_cache.store.folding import unfold
from teacher_cache.store.store import Store


def differing(first: Cache, second: Cache) -> list[str]:
    """`what: text` of all that differs, the same from both sides."""
    there, back = ([f"{line.what}: {line.text}" for line in compare(*pair) if line.kind == "differs"]
                   for pair in ((first, second), (second, first)))  # fmt: skip
    assert len(there) == len(back)
    return there


def cache_with(path, images, teacher, plan=PLAN, n_views=1, **options) -> Cache:
    made = crop_folder(path, images, n_views, plan)
    extract_view(made.view(0), "fake", teacher, ExtractPlan(**{"shard_rows": 8, "batch_size": 5} | options))
    return made


def test_a_copy_is_equal(shared_cache, cache):
    """A copy differs in nothing, and every view, store and shard is said to be compared."""
    lines = compare(shared_cache, cache)
    assert {line.kind for line in lines} == {"equal"}
    assert {"crops", "view 0", "view 1", "fake", "fake16, view 1"} <= {line.what for line in lines}


def test_other_shards(shared_cache, cache):
    """Shards that are missing, stores that are missing and shards with other bytes are named."""
    store = cache.view(1).store_path("fake")
    unfold(Store.open(store), np.array([True, False, True]))
    shutil.rmtree(cache.view(0).store_path("fake16"))
    assert differing(shared_cache, cache) == [
        "fake, view 1: 3 and 2 of 3 shards are there; only in one: 1:2",
        f"fake16, view 0: is only in {shared_cache.path}",
    ]


def test_other_bytes(tmp_path, image_folder, teacher):
    """Stores that were begun alike and filled otherwise differ in their shards."""
    first = cache_with(tmp_path / "a", image_folder, teacher)
    second = cache_with(tmp_path / "b", image_folder, teacher)
    assert differing(first, second) == []
    store = second.view(0).store_path("fake")
    files = np.load(store / "shards.npy")
    unfold(Store.open(store), np.array([True, True, False]))
    record = store / "commits" / "000001.json"
    changed = [[int(file["bytes"]), int(file["crc32"]) ^ 1] for file in files[1]]
    write_whole(record, seal({"shard": 1, "files": changed, "fp32_rows": []}))
    assert "fake, view 0: 1 shards have other bytes: 1:2" in differing(first, second)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"dtype": "float16"}, "fake: dtype: int8 | float16"),
        ({"layers": "last"}, "fake: layers: 2, 3, 4, 5, 6 | 6"),
        ({"shard_rows": 12}, "fake: shard_rows: 8 | 12"),
    ],
)
def test_other_settings(tmp_path, image_folder, teacher, options, said):
    """A setting of a store that differs is named with both values."""
    first = cache_with(tmp_path / "a", image_folder, teacher)
    assert said in differing(first, cache_with(tmp_path / "b", image_folder, teacher, **options))


def test_other_codec(tmp_path, image_folder, teacher):
    """A store that was begun compressed is told from one that was not, array by array."""
    first, second = (cache_with(tmp_path / name, image_folder, teacher) for name in "ab")
    compress(second.view(0).store_path("fake"))
    assert "fake: codec of tokens/06: none | zstd" in differing(first, second)


def test_other_teacher(tmp_path, image_folder, teacher):
    """Other weights are told by their SHA-256."""
    first = cache_with(tmp_path / "a", image_folder, teacher)
    second = cache_with(tmp_path / "b", image_folder, FakeTeacher(seed=1))
    assert any(line.startswith("fake: teacher's weights_sha256: ") for line in differing(first, second))


def test_other_crops(tmp_path, image_folder):
    """Another plan, other images and other views are each said in words; a cache without targets can be compared."""
    first = crop_folder(tmp_path / "a", image_folder)
    changed = crop_folder(tmp_path / "b", image_folder, 2, PLAN.changed(None, None, 7), "jpeg90")
    lines = differing(first, changed)
    assert {"crop plan seed: 0 | 7", "crop format: jpeg95 | jpeg90", "views: 0 | 0, 1"} <= set(lines)
    fewer = shutil.copytree(image_folder, tmp_path / "images")
    next((fewer / "class-0").iterdir()).unlink()
    assert "images: 24 | 23" in differing(first, crop_folder(tmp_path / "c", fewer))


def test_the_command(shared_cache, cache):
    """Exit code 0 where a student would be given the same, else 1; --json has the same lines."""
    run = CliRunner().invoke
    equal = run(main, ["inspect", str(shared_cache.path), str(cache.path)])
    assert equal.exit_code == 0 and equal.stdout.endswith("A student would be given the same.\n")
    shutil.rmtree(cache.view(0).store_path("fake16"))
    other = run(main, ["inspect", str(shared_cache.path), str(cache.path)])
    assert other.exit_code == 1 and f"differs  fake16, view 0: is only in {shared_cache.path}" in other.stdout
    values = json.loads(run(main, ["inspect", "--json", str(shared_cache.path), str(cache.path)]).stdout)
    assert values["equal"] is False
    assert [line["what"] for line in values["lines"] if line["kind"] == "differs"] == ["fake16, view 0"]
    assert run(main, ["inspect", str(cache.path), "nowhere"]).exit_code == 2


# --- the bar ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "missing, n_shards, bar",
    [
        ([], 1, "########"),
        ([[0, 1]], 1, "........"),
        ([[1, 2]], 2, "####...."),
        ([[3, 4]], 8, "###.####"),
        ([[999, 1000]], 1000, "#######."),
        ([[0, 1], [500, 501]], 1000, ".###.###"),
    ],
)
def test_bar(missing, n_shards, bar):
    """One missing shard among a thousand still empties its cell; a full bar means that all are there."""
    assert Bar(8, "#", ".").of(missing, n_shards) == bar


def test_missing_shards_are_ranges(cache):
    """What is missing is told as --shards takes it; a complete store misses nothing."""
    assert ranges(np.array([True, False, True, True])) == [[0, 1], [2, 4]] and ranges(np.zeros(3, bool)) == []
    store = cache.view(1).store_path("fake")
    unfold(Store.open(store), np.array([False, True, False]))
    described = {view["view"]: {s["name"]: s for s in view["stores"]} for view in describe(cache)["views"]}
    assert described[0]["fake"]["missing_shards"] == [] and described[0]["fake"]["finish"] is None
    assert described[1]["fake"]["missing_shards"] == [[0, 1], [2, 3]]
    assert described[1]["fake"]["finish"].startswith("teacher-cache extract --teacher fake")


def test_a_view_without_a_store(cache):
    """A view in which a teacher was not begun is shown as that, and nothing is cut off on a narrow terminal."""
    shutil.rmtree(cache.view(1).store_path("fake16"))
    said = CliRunner().invoke(main, ["inspect", str(cache.path)], env={"COLUMNS": "80"}).stdout
    assert "not begun" in said and "…" not in said
