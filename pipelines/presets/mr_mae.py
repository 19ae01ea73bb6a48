"""MR-MAE (Gao et al., Mimic before Reconstruct: Enhancing Masked Autoencoders with Feature Mimicking, 2023).

No code was released. Where the paper is silent these presets follow MAE and MaskAlign (same group), as listed below.
"""

from __future__ import annotations

from dataclasses import replace

from student.config import BackboneConfig, MaskConfig, MimicConfig, OptimConfig, ReconstructConfig, TrainConfig
from teacher_cache.crops import CropPlan

from ..recipe import Recipe
from .demo import DEMO_BACKBONE, DEMO_DECODER, DEMO_OPTIM, DEMO_PLAN, DEMO_TRAINING


def mr_mae_b16() -> Recipe:
    """MR-MAE ViT-B/16 under CLIP ViT-B/16: mimic on visible tokens, reconstruct on masked ones, .5 each.

    Command:    student-train --cache CACHE --preset mr-mae-b16 --out RUN
    Crops:      random resized, scale .2 to 1, bicubic, flip (MAE's; the paper does not state them).
    Needs:      last layer and attention of clip-b16: teacher-cache extract --teacher clip-b16 --layers last
    Expected:   85.0 % fine-tuned top-1 on ImageNet-1K, 200 epochs (its Table 3, "MR-MAE base"; not reproduced here).
    Silent in the paper, followed here: target = last block, whitened; attention = last block, head mean, CLS row; focused
                mimicking by the exponential race; fusion = sum of blocks 3, 6, 9, 12, then the final norm; norm-pix;
                1.5e-4 taken as the rate for 256 crops; both losses are means over channels and tokens.
    Deviations: each crop is seen epochs / views times, the paper draws a new one every epoch.
    """
    config = TrainConfig(
        preset="mr-mae-b16",
        teacher="clip-b16",
        backbone=BackboneConfig(fuse_blocks=(3, 6, 9, 12)),
        mask=MaskConfig("attention", 0.75),
        objectives=(MimicConfig(weight=0.5), ReconstructConfig(weight=0.5)),
        optim=OptimConfig(base_lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05, warmup_epochs=80.0),
        epochs=400,
        batch_size=1024,
    )
    return Recipe(CropPlan(), config)


def mr_mae_demo() -> Recipe:
    """MR-MAE at the size of `make demo`, under the built-in teacher.

    Command:    student-train --cache CACHE --preset mr-mae-demo --out RUN
    Deviations: size, schedule and learning rate are the demo's, equal for all -demo presets; blocks 2, 4, 6 are fused.
    """
    config = TrainConfig(
        preset="mr-mae-demo", teacher="demo", backbone=replace(DEMO_BACKBONE, fuse_blocks=(2, 4, 6)),
        mask=MaskConfig("attention", 0.75), objectives=(MimicConfig(weight=0.5), replace(DEMO_DECODER, weight=0.5)),
        optim=DEMO_OPTIM, **DEMO_TRAINING,
    )  # fmt: skip
    return Recipe(DEMO_PLAN, config)
