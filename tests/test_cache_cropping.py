"""The crop stage: the same bytes whatever happens on the way, and bad images reported, never lost."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from cache_fakes import PLAN, contents, crop_folder, failing_at, flip_bit
from fakes import image_of

from teacher_cache.cache import Cache
from teacher_cache.checking.verify import verify
from teacher_cache.crops.beton import CropReader
from teacher_cache.crops.cutting import cut, draw, load_image
from teacher_cache.errors import BadInputError, CacheCorruptError, MismatchError, NoSpaceError, UsageError
from teacher_cache.extraction import cropping, parts
from teacher_cache.files.claims import claimed
from teacher_cache.format import layout
from teacher_cache.format.crop_plan import CropPlan


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """24 images are 5 parts."""
    monkeypatch.setattr(parts, "PART_ROWS", 5)


@pytest.fixture
def folder(image_folder, tmp_path):
    """A copy of the images that a test may damage."""
    return shutil.copytree(image_folder, tmp_path / "images")


@pytest.fixture(scope="module")
def undisturbed(image_folder, tmp_path_factory):
    """The files of a cache of two views that was made in one go by one worker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART_ROWS", 5)
        return contents(crop_folder(tmp_path_factory.mktemp("undisturbed") / "c", image_folder, 2, workers=1).path)


def damage(folder, *numbers):
    for number in numbers:
        (path,) = folder.glob(f"*/image-{number:03d}.png")
        path.write_bytes(path.read_bytes()[:-99])


def mend(folder, *numbers):
    for number in numbers:
        (path,) = folder.glob(f"*/image-{number:03d}.png")
        image_of(number).save(path)


def part_times(cache_dir):
    """When each committed part was written."""
    return {path: path.stat().st_mtime_ns for path in (cache_dir / "crops.partial").glob("view-*/*.json")}


# --- the crops -------------------------------------------------------------------------------------------------------


def test_a_row_is_the_crop_of_its_image(tmp_path, image_folder):
    """Row i of every view is image i of images.txt, cut as drawn, with its label and its record."""
    cache = crop_folder(tmp_path / "c", image_folder, 2, crop_format="raw")
    images = cache.images()
    assert len(images.names) == 24 and list(images.names) != sorted(images.names)
    for view in cache.views():
        reader, crops = CropReader(view.path), view.crops()
        pixels = reader.read(range(24))
        for row, name in enumerate(images.names):
            image = load_image((image_folder / name).read_bytes(), name)
            crop = draw(PLAN, name, view.number, image.height, image.width)
            assert np.array_equal(pixels[row], np.asarray(cut(PLAN, image, crop)))
            record = crops[row]
            for field in ("top", "left", "height", "width", "flip"):
                assert record[field] == getattr(crop, field)
            assert (record["image_height"], record["image_width"]) == (image.height, image.width)
            assert record["source_bytes"] == (image_folder / name).stat().st_size
        assert np.array_equal(reader.labels, images.labels)
        assert [images.classes[label] for label in images.labels] == [name.split("/")[0] for name in images.names]


