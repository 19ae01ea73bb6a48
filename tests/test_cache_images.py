"""Listing an image folder: torchvision's labels and order, one seeded permutation, and nothing left out in silence."""

from __future__ import annotations

import os

import numpy as np
import pytest
from scipy.stats import chi2_contingency
from torchvision.datasets import ImageFolder

from teacher_cache.errors import BadInputError
from teacher_cache.images import ImageList, scan


def touch(folder, *names):
    for name in names:
        path = folder / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


NESTED = (
    "b/2.png", "b/10.JPG", "b/sub/1.jpeg", "b/sub-1/1.webp", "b/sub/deep/1.bmp", "B/1.tif", "a/x.ppm", "a/.hidden.png", "ä/1.PnG",
    "10/1.tiff", "9/1.pgm", "b/sub 2/7.png", "b/sub/Z.png", "b/sub/a.png",
)  # fmt: skip


def test_order_and_labels_are_torchvisions(tmp_path):
    """Classes, labels and the order of files are those of torchvision's ImageFolder, in nested folders too."""
    images, n_ignored = scan(touch(tmp_path, *NESTED))
    theirs = ImageFolder(tmp_path)
    assert list(images.classes) == theirs.classes
    assert [str(tmp_path / name) for name in images.names] == [path for path, _ in theirs.samples]
    assert images.labels.tolist() == theirs.targets and n_ignored == 0


def test_links_are_followed_as_torchvision_does(tmp_path):
    """Linked files and folders count as what they point to."""
    touch(tmp_path / "elsewhere", "1.png", "2.png")
    folder = touch(tmp_path / "images", "a/1.png")
    (folder / "b").symlink_to(tmp_path / "elsewhere")
    (folder / "a" / "2.png").symlink_to(tmp_path / "elsewhere" / "2.png")
    assert scan(folder)[0].names == ("a/1.png", "a/2.png", "b/1.png", "b/2.png")


def test_flat_folder(tmp_path):
    """A folder without class folders gives its images with label -1 and no classes."""
    images, n_ignored = scan(touch(tmp_path, "b.png", "a.jpg", "notes.txt"))
    assert images.names == ("a.jpg", "b.png") and images.labels.tolist() == [-1, -1] and images.classes == ()
    assert images.labels.dtype == np.int64 and n_ignored == 1


def test_ignored_files_are_counted(tmp_path):
    """Files that are no images by name are counted, at the top level and in every class."""
    assert scan(touch(tmp_path, "readme.md", "a/1.png", "a/Thumbs.db", "a/sub/x.txt", "b/1.png", "b/1.npy"))[1] == 4


REFUSED = {
    "missing": (lambda folder: folder / "nowhere", "nowhere: no such folder"),
    "a file": (lambda folder: touch(folder, "a.png") / "a.png", "no such folder"),
    "empty": (lambda folder: touch(folder, "notes.txt"), r"no images found \(\.jpg"),
    "empty class": (lambda folder: touch(folder, "a/1.png", "b/notes.txt"), "class folder 'b' holds no images"),
    "mixed": (lambda folder: touch(folder, "a/1.png", "2.png"), r"class folders \(1\) and images \(1, e.g. '2.png'\)"),
    "newline": (lambda folder: touch(folder, "a/1\n2.png"), r"'a/1\\n2.png' cannot be kept in a text file. Rename it"),
    "return": (lambda folder: touch(folder, "1\r.png"), r"'1\\r.png' cannot be kept"),
    "not UTF-8": (lambda folder: touch(folder, b"a/caf\xe9.png"), r"'a/caf\\udce9.png' cannot be kept"),
    "class not UTF-8": (lambda folder: touch(folder, b"caf\xe9/1.png"), r"'caf\\udce9/1.png' cannot be kept"),
    "mixed and not UTF-8": (lambda folder: touch(folder, b"caf\xe9.png", "a/1.png"), r"e.g. 'caf\\udce9.png'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unusable_folders(tmp_path, case):
    """A folder that cannot become a cache is refused with its path and the reason, in text that any terminal can print."""
    make, words = REFUSED[case]
    folder = make(tmp_path)
    with pytest.raises(BadInputError, match=words) as caught:
        scan(folder)
    assert str(tmp_path) in str(caught.value)
    str(caught.value).encode()


def test_unreadable_folder(tmp_path, monkeypatch):
    """A folder below a class that may not be read is an error, not a smaller data set."""
    touch(tmp_path, "a/1.png", "a/secret/2.png")
    scandir = os.scandir

    def refuse(path="."):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(BadInputError, match="secret' cannot be read .Permission denied"):
        scan(tmp_path)


def test_broken_links_are_not_left_out(tmp_path):
    """A link to nowhere is listed like any image, so that the crop stage names it."""
    folder = tmp_path / "flat"
    folder.mkdir()
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    assert scan(folder)[0].names == ("gone.png",)


CLASSES = ImageList(
    names=tuple(f"{label}/{i}.png" for label in range(10) for i in range(200)),
    labels=np.repeat(np.arange(10), 200),
    classes=tuple("0123456789"),
)


def test_permutation_is_a_function_of_the_seed():
    """The same seed gives the same order, names keep their labels, and another seed gives another order."""
    first, again, other = CLASSES.permuted(3), CLASSES.permuted(3), CLASSES.permuted(4)
    assert first.names == again.names != other.names and sorted(first.names) == sorted(CLASSES.names)
    assert [int(name.split("/")[0]) for name in first.names] == first.labels.tolist()
    assert first.names[:3] == ("0/130.png", "9/133.png", "5/96.png")


def p_value(labels) -> float:
    """Of the hypothesis that the classes are spread evenly over ten blocks of rows."""
    return chi2_contingency([np.bincount(block, minlength=10) for block in np.split(labels, 10)]).pvalue


@pytest.mark.parametrize("seed", range(3))
def test_any_block_of_rows_is_a_fair_sample(seed):
    """Contiguous rows are a fair sample of the classes, which those of the sorted order are not."""
    assert p_value(CLASSES.permuted(seed).labels) > 0.01
    with np.errstate(all="ignore"):
        assert p_value(CLASSES.labels) < 1e-100
