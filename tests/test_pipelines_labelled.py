"""Labelled images: what is no image is named, and never waited for."""

from __future__ import annotations

import os
import shutil

import pytest

from pipelines.labelled import LabelledImages
from teacher_cache.errors import BadInputError


def test_a_pipe_is_not_waited_for(image_folder, tmp_path):
    """A pipe that is called like an image is refused by its name; reading it would wait for ever."""
    images = shutil.copytree(image_folder, tmp_path / "images")
    os.mkfifo(images / "class-1" / "pipe.jpg")
    with pytest.raises(BadInputError, match="class-1/pipe.jpg: is a pipe"):
        list(LabelledImages(images, 32))