def test_flat_folder(tmp_path, image_folder):
    """Images without classes make a cache whose labels are -1."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in image_folder.glob("*/*.png"):
        shutil.copy(path, flat)
    cache = crop_folder(tmp_path / "c", flat)
    assert cache.identity.classes == () and set(CropReader(cache.view(0).path).labels) == {-1}
    assert verify(cache)[0] == []


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_do_not_matter(tmp_path, image_folder, undisturbed, workers):
    """One worker and four give the same bytes in every file."""
    assert contents(crop_folder(tmp_path / "c", image_folder, 2, workers=workers).path) == undisturbed


@pytest.mark.parametrize("part_rows", [1, 7, 512])
def test_parts_do_not_matter(tmp_path, image_folder, undisturbed, part_rows, monkeypatch):
    """How the work is cut into parts does not show in the cache."""
    monkeypatch.setattr(parts, "PART_ROWS", part_rows)
    assert contents(crop_folder(tmp_path / "c", image_folder, 2).path) == undisturbed


def test_one_decode_serves_all_missing_views(tmp_path, image_folder, monkeypatch):
    """An original is decoded once, however many views are missing."""
    decoded = []
    monkeypatch.setattr(cropping, "load_image", lambda data, name: decoded.append(name) or load_image(data, name))
    crop_folder(tmp_path / "c", image_folder, 3)
    assert len(decoded) == 24 == len(set(decoded))


HIDDEN = "class-0/.ipynb_checkpoints/image-checkpoint.png"


def made_before(patch):
    """Nothing is left out, as it was before."""
    patch.setattr(cropping, "scan", lambda folder, everything=True, scan=cropping.scan: scan(folder, everything=True))


def test_images_that_an_older_cache_took_from_hidden_folders(tmp_path, folder):
    """A cache made when nothing was left out finds its images for another view; a new cache is made without them."""
    (folder / HIDDEN).parent.mkdir()
    image_of(3).save(folder / HIDDEN)
    with pytest.MonkeyPatch.context() as patch:
        made_before(patch)
        assert HIDDEN in crop_folder(tmp_path / "old", folder).images().names
    assert len(crop_folder(tmp_path / "old", folder, 2).views()) == 2
    assert not list(verify(Cache(tmp_path / "old"))[0])
    assert len(crop_folder(tmp_path / "new", folder).images().names) == 24
    (folder / HIDDEN).unlink()
    with pytest.raises(MismatchError, match="lacks 1 of the 25 images"):
        crop_folder(tmp_path / "old", folder, 3)


def test_a_stage_begun_when_nothing_was_left_out(tmp_path, folder):
    """An unfinished crop stage that was begun with images of hidden folders is gone on with as it is."""
    (folder / HIDDEN).parent.mkdir()
    image_of(3).save(folder / HIDDEN)
    with pytest.MonkeyPatch.context() as patch:
        made_before(patch)
        patch.setattr(parts.WorkFolder, "commit", failing_at(parts.WorkFolder.commit, 3, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            crop_folder(tmp_path / "c", folder)
    with pytest.raises(MismatchError, match="crop plan seed: 0 begun, 1 given"):
        crop_folder(tmp_path / "c", folder, plan=replace(PLAN, seed=1))
    assert HIDDEN in crop_folder(tmp_path / "c", folder).images().names


# --- interruptions ---------------------------------------------------------------------------------------------------

CRASHES = {  # a part of two views is six files; job.json comes before the first
    "before the first part": (parts.WorkFolder, "commit", 1),
    "before the third part": (parts.WorkFolder, "commit", 3),
    "inside a part, after its first view": (parts, "write_whole", 1 + 2 * 6 + 4),
    "between records and commit": (parts, "write_whole", 1 + 6 + 3),
    "before publishing": (cropping, "_publish", 1),
    "between two views": (cropping, "_publish_view", 2),
    "while a view is written": (cropping, "write_beton", 2),
    "before the spare of a view": (cropping, "write_spare", 1),
    "before the identity": (cropping, "write_cache", 1),
    "before the work is removed": (parts.WorkFolder, "remove", 1),
}


@pytest.mark.parametrize("case", CRASHES)
def test_interrupted_anywhere(tmp_path, image_folder, undisturbed, monkeypatch, case):
    """Stopped at any point, the same command goes on, leaves finished parts alone, and ends with the same bytes."""
    owner, name, call = CRASHES[case]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing_at(getattr(owner, name), call, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            crop_folder(tmp_path / "c", image_folder, 2)
    before = part_times(tmp_path / "c")
    again, times, commit, publish = [], [], parts.WorkFolder.commit, cropping._publish
    monkeypatch.setattr(parts.WorkFolder, "commit", lambda work, part, *r: again.append(part) or commit(work, part, *r))
    monkeypatch.setattr(cropping, "_publish", lambda job, bad: times.append(part_times(job.cache_dir)) or publish(job, bad))
    assert contents(crop_folder(tmp_path / "c", image_folder, 2).path) == undisturbed
    n_whole = sum(1 for path in before if "view-001" in str(path))  # view 1 is the last of a part
    assert sorted(again) == list(range(n_whole, 5)) * (len(times) > 0)
    assert all(before.items() <= after.items() for after in times)


@pytest.mark.parametrize("call", range(1, 5))
def test_killed_while_the_lists_are_written(tmp_path, image_folder, undisturbed, monkeypatch, call):
    """A process that dies between images.txt, labels.npy, skipped.txt, spare.tar and cache.json can be run again."""
    from teacher_cache import cache

    with monkeypatch.context() as patch:
        patch.setattr(cache, "write_whole", failing_at(cache.write_whole, call + 1, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            crop_folder(tmp_path / "c", image_folder, 2)
    with pytest.raises(UsageError, match="its crop stage was not finished; run the same teacher-cache command again"):
        Cache(tmp_path / "c")
    assert contents(crop_folder(tmp_path / "c", image_folder, 2).path) == undisturbed


def test_killed_before_the_work_folder_is_removed(tmp_path, image_folder, undisturbed, monkeypatch):
    """Work left behind by a process killed at the very end is removed, and does not stand in the way of another view."""
    with monkeypatch.context() as patch:
        patch.setattr(parts.WorkFolder, "remove", failing_at(parts.WorkFolder.remove, 1, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            crop_folder(tmp_path / "c", image_folder, 2)
    assert [f.kind for f in verify(Cache(tmp_path / "c"))[0]] == ["unfinished"]
    left = shutil.copytree(tmp_path / "c", tmp_path / "d")
    cropping.remove_left_over(tmp_path / "c")
    assert contents(tmp_path / "c") == undisturbed
    assert crop_folder(left, image_folder, 3).view(2).is_cropped and verify(Cache(left))[0] == []


def test_a_claim_left_at_the_end(tmp_path, image_folder, undisturbed):
    """The claim of a process that was killed at the very end goes away; that of a living one stays and is no obstacle."""
    crop_folder(tmp_path / "c", image_folder, 2)
    with claimed(tmp_path / "c" / layout.CROPS_CLAIM, "x"):
        crop_folder(tmp_path / "c", image_folder, 2)
        assert (tmp_path / "c" / layout.CROPS_CLAIM).exists()
    (tmp_path / "c" / layout.CROPS_CLAIM).touch()
    assert contents(crop_folder(tmp_path / "c", image_folder, 2).path) == undisturbed


def test_unfinished_work_is_not_removed(tmp_path, image_folder, monkeypatch):
    """Half of an added view is kept when the cache is used meanwhile."""
    crop_folder(tmp_path / "c", image_folder, 1)
    with monkeypatch.context() as patch:
        patch.setattr(parts.WorkFolder, "commit", failing_at(parts.WorkFolder.commit, 3, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            crop_folder(tmp_path / "c", image_folder, 2)
    cropping.remove_left_over(tmp_path / "c")
    assert len(part_times(tmp_path / "c")) == 2


def test_full_disk(tmp_path, image_folder, undisturbed, monkeypatch):
    """A disk that fills up is a NoSpaceError with the bytes that are left to write; afterwards the work goes on as if nothing
    had been."""
    whole = cropping.bytes_to_write(cropping.plan_job(tmp_path / "c", image_folder, PLAN, "jpeg95", 2), 1000)
    assert whole == 1000 * 24 * 2 * 2  # parts, and the files they are joined into
    monkeypatch.setattr(cropping, "estimate_crop_bytes", lambda job: 1000)
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(parts, "write_whole", failing_at(parts.write_whole, 1 + 6 + 5, full))
        words = "is full. Finished crops are kept; about 81 kB are still to be written. Make room and run"
        with pytest.raises(NoSpaceError, match=words):
            crop_folder(tmp_path / "c", image_folder, 2)
    assert len(part_times(tmp_path / "c")) == 3
    with monkeypatch.context() as patch:
        patch.setattr(cropping, "write_beton", failing_at(cropping.write_beton, 2, full))
        with pytest.raises(NoSpaceError, match="about 24 kB are still to be written"):
            crop_folder(tmp_path / "c", image_folder, 2)
    assert contents(crop_folder(tmp_path / "c", image_folder, 2).path) == undisturbed


@pytest.mark.parametrize("suffix", [".bin", ".npy", ".json"])
@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_damaged_part(tmp_path, image_folder, undisturbed, monkeypatch, suffix, damage):
    """A part that was damaged between two runs is named with the file to delete, not published; then it is made again."""
    with monkeypatch.context() as patch:
        patch.setattr(cropping, "_publish", failing_at(cropping._publish, 1, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            crop_folder(tmp_path / "c", image_folder, 2)
    commit = tmp_path / "c/crops.partial/view-001/000002.json"
    file = commit.with_suffix(suffix)
    if damage == "flipped":
        flip_bit(file, file.stat().st_size * 4)
    else:
        file.unlink()
    if file != commit or damage == "flipped":
        words = f"000002{suffix} was damaged. Delete .*view-001/000002.json and run the same command again: this part alone"
        with pytest.raises(CacheCorruptError, match=words):
            crop_folder(tmp_path / "c", image_folder, 2)
        commit.unlink()
    assert contents(crop_folder(tmp_path / "c", image_folder, 2).path) == undisturbed


# --- bad images ------------------------------------------------------------------------------------------------------


def test_all_bad_images_are_named_together(tmp_path, folder):
    """Every image that cannot be decoded stands in one error with its reason; finished crops are kept."""
    damage(folder, 3, 11, 20)
    with pytest.raises(BadInputError) as caught:
        crop_folder(tmp_path / "c", folder)
    message = str(caught.value)
    assert message.startswith("Of 24 images 3 cannot be decoded:\n  class-") and "--skip-bad. Finished crops are kept." in message
    for name in ("class-0/image-003.png: ", "class-1/image-011.png: ", "class-2/image-020.png: "):
        assert name in message
    assert len(part_times(tmp_path / "c")) == 5


def test_mended_images_are_made_good(tmp_path, folder, undisturbed):
    """Once the bad images are mended, the same command makes their parts again, no others, and ends with the same bytes."""
    damage(folder, 3, 11)
    with pytest.raises(BadInputError):
        crop_folder(tmp_path / "c", folder, 2)
    before = part_times(tmp_path / "c")
    mend(folder, 3)
    with pytest.raises(BadInputError, match="Of 24 images 1 cannot be decoded:\n  class-1/image-011.png"):
        crop_folder(tmp_path / "c", folder, 2)
    assert len(before.items() & part_times(tmp_path / "c").items()) == 2 * 4
    mend(folder, 11)
    assert contents(crop_folder(tmp_path / "c", folder, 2).path) == undisturbed


def test_skip_bad(tmp_path, folder, image_folder):
    """--skip-bad leaves bad images out, lists and counts them; the other rows keep their order and their crops."""
    damage(folder, 3, 11)
    with pytest.raises(BadInputError):
        crop_folder(tmp_path / "c", folder)
    cache, whole = crop_folder(tmp_path / "c", folder, skip_bad=True), crop_folder(tmp_path / "whole", image_folder)
    skipped = [line.split(": ")[0][-7:] for line in (cache.path / "skipped.txt").read_text().splitlines()]
    assert cache.n_images == 22 and cache.n_skipped == 2 and set(skipped) == {"003.png", "011.png"}
    kept = [row for row, name in enumerate(whole.images().names) if name[-7:] not in ("003.png", "011.png")]
    assert list(cache.images().names) == [whole.images().names[row] for row in kept]
    assert np.array_equal(cache.images().labels, whole.images().labels[kept])
    assert np.array_equal(cache.view(0).crops(), whole.view(0).crops()[kept])
    assert np.array_equal(CropReader(cache.view(0).path).read(range(22)), CropReader(whole.view(0).path).read(kept))
    assert verify(cache)[0] == []


def test_skip_bad_then_another_view(tmp_path, folder):
    """A view added to a cache with skipped images has the same rows, mended or not."""
    damage(folder, 3)
    crop_folder(tmp_path / "c", folder, skip_bad=True)
    mend(folder, 3)
    cache = crop_folder(tmp_path / "c", folder, 2)
    assert len(CropReader(cache.view(1).path)) == 23 and verify(cache)[0] == []


@pytest.mark.parametrize("mended", [False, True])
def test_skip_bad_interrupted_between_views(tmp_path, folder, undisturbed, monkeypatch, mended):
    """Interrupted while views are published, --skip-bad goes on; with an image mended meanwhile, all views have it."""
    damage(folder, 3)
    with monkeypatch.context() as patch:
        patch.setattr(cropping, "_publish_view", failing_at(cropping._publish_view, 2, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            crop_folder(tmp_path / "c", folder, 2, skip_bad=True)
    if mended:
        mend(folder, 3)
    cache = crop_folder(tmp_path / "c", folder, 2, skip_bad=True)
    assert verify(cache)[0] == [] and [len(CropReader(view.path)) for view in cache.views()] == [24 if mended else 23] * 2
    assert not mended or contents(cache.path) == undisturbed


def test_nothing_but_bad_images(tmp_path, folder):
    """A folder without one good image makes no cache, --skip-bad or not."""
    damage(folder, *range(24))
    with pytest.raises(BadInputError, match="None of the 24 images of .* can be decoded, e.g. class-"):
        crop_folder(tmp_path / "c", folder, skip_bad=True)
    assert not (tmp_path / "c" / "cache.json").exists()


def test_vanished_image(tmp_path, folder, monkeypatch):
    """An image that goes away while the stage runs is reported like any other bad one."""
    listed = cropping.scan(folder)
    (folder / "class-0/image-000.png").unlink()
    monkeypatch.setattr(cropping, "scan", lambda _: listed)
    with pytest.raises(BadInputError, match="class-0/image-000.png: No such file or directory"):
        crop_folder(tmp_path / "c", folder)


def test_very_many_bad_images(tmp_path, folder, monkeypatch):
    """The error names the first of very many bad images and the file that lists them all."""
    monkeypatch.setattr(cropping, "SHOWN", 5)
    damage(folder, *range(9))
    with pytest.raises(
        BadInputError, match="24 images 9 cannot(.|\n)*4 more, all of them in .*crops.partial/bad.txt\nMend"
    ) as caught:
        crop_folder(tmp_path / "c", folder)
    listed = (tmp_path / "c" / "crops.partial" / "bad.txt").read_text().splitlines()
    assert len(listed) == 9 and str(caught.value).count(".png: ") == 5
    assert sorted(line.split(": ")[0][-7:] for line in listed) == [f"00{i}.png" for i in range(9)]


def test_what_poses_as_an_image_is_named(tmp_path, folder):
    """A pipe, a broken link and a folder called like images stand among the bad images, and none of them is waited for."""
    os.mkfifo(folder / "class-0" / "pipe.png")
    (folder / "class-1" / "gone.png").symlink_to("nowhere.png")
    (folder / "class-2" / "x.jpg").mkdir()
    with pytest.raises(BadInputError) as caught:
        crop_folder(tmp_path / "c", folder)
    for line in ("class-0/pipe.png: is a pipe", "class-1/gone.png: is a link to nowhere", "class-2/x.jpg: Is a directory"):
        assert f"\n  {line}" in str(caught.value)
    assert crop_folder(tmp_path / "c", folder, skip_bad=True).n_skipped == 3


def test_hairs_are_named(tmp_path, folder):
    """An image too narrow for a centre crop is one of the bad ones."""
    image_of(0).resize((40000, 1)).save(folder / "class-0/hair.png")
    with pytest.raises(BadInputError, match="Of 25 images 1 cannot(.|\n)* class-0/hair.png: 40000 x 1 pixels are too narrow"):
        crop_folder(tmp_path / "c", folder, plan=CropPlan.center(224))


# --- other requests --------------------------------------------------------------------------------------------------

OTHER = {
    "seed": ({"plan": replace(PLAN, seed=1)}, "crop plan seed: 0 in the cache, 1 given"),
    "scale": ({"plan": replace(PLAN, scale=(0.2, 1.0))}, "crop plan scale: .0.3, 1.0. in the cache, .0.2, 1.0. given"),
    "kind": ({"plan": CropPlan.center(32)}, "crop plan kind: random in the cache, center given"),
    "format": ({"crop_format": "raw"}, "crop_format: jpeg95 in the cache, raw given"),
}


@pytest.mark.parametrize("case", OTHER)
def test_another_plan_is_refused(tmp_path, image_folder, case):
    """A cache refuses other crops than its own, names each difference and the way out, and stays as it is."""
    options, words = OTHER[case]
    before = contents(crop_folder(tmp_path / "c", image_folder).path)
    with pytest.raises(MismatchError, match=f"holds other crops(.|\n)*{words}(.|\n)*or another folder"):
        crop_folder(tmp_path / "c", image_folder, 2, **options)
    assert contents(tmp_path / "c") == before


@pytest.mark.parametrize("case", OTHER)
def test_another_plan_is_refused_half_way(tmp_path, image_folder, monkeypatch, case):
    """An unfinished crop stage refuses other parameters too, and says what was begun and how to start over."""
    options, words = OTHER[case]
    with monkeypatch.context() as patch:
        patch.setattr(parts.WorkFolder, "commit", failing_at(parts.WorkFolder.commit, 3, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            crop_folder(tmp_path / "c", image_folder)
    before = contents(tmp_path / "c")
    words = words.replace("in the cache", "begun")
    with pytest.raises(MismatchError, match=f"begun with other(.|\n)*{words}(.|\n)*delete that folder to start"):
        crop_folder(tmp_path / "c", image_folder, **options)
    assert contents(tmp_path / "c") == before


def test_other_images_half_way(tmp_path, folder, monkeypatch):
    """An unfinished crop stage refuses a folder with other images."""
    with monkeypatch.context() as patch:
        patch.setattr(parts.WorkFolder, "commit", failing_at(parts.WorkFolder.commit, 3, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            crop_folder(tmp_path / "c", folder)
    (folder / "class-0/image-000.png").unlink()
    with pytest.raises(MismatchError, match="n_images: 24 begun, 23 given"):
        crop_folder(tmp_path / "c", folder)


def test_a_foreign_folder_is_left_alone(tmp_path, image_folder):
    """A folder that holds something else, or a file, is never written to."""
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").touch()
    with pytest.raises(UsageError, match="neither empty nor a cache. Give another folder"):
        crop_folder(tmp_path / "c", image_folder)
    with pytest.raises(UsageError, match="thesis.tex is a file. Give a folder"):
        crop_folder(tmp_path / "c" / "thesis.tex", image_folder)
    assert set(contents(tmp_path / "c")) == {"thesis.tex"}


def test_a_cache_without_its_identity_is_no_new_one(tmp_path, image_folder):
    """A cache that has lost cache.json is to be repaired, and is not taken for an empty folder or a stranger's."""
    crop_folder(tmp_path / "c", image_folder)
    (tmp_path / "c" / "cache.json").unlink()
    with pytest.raises(CacheCorruptError, match="has lost its cache.json. Restore it with: teacher-cache crop --repair"):
        crop_folder(tmp_path / "c", image_folder)


