"""MAE's encoder. Position table fixed, columns before rows.

The official file has the encoder with timm's names under "model"; the one published for visualisation and the
trainer's checkpoints have the decoder beside it, which is left out by name. A fine-tuned MAE has a classifier and
another last norm, and is refused.
"""

from __future__ import annotations

import os

from . import TeacherEntry
from .base import Teacher
from .published_vit import COLUMNS_FIRST, load_published
from .weights import Layout

LAYOUTS = (Layout(inside=("model",), ignore=("mask_token", "decoder_*")),)


def load(
    entry: TeacherEntry,
    weights: str | os.PathLike | None,
    image_size: int | None = None,
    device: str = "cpu",
    precision: str = "fp32",
) -> Teacher:
    """The teacher of one line of the table; see `load_teacher`."""
    return load_published(entry, weights, LAYOUTS, COLUMNS_FIRST, image_size, device, precision)
