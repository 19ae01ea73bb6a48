"""MR-MCMAE (the same paper as MR-MAE): masked convolution stages before the transformer, also known as ConvMAE-v2.

No code was released; the backbone is that of MCMAE's code (v1) with the CLS token that its authors confirm for v2. Sizes L
and H have no published widths and are left out.
"""

from __future__ import annotations

from dataclasses import replace

from student.config import MCMAEConfig
from teacher_cache.format.crop_plan import CropPlan

from .mr_mae import mr_mae_b16, mr_mae_demo
from .recipe import Recipe


def mr_mcmae_b() -> Recipe:
    """MR-MCMAE-B under CLIP ViT-B/16: two masked-convolution stages, fused with the last of 11 blocks.

    Command:    student-train --cache CACHE --preset mr-mcmae-b --out RUN
    Crops:      random resized, scale .2 to 1, bicubic, flip.
    Needs:      last layer and attention of clip-b16: teacher-cache extract --teacher clip-b16 --layers last
    Expected:   85.5 % fine-tuned at 200 epochs, 85.8 % at 400 (the paper's comparison on ImageNet-1K; not reproduced here).
    Silent in the paper, followed here: as mr-mae-b16; "multi-layer fusion" = MCMAE's strided convolutions of both stages,
                added before the final norm; 25 % visible, one mask an image.
    Deviations: each crop is seen epochs / views times, the paper draws a new one every epoch.
    """
    config = replace(mr_mae_b16().config, preset="mr-mcmae-b", backbone=MCMAEConfig())
    return Recipe(CropPlan(), config)


def mr_mcmae_s() -> Recipe:
    """MR-MCMAE-S under CLIP ViT-B/16: widths 128, 256, 384, 6 heads.

    Command:    student-train --cache CACHE --preset mr-mcmae-s --out RUN
    Needs:      as mr-mcmae-b.
    Expected:   83.6 % fine-tuned at 200 epochs (the paper's comparison of model sizes; not reproduced here).
    Deviations: as mr-mcmae-b; the widths come from a fork of FastConvMAE, the paper does not state them.
    """
    base = mr_mcmae_b()
    return replace(base, config=replace(base.config, preset="mr-mcmae-s", backbone=MCMAEConfig(dims=(128, 256, 384), heads=6)))


def mr_mcmae_demo() -> Recipe:
    """MR-MCMAE at the size of `make demo`, under the built-in teacher: strides 2, 2, 1, which end on its 8 x 8 grid.

    Command:    student-train --cache CACHE --preset mr-mcmae-demo --out RUN
    Deviations: size, schedule and learning rate are the demo's, equal for all -demo presets.
    """
    base = mr_mae_demo()
    backbone = MCMAEConfig(image_size=32, strides=(2, 2, 1), dims=(32, 48, 64), depths=(1, 1, 5), heads=4)
    return replace(base, config=replace(base.config, preset="mr-mcmae-demo", backbone=backbone))