@pytest.mark.parametrize("name", ["crops.partial", "crops.partial/view-000"])
def test_a_file_where_a_folder_should_be(tmp_path, image_folder, name):
    """Something that stands in the way of the work folder is named."""
    file = tmp_path / "c" / name
    file.parent.mkdir(parents=True)
    file.touch()
    with pytest.raises(NotADirectoryError, match=f"a file stands where a folder is needed: '.*{name}'"):
        crop_folder(tmp_path / "c", image_folder)


@pytest.mark.parametrize("name", ["crops.partial", "crops.partial/view-000"])
def test_a_work_folder_that_lies_elsewhere(tmp_path, image_folder, name):
    """A symlink that leads out of the cache is refused, and nothing is written behind it."""
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "c" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheCorruptError, match="a symlink that leads out of"):
        crop_folder(tmp_path / "c", image_folder)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_adding_a_view(tmp_path, image_folder, undisturbed):
    """A view can be added later: view 0 keeps its bytes, and the result is what both at once would have been."""
    before = contents(crop_folder(tmp_path / "c", image_folder, 1).path)
    with pytest.raises(UsageError, match="lacks view 1, and making it needs the originals: give --images DIR"):
        crop_folder(tmp_path / "c", None, 2)
    cache = crop_folder(tmp_path / "c", image_folder, 2)
    assert before.items() <= contents(cache.path).items() and contents(cache.path) == undisturbed


