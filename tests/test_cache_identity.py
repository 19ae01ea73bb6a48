"""What names a cache: identities of old caches never change, and a version is the lowest that has words for a plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cache_fakes import PLAN, contents, crop_folder, failing_at

from teacher_cache.cache import Cache, CropsIdentity
from teacher_cache.crops.images import ImageList
from teacher_cache.errors import BadInputError, CacheCorruptError
from teacher_cache.extraction import parts
from teacher_cache.files.durable import read_sealed, seal, write_whole
from teacher_cache.format.crop_plan import CropPlan

GOLDEN = Path(__file__).parent / "golden"
IMAGES = ImageList(("a/1.png", "b/2.png"), np.array([0, 1]), ("a", "b"))


@pytest.mark.parametrize("folder", [path for path in sorted(GOLDEN.glob("cache_v*")) if (path / "cache.json").exists()])
def test_identities_of_golden_caches(folder):
    """The identity of a cache that is long there is worked out as it was: from its lists and a plan that is built anew."""
    cache = Cache(folder)
    plan = CropPlan(**{key: value for key, value in read_sealed(folder / "cache.json")["plan"].items()})
    assert CropsIdentity.of(cache.images(), plan, cache.identity.crop_format).crops_id == cache.crops_id


@pytest.mark.parametrize(
    ("plan", "digits"),
    [
        (CropPlan(), "53507b9ad79db7bb"),
        (CropPlan(size=256, seed=3), "5e46b39fb61b3fbc"),
        (CropPlan.center(384), "ca5415528b718dfe"),
    ],
)
def test_identities_of_plans_never_change(plan, digits):
    """Plans that version 1 has words for have the identities that they had when it was the only one."""
    assert CropsIdentity.of(IMAGES, plan, "jpeg95").crops_id[:16] == digits
    assert CropsIdentity.of(IMAGES, plan, "jpeg95").to_json()["format_version"] == 1


def rewritten(cache: Cache, **changes) -> Path:
    """cache.json with other members, sealed again."""
    value = read_sealed(cache.path / "cache.json")
    write_whole(cache.path / "cache.json", seal({**value, **changes}))
    return cache.path


def test_large_random_crops_are_version_2(tmp_path, image_folder):
    """Random crops above 256 px make a cache of version 2, which older programs refuse by its number; others stay version 1."""
    for size, version in ((256, 1), (257, 2)):
        cache = crop_folder(tmp_path / str(size), image_folder, plan=replace(PLAN, size=size))
        assert json.loads((cache.path / "cache.json").read_text())["format_version"] == version
        assert Cache(cache.path).plan.size == size
        with pytest.raises(CacheCorruptError, match=f"format_version is {3 - version}, and its plan is one of version {version}"):
            Cache(rewritten(cache, format_version=3 - version))


@pytest.mark.parametrize("version", [0, 3, True, 1.0, "1", None])
def test_unknown_versions(cache, version):
    """A version that is not known is refused before anything else is looked at, with those that are."""
    with pytest.raises(BadInputError, match=f"format version {version}; this program reads versions 1 and 2. Use the version"):
        Cache(rewritten(cache, format_version=version, plan={}))


def test_parts_of_large_crops_are_smaller(tmp_path, image_folder, monkeypatch):
    """So many crops are in memory together as fit, and a stage that was begun with other parts is gone on with as it was."""
    assert parts.WorkFolder(tmp_path, IMAGES.names, (0, 1), 224).part_rows == parts.PART_ROWS == 512
    assert parts.WorkFolder(tmp_path, IMAGES.names, (0,), 4096).part_rows == 10
    whole = contents(crop_folder(tmp_path / "whole", image_folder).path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART_ROWS", 7)
        patch.setattr(parts.WorkFolder, "commit", failing_at(parts.WorkFolder.commit, 3, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            crop_folder(tmp_path / "c", image_folder)
    committed = sorted(path.name for path in tmp_path.glob("c/crops.partial/view-000/*.json"))
    assert committed == ["000000.json", "000001.json"]
    monkeypatch.setattr(parts, "PART_BYTES", 3 * 32**2)  # one image a part, were it begun now
    made = []
    monkeypatch.setattr(parts.WorkFolder, "commit", lambda *given, commit=parts.WorkFolder.commit: made.append(commit(*given)))
    assert contents(crop_folder(tmp_path / "c", image_folder).path) == whole and len(made) == 2


@pytest.mark.parametrize("part_rows", [0, -1, "7", None, True])
def test_a_work_folder_that_cannot_be(tmp_path, part_rows):
    """A work folder that does not say how large its parts are is damaged, and the message has what to delete."""
    work = parts.WorkFolder(tmp_path / "new", IMAGES.names, (0,), 32)
    work.begin(CropsIdentity.of(IMAGES, PLAN, "jpeg95"))
    value = read_sealed(work.path / "job.json")
    write_whole(work.path / "job.json", seal({**value, "part_rows": part_rows}))
    with pytest.raises(CacheCorruptError, match="part_rows is .*. Delete .*crops.partial to start over"):
        parts.WorkFolder(tmp_path / "new", IMAGES.names, (0,), 32).n_parts  # noqa: B018
