"""SLIP's ViT-B with its image projection. Normalised by ImageNet's mean and std, unlike CLIP; position table learned.

The official file has, under "state_dict", `module.visual.*` with timm's names, `module.image_projection` [768, 512],
the text tower, and `module.image_mlp.*`, the head of its self-supervised half. That half must be there: the same
repository's CLIP has the same image tower and lacks it.

Cannot be told: how long it was trained (25, 50 or 100 epochs).
"""

from __future__ import annotations

from functools import partial

from .published_vit import LEARNED, load_published
from .weights.load import Layout

LAYOUTS = (
    Layout(
        inside=("state_dict",),
        keep=(("module.visual.", ""), ("module.image_projection", "projection")),
        ignore=(
            "module.image_mlp.*",
            "module.transformer.*",
            "module.token_embedding.*",
            "module.positional_embedding",
            "module.ln_final.*",
            "module.text_projection",
            "module.logit_scale",
        ),
        require=("module.image_mlp.layer1.weight",),
    ),
)

load = partial(load_published, layouts=LAYOUTS, positions=LEARNED)