def test_a_deleted_view_comes_back(tmp_path, image_folder, undisturbed):
    """A deleted view is made again to the same bytes; one that lost its checksums is not overwritten."""
    cache = crop_folder(tmp_path / "c", image_folder, 2)
    (cache.view(0).path / "checksums.json").unlink()
    with pytest.raises(CacheCorruptError, match="view-000 has lost its checksums.json. Run the same command with --repair"):
        crop_folder(cache.path, image_folder, 2)
    shutil.rmtree(cache.view(0).path)
    assert contents(crop_folder(cache.path, image_folder, 2).path) == undisturbed


def test_adding_a_view_needs_every_image(tmp_path, folder):
    """An image that was removed, or broken, since the cache was made is named when a view is added; new ones do not matter."""
    before = contents(crop_folder(tmp_path / "c", folder, 1).path)
    image_of(99).save(folder / "class-0" / "new.png")
    (folder / "class-1/image-009.png").unlink()
    with pytest.raises(MismatchError, match="lacks 1 of the 24 images of .*, e.g. class-1/image-009.png. Give the folder"):
        crop_folder(tmp_path / "c", folder, 2)
    mend_to = folder / "class-1/image-009.png"
    mend_to.write_bytes(b"")
    for skip_bad in (False, True):
        with pytest.raises(BadInputError, match="class-1/image-009.png(.|\n)*must hold every image of its cache"):
            crop_folder(tmp_path / "c", folder, 2, skip_bad=skip_bad)
    assert before.items() <= contents(tmp_path / "c").items()
    image_of(9).save(mend_to)
    assert verify(crop_folder(tmp_path / "c", folder, 2))[0] == []


