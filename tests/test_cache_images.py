"""Listing an image folder: torchvision's labels and order, one seeded permutation, and nothing left out in silence."""

from __future__ import annotations

import os
import re
import shlex
import tarfile

import numpy as np
import pytest
from scipy.stats import chi2_contingency
from torchvision.datasets import ImageFolder

from teacher_cache.crops.images import ImageList, in_one_line, read_image, scan
from teacher_cache.errors import BadInputError, UsageError


def touch(folder, *names):
    for name in names:
        path = folder / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


NESTED = (
    "b/2.png", "b/10.JPG", "b/sub/1.jpeg", "b/sub-1/1.webp", "b/sub/deep/1.bmp", "B/1.tif", "a/x.ppm", "ä/1.PnG",
    "10/1.tiff", "9/1.pgm", "b/sub 2/7.png", "b/sub/Z.png", "b/sub/a.png",
)  # fmt: skip


def test_order_and_labels_are_torchvisions(tmp_path):
    """Classes, labels and the order of files are those of torchvision's ImageFolder, in nested folders too."""
    images, ignored, left_out = scan(touch(tmp_path, *NESTED))
    theirs = ImageFolder(tmp_path)
    assert list(images.classes) == theirs.classes
    assert [str(tmp_path / name) for name in images.names] == [path for path, _ in theirs.samples]
    assert images.labels.tolist() == theirs.targets and ignored == left_out == []


def test_links_are_followed_as_torchvision_does(tmp_path):
    """Linked files and folders count as what they point to."""
    touch(tmp_path / "elsewhere", "1.png", "2.png")
    folder = touch(tmp_path / "images", "a/1.png")
    (folder / "b").symlink_to(tmp_path / "elsewhere")
    (folder / "a" / "2.png").symlink_to(tmp_path / "elsewhere" / "2.png")
    assert scan(folder).images.names == ("a/1.png", "a/2.png", "b/1.png", "b/2.png")


def test_flat_folder(tmp_path):
    """A folder without class folders gives its images with label -1 and no classes."""
    images, ignored, _ = scan(touch(tmp_path, "b.png", "a.jpg", "notes.txt"))
    assert images.names == ("a.jpg", "b.png") and images.labels.tolist() == [-1, -1] and images.classes == ()
    assert images.labels.dtype == np.int64 and ignored == ["notes.txt"]


def test_ignored_files_are_named(tmp_path):
    """Files that are no images by name are listed, at the top level and in every class."""
    ignored = scan(touch(tmp_path, "readme.md", "a/1.png", "a/Thumbs.db", "a/sub/x.txt", "b/1.png", "b/1.npy")).ignored
    assert ignored == ["readme.md", "a/Thumbs.db", "a/sub/x.txt", "b/1.npy"]


