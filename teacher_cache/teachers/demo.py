"""The teacher that comes with the package: a small ViT for digits, loaded as every other teacher is.

How it was trained, on what and how well it does: `demo_teacher.md` beside its weights, and
`pipelines/demo/train_teacher.py`.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from . import TeacherEntry
from .base import Teacher, check_precision
from .timm_vit import as_teacher, at_image_size, build_vit
from .weights.load import Layout, load_weights

BUILT_IN = Path(__file__).with_name("demo_teacher.safetensors")
"""float16 on disk, computed in float32."""


def load(
    entry: TeacherEntry,
    weights: str | os.PathLike | None = None,
    image_size: int | None = None,
    device: str = "cpu",
    precision: str = "fp32",
) -> Teacher:
    """The teacher of its line of the table; see `load_teacher`. Without `weights`, the built-in ones."""
    check_precision(precision, device)
    model = build_vit(entry)
    expected = "Leave out --weights for those that come with it; a file must have the names of timm's VisionTransformer."
    loaded = load_weights(model, BUILT_IN if weights is None else weights, [Layout(ignore=("head.*",))], expected=expected)
    if weights is None:
        loaded = dataclasses.replace(loaded, source="built-in", how="")
    at_image_size(model, entry.name, image_size or entry.image_size)
    return as_teacher(entry.name, model, loaded, entry.mean, entry.std, device, precision)