def test_a_view_is_cut_from_the_same_files(tmp_path, folder, undisturbed):
    """Images that have changed since the cache was made are counted and named when a view is added, even if they show the same
    picture; restored, the stage goes on where it stopped."""
    before = contents(crop_folder(tmp_path / "c", folder, 1).path)
    image_of(99).save(folder / "class-0/image-002.png")
    image_of(12).save(folder / "class-1/image-012.png", compress_level=1)
    damage(folder, 20)
    with pytest.raises(BadInputError) as caught:
        crop_folder(tmp_path / "c", folder, 2, skip_bad=True)
    message = str(caught.value)
    assert message.startswith("Of 24 images 2 have changed since this cache was made and 1 cannot be decoded:\n  class-")
    for name in ("class-0/image-002.png", "class-1/image-012.png"):
        assert f"\n  {name}: is not the file that this cache was cut from\n" in message
    assert "restore them and run the same command again. Finished crops are kept." in message
    assert before.items() <= contents(tmp_path / "c").items() and len(part_times(tmp_path / "c")) == 5
    mend(folder, 2, 12, 20)
    assert contents(crop_folder(tmp_path / "c", folder, 2).path) == undisturbed


def test_views_of_one_stage_are_cut_from_the_same_files(tmp_path, folder, undisturbed, monkeypatch):
    """A view that joins an unfinished stage is held to the files that the first was cut from."""
    with monkeypatch.context() as patch:
        patch.setattr(cropping, "_publish", failing_at(cropping._publish, 1, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            crop_folder(tmp_path / "c", folder, 1)
    image_of(99).save(folder / "class-0/image-002.png")
    with pytest.raises(
        BadInputError, match="1 have changed(.|\n)*image-002.png: is not(.|\n)*as they are now, delete .*partial first"
    ):
        crop_folder(tmp_path / "c", folder, 2)
    mend(folder, 2)
    assert contents(crop_folder(tmp_path / "c", folder, 2).path) == undisturbed


def test_a_damaged_record_is_not_believed(tmp_path, folder):
    """Originals are compared with sound records only."""
    view = crop_folder(tmp_path / "c", folder, 1).view(0)
    flip_bit(view.path / "crops.npy", 9999)
    with pytest.raises(CacheCorruptError, match="crops.npy is damaged. Run the same command with --repair"):
        crop_folder(tmp_path / "c", folder, 2)


def test_nothing_to_do(tmp_path, image_folder):
    """A cache that has its views needs no images and is not touched."""
    before = contents(crop_folder(tmp_path / "c", image_folder, 2).path)
    assert cropping.plan_job(tmp_path / "c", None, PLAN, "jpeg95", 2) is None
    assert contents(tmp_path / "c") == before


def test_estimate_is_near(tmp_path, image_folder):
    """The size that is announced is near the size that is written."""
    job = cropping.plan_job(tmp_path / "c", image_folder, PLAN, "jpeg95", 1)
    estimate = cropping.estimate_crop_bytes(job)
    written = cropping.make_crops(job).view(0).crops()["bytes"].mean()
    assert abs(estimate / written - 1) < 0.15
    assert cropping.estimate_crop_bytes(replace(job, crop_format="raw")) == 32 * 32 * 3
