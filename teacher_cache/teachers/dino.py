"""DINO's ViTs. 6 heads for S, position table learned, LayerNorm eps 1e-6 (Hugging Face's copies run with 1e-12).

Two official files: `*_pretrain.pth` is the teacher's backbone with timm's names and nothing around it;
`*_full_checkpoint.pth` has the teacher as `backbone.*` with its head under "teacher", beside the student. Both give
the teacher branch.

Cannot be told: another training of the same ViT with a learned position table that was saved without any wrapper.
"""

from __future__ import annotations

from functools import partial

from .published_vit import LEARNED, load_published
from .weights.load import Layout

LAYOUTS = (
    Layout(
        inside=("teacher",),
        keep=(("backbone.", ""), ("module.backbone.", "")),
        ignore=("head.*", "module.head.*"),
    ),
    Layout(),
)

load = partial(load_published, layouts=LAYOUTS, positions=LEARNED)
