"""The teachers by name. Listing them imports no torch; `load_teacher` does.

A new teacher is one line in TEACHERS, and in its module the rules for the names in its weights file.
"""

from __future__ import annotations

import difflib
import importlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UnknownNameError

if TYPE_CHECKING:
    from .base import Teacher

_OPENAI_MEAN, _OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class TeacherEntry:
    """A teacher that can be asked for by name: what it is, and all that is needed to build it."""

    name: str
    module: str
    """The file of this folder whose `load(entry, weights, image_size, device, precision)` builds it."""
    about: str
    weights_from: str
    """Which file to pass as `--weights`, for people."""
    dim: int
    depth: int
    heads: int
    patch_size: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    norm_eps: float
    projection_dim: int | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches at the native image size."""
        return (self.image_size // self.patch_size,) * 2


TEACHERS: dict[str, TeacherEntry] = {
    entry.name: entry
    for entry in (
        TeacherEntry(
            name="clip-b16",
            module="clip",
            about="CLIP ViT-B/16 of OpenAI (QuickGELU), image tower",
            weights_from="OpenAI's ViT-B-16.pt (sha256 5806e77c...), or the same weights in open_clip's layout: "
            "open_clip_model.safetensors or open_clip_pytorch_model.bin of `ViT-B-16-quickgelu`, tag `openai`",
            dim=768, depth=12, heads=12, patch_size=16, image_size=224,
            mean=_OPENAI_MEAN, std=_OPENAI_STD, norm_eps=1e-5, projection_dim=512,
        ),
        TeacherEntry(
            name="demo",
            module="demo",
            about="a small ViT trained on 4,000 MNIST digits, for trying things out in seconds",
            weights_from="built in",
            dim=64, depth=6, heads=4, patch_size=4, image_size=32,
            mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), norm_eps=1e-6,
        ),
    )
}  # fmt: skip
"""Besides these, `timm:NAME` is any plain VisionTransformer of timm."""

TIMM_PREFIX = "timm:"


def load_teacher(
    name: str,
    weights: str | os.PathLike | None = None,
    image_size: int | None = None,
    device: str = "cpu",
    precision: str = "fp32",
) -> Teacher:
    """Build a teacher, fill in its weights, freeze it.

    name:       one of TEACHERS, or `timm:NAME`
    weights:    path of a weights file, or `random:SEED` for a trial without one; None where they are built in, or for
                timm to download
    image_size: side of the teacher's input, pixels; None is its own. Position tables are resized
    (`TeacherSpec.resize`)
    precision:  `fp32` or, on CUDA, `bf16`
    Raises UnknownNameError, UsageError, or BadInputError for weights that cannot be used.
    """
    if name.startswith(TIMM_PREFIX):
        from .timm_vit import load_timm

        return load_timm(name, weights, image_size, device, precision)
    if name not in TEACHERS:
        close = difflib.get_close_matches(name, TEACHERS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UnknownNameError(
            f"There is no teacher named {name!r}.{hint} Known: {', '.join(TEACHERS)}, and {TIMM_PREFIX}NAME for any plain "
            "VisionTransformer of timm."
        )
    module = importlib.import_module(f".{TEACHERS[name].module}", __name__)
    return module.load(TEACHERS[name], weights, image_size, device, precision)
