"""Labelled images: what is no image is named, and never waited for."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch
from fakes import image_of

from pipelines.feed.labelled import LabelledImages
from teacher_cache.errors import BadInputError, MismatchError


def test_a_pipe_is_not_waited_for(image_folder, tmp_path):
    """A pipe that is called like an image is refused by its name; reading it would wait for ever."""
    images = shutil.copytree(image_folder, tmp_path / "images")
    os.mkfifo(images / "class-1" / "pipe.jpg")
    with pytest.raises(BadInputError, match="class-1/pipe.jpg: is a pipe"):
        list(LabelledImages(images, 32))


def folder_of(parent, name, classes):
    for number, label in enumerate(classes):
        for image in range(2):
            path = parent / name / label / f"{image}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image_of(10 * number + image).save(path)
    return parent / name


def test_some_of_the_classes_can_be_asked(tmp_path):
    """Where a validation set has some classes of the training set, in any order, labels follow the names, only images of these
    classes are left to vote, and pixels and labels go on belonging together."""
    train = LabelledImages(folder_of(tmp_path, "train", ["ant", "bee", "cat", "dog"]), 32, batch_size=3)
    whole = np.concatenate(list(train.pixels()))
    train.only(("dog", "bee"))
    assert train.classes == ("dog", "bee") and train.labels.tolist() == [1, 1, 0, 0] and len(train) == 4
    pixels, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
    assert labels.tolist() == [1, 1, 0, 0]
    np.testing.assert_array_equal(np.concatenate(list(train.pixels())), whole[[2, 3, 6, 7]])
    assert len(pixels) == 4


def test_of_a_cache_too(shared_cache):
    """The crops of a cache can be limited to some classes as a folder's images can."""
    all_of_it, some = LabelledImages(shared_cache.path, 32), LabelledImages(shared_cache.path, 32)
    some.only(some.classes[1:2])
    rows = np.flatnonzero(all_of_it.labels == 1)
    assert len(some) == len(rows) == 8 and set(some.labels.tolist()) == {0}
    np.testing.assert_array_equal(np.concatenate(list(some.pixels())), np.concatenate(list(all_of_it.pixels()))[rows])


def test_a_class_that_nobody_voted_for_is_named(tmp_path):
    """A class of the validation set that the training set has not is refused by its name."""
    train = LabelledImages(folder_of(tmp_path, "train", ["ant", "bee"]), 32)
    with pytest.raises(MismatchError, match="lacks 1 of the 2 classes that are asked for: wasp"):
        train.only(("bee", "wasp"))


def test_fingerprints_of_images(tmp_path):
    """Names, classes and sizes of files make the fingerprint, which a copy elsewhere has too; the state also says when each was
    changed."""
    folder = folder_of(tmp_path, "a", ["ant", "bee"])
    copied = shutil.copytree(folder, tmp_path / "b")
    first = LabelledImages(folder, 32)
    os.utime(copied / "ant" / "0.png", (1, 1))
    assert LabelledImages(copied, 32).fingerprint() == first.fingerprint() and LabelledImages(copied, 32).state() != first.state()
    some = LabelledImages(folder, 32)
    some.only(("bee",))
    part = LabelledImages(folder, 32).part(0, 2)
    (copied / "bee" / "1.png").rename(copied / "bee" / "2.png")
    renamed = LabelledImages(copied, 32)
    image_of(3).save(folder / "bee" / "1.png")
    changed = LabelledImages(folder, 32)
    assert len({images.fingerprint() for images in (first, some, part, renamed, changed)}) == 4  # `first` sees the change, too
    assert first.fingerprint() == changed.fingerprint()


def test_parts_are_whole(tmp_path):
    """The parts of all processes together are all images, each with its label; some of them can be taken by their places."""
    images = LabelledImages(folder_of(tmp_path, "a", ["ant", "bee", "cat"]), 32)
    whole = np.concatenate(list(images.pixels()))
    parts = [images.part(number, 2) for number in range(2)]
    for number, part in enumerate(parts):
        np.testing.assert_array_equal(np.concatenate(list(part.pixels())), whole[number::2])
        assert part.labels.tolist() == images.labels[number::2].tolist()
    assert images.image(0).size == image_of(0).size
    images.take(np.array([1, 4]))
    np.testing.assert_array_equal(np.concatenate(list(images.pixels())), whole[[1, 4]])
    assert images.labels.tolist() == [0, 2] and len(images) == 2


def test_pixels_by_another_mean(shared_cache):
    """Images are normalised by the mean and deviation that are given; of a cache, no whole image is there."""
    images = LabelledImages(shared_cache.path, 32, mean=(0.5,) * 3, std=(0.25,) * 3)
    levels = torch.from_numpy(next(images.pixels())).permute(0, 3, 1, 2)
    torch.testing.assert_close(next(iter(images))[0], (levels / 255 - 0.5) / 0.25)
    with pytest.raises(BadInputError, match="is a cache, whose crops are cut already"):
        images.image(0)