REFUSED = {
    "missing": (lambda folder: folder / "nowhere", "nowhere: no such folder"),
    "a file": (lambda folder: touch(folder, "a.png") / "a.png", r"a.png: is one image. Give the folder that it lies in: \S+$"),
    "another file": (lambda folder: touch(folder, "a.txt") / "a.txt", "is a file, not a folder. Give a folder of class folders"),
    "empty": (lambda folder: touch(folder, "notes.txt"), r"no images found \(\.jpg"),
    "empty class": (lambda folder: touch(folder, "a/1.png", "b/notes.txt"), "class folder 'b' holds no images"),
    "mixed": (lambda folder: touch(folder, "a/1.png", "2.png"), r"class folders \(1\) and images \(1, e.g. '2.png'\)"),
    "newline": (lambda folder: touch(folder, "a/1\n2.png"), r"'a/1\\n2.png' cannot be kept in a text file. Rename it"),
    "return": (lambda folder: touch(folder, "1\r.png"), r"'1\\r.png' cannot be kept"),
    "not UTF-8": (lambda folder: touch(folder, b"a/caf\xe9.png"), r"'a/caf\\udce9.png' cannot be kept"),
    "class not UTF-8": (lambda folder: touch(folder, b"caf\xe9/1.png"), r"'caf\\udce9/1.png' cannot be kept"),
    "several odd names": (
        lambda folder: touch(folder, "a/1\n.png", "a/2\r.png", "a/3\n.png"),
        r"'a/1\\n.png' and 2 others cannot",
    ),
    "mixed and not UTF-8": (lambda folder: touch(folder, b"caf\xe9.png", "a/1.png"), r"e.g. 'caf\\udce9.png'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unusable_folders(tmp_path, case):
    """A folder that cannot become a cache is refused with its path and the reason, in text that any terminal can print."""
    make, words = REFUSED[case]
    folder = make(tmp_path)
    with pytest.raises(
        UsageError if re.search("no such|no images found|is one image|is a file", words) else BadInputError, match=words
    ) as caught:
        scan(folder)
    assert str(tmp_path) in str(caught.value)
    str(caught.value).encode()


HIDDEN = ("lost+found", ".ipynb_checkpoints", "@eaDir", "__MACOSX", ".Trash-1000", "$RECYCLE.BIN", "System Volume Information")


@pytest.mark.parametrize("inside", ["", "a/", "a/sub/"])
def test_hidden_and_system_folders(tmp_path, inside):
    """Hidden files and folders, and those of systems, are no classes and no images wherever they stand, and are named."""
    touch(tmp_path, "a/1.png", "a/sub/2.png", "b/3.png")
    expected = scan(tmp_path).images
    touch(tmp_path, *(f"{inside}{name}/a-1.png" for name in HIDDEN), f"{inside}._1.png", f"{inside}.DS_Store")
    (tmp_path / inside / ".empty").mkdir()
    images, ignored, left_out = scan(tmp_path)
    assert images.names == expected.names and images.classes == ("a", "b") and images.labels.tolist() == [0, 0, 1]
    assert sorted(left_out) == sorted(f"{inside}{name}" for name in (*HIDDEN, "._1.png", ".empty"))
    assert ignored == [f"{inside}.DS_Store"]
    assert in_one_line(left_out).endswith("and 4 more.") and "'lost+found'" in in_one_line(["lost+found"])
    (tmp_path / inside / ".empty").rmdir()
    (tmp_path / inside / "._1.png").unlink()
    assert len(scan(tmp_path, everything=True).images.names) > len(images.names)


def test_a_flat_folder_with_a_hidden_one(tmp_path):
    """A hidden folder beside images makes no class folders of them; one that holds nothing but hidden ones says so."""
    images, _, left_out = scan(touch(tmp_path, "1.png", ".ipynb_checkpoints/1-checkpoint.png"))
    assert images.names == ("1.png",) and images.classes == () and left_out == [".ipynb_checkpoints"]
    (tmp_path / "1.png").unlink()
    with pytest.raises(UsageError, match="no images found .*Hidden files and system folders are left out: '.ipynb_checkpoints'"):
        scan(tmp_path)


FILES = {
    "train.tar": "is an archive, not a folder. Unpack it and give that: mkdir DIR && tar -xf '.*/with blank/train.tar' -C DIR",
    "train.tar.gz": "tar -xf", "Train.ZIP": "unzip '", "train.7z": "7z x",
    "train.parquet": "tables, which are not read",
    "train-00001.tfrecord": "TFRecords", "train.beton": "data of FFCV", "a.png": "is one image",
    "notes": "is a file, not a folder",
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_in_the_place_of_a_folder(tmp_path, name):
    """A file is called what it is, with what to do about it; a path with blanks is quoted."""
    with pytest.raises(UsageError) as caught:
        scan(touch(tmp_path, f"with blank/{name}") / "with blank" / name)
    said = str(caught.value)
    assert re.search(FILES[name], said) and "no such folder" not in said
    if "DIR" in said or "lies in" in said:
        command = said.rpartition(": ")[2]
        assert any(word.startswith(str(tmp_path / "with blank")) for word in shlex.split(command))


def tar_of(path, *names):
    with tarfile.open(path, "w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))


def test_folders_of_packed_images(tmp_path):
    """Shards of a webdataset, a folder of archives, tables and TFRecords are called what they are."""
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(2):
        tar_of(shards / f"{number:04d}.tar", "1.cls", "1.jpg", "2.cls", "2.jpg")
    archives = tmp_path / "archives"
    archives.mkdir()
    for name in ("n01.tar", "n02.tar"):
        tar_of(archives / name, "n01_1.JPEG", "n01_2.JPEG")
    cases = {
        shards: "It holds shards of a webdataset .2 files, e.g. '0000.tar'",
        archives: "It holds 2 archives. Unpack each into a folder of its own.*mkdir -p DIR/n01 && tar -xf .*n01.tar -C DIR/n01$",
        touch(tmp_path / "one", "train.zip"): "It holds an archive. Unpack it and give the folder: unzip .*train.zip -d DIR",
        touch(tmp_path / "tables", "0.parquet", "1.parquet"): "It holds tables .2 files, e.g. '0.parquet'.*class folders",
        touch(tmp_path / "records", "train-00000-of-01024"): "It holds TFRecords",
        touch(tmp_path / "broken", "x.tar", "y.tar"): "It holds 2 archives",
    }
    for folder, words in cases.items():
        with pytest.raises(UsageError, match=words):
            scan(folder)
    touch(tmp_path / "split", "train/0.tar")
    with pytest.raises(BadInputError, match="class folder 'train' holds no images .*It holds an archive"):
        scan(tmp_path / "split")


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


def test_what_poses_as_an_image_is_listed(tmp_path):
    """A link to nowhere, a link to itself, a pipe and an empty folder are listed by their names, so that the crop stage tells
    of them; a folder called like an image that holds images is a folder."""
    folder = touch(tmp_path / "images", "a/1.png", "a/album.png/2.png")
    (folder / "a" / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "a" / "itself.png").symlink_to("itself.png")
    os.mkfifo(folder / "a" / "pipe.png")
    (folder / "a" / "x.jpg" / "empty").mkdir(parents=True)
    images, ignored, _ = scan(folder)
    names = ["1.png", "gone.png", "itself.png", "pipe.png", "x.jpg", "album.png/2.png"]
    assert images.names == tuple(f"a/{name}" for name in names) and ignored == []
    reasons = {
        "gone.png": "is a link to nowhere", "itself.png": "Too many levels of symbolic links",
        "pipe.png": "is a pipe or a device, not a file", "x.jpg": "Is a directory", "missing.png": "No such file or directory",
    }  # fmt: skip
    for name, reason in reasons.items():
        with pytest.raises(BadInputError, match=f"^a/{name}: {reason}$"):
            read_image(folder, f"a/{name}")
    (folder / "a" / "1.png").write_bytes(b"data")
    assert read_image(folder, "a/1.png") == b"data"


def test_a_file_too_large_to_be_an_image(tmp_path):
    """A file of a hundred gigabytes is refused before memory is taken for it."""
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(10**11)
    with pytest.raises(BadInputError, match="a.png: has 100,000,000,000 bytes; files over 1,073,741,824 are not read"):
        read_image(tmp_path, "a.png")


@pytest.mark.parametrize("place", ["class", "a/deep/er", "a/notes"])
def test_broken_links_that_may_have_been_folders(tmp_path, place):
    """A link to nowhere that is not called an image may have led to a class: it is refused, not left out."""
    folder = touch(tmp_path / "images", "a/deep/1.png")
    (folder / place).symlink_to(tmp_path / "gone")
    with pytest.raises(BadInputError, match=f"the link '.*{place}' leads nowhere; it may have been a folder"):
        scan(folder)


@pytest.mark.parametrize("target", [".", "..", "../..", "../../a/deep"])
def test_links_in_a_circle(tmp_path, target):
    """A link to a folder that contains it is refused: its images would be listed again and again."""
    folder = touch(tmp_path / "images", "a/deep/1.png")
    (folder / "a" / "deep" / "loop").symlink_to(target)
    with pytest.raises(BadInputError, match="the link '.*loop.*' leads to a folder that contains it. Remove it"):
        scan(folder)


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
