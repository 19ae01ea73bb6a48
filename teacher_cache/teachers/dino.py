"""DINO's ViTs. 6 heads for S, position table learned, LayerNorm eps 1e-6 (Hugging Face's copies run with 1e-12).

Two official files: `*_pretrain.pth` is the teacher's backbone with timm's names and nothing around it;
`*_full_checkpoint.pth` has the teacher as `backbone.*` with its head under "teacher", beside the student. Both give
the teacher branch.

Cannot be told: another training of the same ViT with a learned position table that was saved without any wrapper.
"""

from __future__ import annotations

import os

from . import TeacherEntry
from .base import Teacher
from .published_vit import LEARNED, load_published
from .weights import Layout

LAYOUTS = (
    Layout(
        inside=("teacher",),
        keep=(("backbone.", ""), ("module.backbone.", "")),
        ignore=("head.*", "module.head.*"),
    ),
    Layout(),
)


def load(
    entry: TeacherEntry,
    weights: str | os.PathLike | None,
    image_size: int | None = None,
    device: str = "cpu",
    precision: str = "fp32",
) -> Teacher:
    """The teacher of one line of the table; see `load_teacher`."""
    return load_published(entry, weights, LAYOUTS, LEARNED, image_size, device, precision)
