"""The presets: one function each, named like the preset, in the file of its paper. `recipe(name)` finds it."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from teacher_cache.errors import UnknownNameError

from . import cae_v2, mae, maskalign, milan, mimco, mr_mae, mr_mcmae
from .recipe import Recipe

PRESETS: dict[str, Callable[[], Recipe]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        mae.mae_s16, mae.mae_b16, mae.mae_l16,
        mr_mae.mr_mae_b16, mr_mae.mr_mae_b16_random, mr_mae.mr_mae_b16_no_fusion, mr_mae.mr_mae_b16_mimic_only,
        mr_mae.mr_mae_b16_joint_decoder, mr_mae.mr_mae_b16_dino, mr_mae.mr_mae_b16_clip_dino, mr_mae.mr_mae_b16_dinov3,
        mr_mcmae.mr_mcmae_s, mr_mcmae.mr_mcmae_b,
        mimco.mimco_s16, mimco.mimco_b16, mimco.mimco_swin_t, mimco.mimco_swin_b,
        cae_v2.cae_v2_ti16, cae_v2.cae_v2_s16, cae_v2.cae_v2_b16, cae_v2.cae_v2_l16,
        maskalign.maskalign_b16, maskalign.maskalign_l16, maskalign.maskalign_b16_dino, maskalign.maskalign_b16_layer_wise,
        maskalign.maskalign_b16_top1, maskalign.maskalign_b16_random, maskalign.maskalign_b16_dinov3,
        maskalign.maskalign_b16_siglip2,
        milan.milan_b16, milan.milan_l16, milan.milan_b16_random, milan.milan_b16_plain,
        milan.milan_b16_dinov3,
        mae.mae_demo, mr_mae.mr_mae_demo, mr_mcmae.mr_mcmae_demo, mimco.mimco_demo, cae_v2.cae_v2_demo, maskalign.maskalign_demo,
        milan.milan_demo,
    )
}  # fmt: skip


def recipe(name: str) -> Recipe:
    """The recipe of a preset; UnknownNameError lists the known ones."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UnknownNameError(f"There is no preset {name!r}.{hint} Known: {', '.join(PRESETS)}.")
    return PRESETS[name]()
