"""MoCo v3's ViTs. 12 heads, for S too, where everyone else's ViT-S has 6.

The official file has, under "state_dict", `module.base_encoder.*` (the online branch, which its own evaluation takes)
with timm's names and its projector as `head.*`, then `module.momentum_encoder.*` and `module.predictor.*`. The patch
embedding was never trained (`--stop-grad-conv1`): its random weights are part of the teacher and are loaded like all
others. The position table is fixed, rows before columns, and is loaded too: MAE's function would make another one.
"""

from __future__ import annotations

from functools import partial

from .published_vit import ROWS_FIRST, load_published
from .weights.load import Layout

LAYOUTS = (
    Layout(
        inside=("state_dict",),
        keep=(("module.base_encoder.", ""),),
        ignore=("module.base_encoder.head.*", "module.momentum_encoder.*", "module.predictor.*"),
    ),
)

load = partial(load_published, layouts=LAYOUTS, positions=ROWS_FIRST)
