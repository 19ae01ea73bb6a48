"""MAE's encoder. Position table fixed, columns before rows.

The official file has the encoder with timm's names under "model"; the one published for visualisation and the
trainer's checkpoints have the decoder beside it, which is left out by name. A fine-tuned MAE has a classifier and
another last norm, and is refused.
"""

from __future__ import annotations

from functools import partial

from .published_vit import COLUMNS_FIRST, load_published
from .weights.load import Layout

LAYOUTS = (Layout(inside=("model",), ignore=("mask_token", "decoder_*")),)

load = partial(load_published, layouts=LAYOUTS, positions=COLUMNS_FIRST)
