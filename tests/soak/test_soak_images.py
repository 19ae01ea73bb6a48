"""Image files of all kinds: what cannot be decoded is named and counted, what can is cropped right, and nothing crashes."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import warm
from fakes import image_of
from forks import Ended, fork, run_forked
from odd_images import BAD, VALID, make_bad, saved

from teacher_cache.cache import Cache
from teacher_cache.crops.beton import CropReader

N_GOOD = 3


@pytest.fixture
def folder(tmp_path) -> Path:
    """A class folder with sound images."""
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    for index in range(N_GOOD):
        image_of(index).save(folder / f"good-{index}.png")
    return folder


def crop(folder: Path, cache: Path, *more) -> Ended:
    """Crop the images in the class folder `folder`, and those in its neighbours."""
    return run_forked("teacher-cache", "crop", "--images", folder.parent, "--crop-size", 32, "--crop-format", "raw", *more, cache)


@pytest.mark.soak("malformed image beside sound ones, of a kind each", kinds=BAD, short=8)
def test_bad(kind, folder, tmp_path, fell):
    """An image that cannot be decoded is named and counted; --skip-bad leaves it out, lists it, and crops the others."""
    name = f"class/{make_bad(kind, folder)}"
    ended = crop(folder, tmp_path / "c").says(
        f"Of {N_GOOD + 1} images 1 cannot be decoded", f"\n  {name}: ", "--skip-bad", code=1
    )
    assert not (tmp_path / "c" / "cache.json").exists() and len(re.findall("^Error: ", ended.output, re.MULTILINE)) == 1
    crop(folder, tmp_path / "c", "--skip-bad").says("1 images could not be decoded", "skipped.txt", code=0)
    cache = Cache(tmp_path / "c")
    assert sorted(cache.images().names) == [f"class/good-{index}.png" for index in range(N_GOOD)]
    (line,) = (cache.path / "skipped.txt").read_text().splitlines()
    assert line.startswith(f"{name}: ") and line in ended.output
    assert (CropReader(cache.view(0).path).read(range(N_GOOD)).std((1, 2)) > 5).all()  # pictures, not a colour
    fell("named, counted, left out when asked")


@pytest.mark.soak("all malformed images at once", kinds=["all"], short=1)
def test_all_bad_at_once(kind, folder, tmp_path, fell):
    """However many images cannot be decoded, one run names all of them."""
    for number, kind in enumerate(BAD):
        (folder.parent / f"{number:02d}").mkdir()
        make_bad(kind, folder.parent / f"{number:02d}")
    ended = crop(folder, tmp_path / "c").says(f"Of {len(BAD) + N_GOOD} images {len(BAD)} cannot be decoded", code=1)
    assert all(f"\n  {number:02d}/x." in ended.output for number in range(len(BAD)))
    fell(f"{len(BAD)} named in one message")


@pytest.mark.soak("unusual but valid image, of a kind each", kinds=VALID, short=10)
def test_valid(kind, folder, tmp_path, fell):
    """An image of an unusual kind is cropped to the pixels that it holds, as found by another way than Pillow's decoder."""
    name, make = VALID[kind]
    data, pixels, tolerance = make()
    crops = {}
    for what, content in (("kind", data), ("plain", saved(np.ascontiguousarray(pixels), "PNG"))):
        (folder / name).write_bytes(content)
        crop(folder, tmp_path / what).says("Done.", code=0)
        cache = Cache(tmp_path / what)
        assert len(cache.images().names) == N_GOOD + 1
        order = np.argsort(cache.images().names)
        crops[what] = CropReader(cache.view(0).path).read(order).astype(int)
    row = sorted(cache.images().names).index(f"class/{name}")
    difference = np.abs(crops["kind"] - crops["plain"])
    assert difference[row].max() <= tolerance and not np.delete(difference, row, 0).any()
    fell("pixels equal" if tolerance == 0 else f"pixels within {tolerance} levels")


@pytest.mark.soak("image or class folder without permission", kinds=["file", "folder"], short=1)
def test_no_permission(kind, folder, fell):
    """A file that may not be read is named as one that cannot be decoded; a folder that may not be read is refused by name."""
    with tempfile.TemporaryDirectory() as public:  # pytest's own may be entered by this user only
        images = shutil.copytree(folder, Path(public) / "images" / "class")
        Path(public).chmod(0o777)
        (images / "good-0.png" if kind == "file" else images).chmod(0)
        cache = Path(public) / "c"
        ended = fork(crop_without_privileges, images.parent, cache)
        images.chmod(0o700)
    if kind == "file":
        ended.says(f"Of {N_GOOD} images 1 cannot be decoded", "\n  class/good-0.png: Permission denied", code=1)
    else:
        ended.says("Error: ", "images/class", "Permission denied", code=1)
    fell("named")


def crop_without_privileges(images: Path, cache: Path) -> None:
    """`teacher-cache crop` as a user to whom permissions mean something."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    warm.run_program("teacher-cache", "crop", "--images", images, "--crop-size", 32, cache)


NAMES = {
    "line break": b"a\nb.png",
    "carriage return": b"a\rb.png",
    "no UTF-8": b"a\xff.png",
}


@pytest.mark.soak("file name that cannot be kept", kinds=NAMES, short=1)
def test_names(kind, folder, tmp_path, fell):
    """A name that no list of names can hold is refused, and nothing is written."""
    (folder / "good-0.png").rename(folder / os.fsdecode(NAMES[kind]))
    crop(folder, tmp_path / "c").says("cannot be kept in a text file", code=1)
    assert not (tmp_path / "c").exists()
    fell("refused")
