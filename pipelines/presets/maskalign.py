"""MaskAlign (Xue et al., Stare at What You See: Masked Image Modeling without Reconstruction, 2023).

Where paper and released code differ, the code is followed; it made the published checkpoints.
"""

from __future__ import annotations

from student.config import AlignConfig, BackboneConfig, MaskConfig, OptimConfig, TrainConfig
from teacher_cache.crops import CropPlan

from ..recipe import Recipe
from .demo import DEMO_BACKBONE, DEMO_OPTIM, DEMO_PLAN, DEMO_TRAINING


def maskalign_b16() -> Recipe:
    """MaskAlign ViT-B/16 under CLIP ViT-B/16: no reconstruction, no mask tokens.

    Command:    student-train --cache CACHE --preset maskalign-b16 --out RUN
    Crops:      random resized, scale .2 to 1, bicubic, flip.
    Needs:      last 5 layers and attention of clip-b16: teacher-cache extract --teacher clip-b16
    Expected:   85.4 % fine-tuned top-1 on ImageNet-1K, 200 epochs (with CLS; not reproduced here).
    Code over paper: mix student blocks first, then one adaptor a teacher level; 2 x smooth L1; CLS in the loss.
    Deviations: each crop is seen epochs / views times, the paper draws a new one every epoch; bf16 instead of fp16.
    """
    config = TrainConfig(
        preset="maskalign-b16",
        teacher="clip-b16",
        backbone=BackboneConfig(drop_path=0.1),
        mask=MaskConfig("attention", 0.70),
        objectives=(AlignConfig(levels=5),),
        optim=OptimConfig(base_lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05, warmup_epochs=20.0, min_lr=1e-5),
        epochs=200,
        batch_size=1024,
    )
    return Recipe(CropPlan(), config)


def maskalign_demo() -> Recipe:
    """MaskAlign at the size of `make demo`, under the built-in teacher.

    Command:    student-train --cache CACHE --preset maskalign-demo --out RUN
    Deviations: size, schedule and learning rate are the demo's, equal for all -demo presets.
    """
    config = TrainConfig(
        preset="maskalign-demo", teacher="demo", backbone=DEMO_BACKBONE,
        mask=MaskConfig("attention", 0.70), objectives=(AlignConfig(levels=5),), optim=DEMO_OPTIM, **DEMO_TRAINING,
    )  # fmt: skip
    return Recipe(DEMO_PLAN, config)
