"""OpenAI's CLIP image towers, built from open_clip's blocks, filled from OpenAI's or open_clip's weights file.

OpenAI's file is a TorchScript archive in half precision: `visual.*` is the image tower, the rest the text tower,
which is left out by name. The weights are made for QuickGELU, x * sigmoid(1.702 x); a state dict does not say so, and
open_clip's plain `ViT-B-16` runs them with the exact GELU after a warning. Here it is part of the tower. For the same
reason weights of another origin (LAION's, with GELU) are another teacher, although they fit this one's shapes and
nothing in them tells: for those there is `open_clip:ARCH/TAG`.
"""

from __future__ import annotations

import os

from open_clip.transformer import QuickGELU, VisionTransformer

from . import TeacherEntry
from .base import Teacher, check_precision
from .open_clip_vit import LAYOUTS, as_teacher, at_image_size
from .weights.load import load_weights, require_weights


def build_tower(entry: TeacherEntry) -> VisionTransformer:
    """The untrained image tower at its native size, as open_clip builds it for its `-quickgelu` configurations."""
    return VisionTransformer(
        image_size=entry.native_size or entry.image_size,
        patch_size=entry.patch_size,
        width=entry.dim,
        layers=entry.depth,
        heads=entry.heads,
        mlp_ratio=4.0,
        output_dim=entry.projection_dim,
        act_layer=QuickGELU,
    )


def load(
    entry: TeacherEntry,
    weights: str | os.PathLike | None,
    image_size: int | None = None,
    device: str = "cpu",
    precision: str = "fp32",
) -> Teacher:
    """The teacher of one line of the table; see `load_teacher`."""
    check_precision(precision, device)
    weights = require_weights(entry, weights)
    tower = build_tower(entry)
    loaded = load_weights(tower, weights, LAYOUTS, entry.pickled)
    at_image_size(tower, entry.name, image_size or entry.image_size)
    return as_teacher(entry.name, tower, loaded, entry.mean, entry.std, device, precision)
