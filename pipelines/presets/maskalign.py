"""MaskAlign (Xue et al., Stare at What You See: Masked Image Modeling without Reconstruction, 2023).

Where paper and released code differ, the code is followed; it made the published checkpoints.
"""

from __future__ import annotations

from dataclasses import replace

from student.config import AlignConfig, MaskConfig, OptimConfig, TrainConfig
from teacher_cache.format.crop_plan import CropPlan

from .demo import DEMO_BACKBONE, DEMO_OPTIM, DEMO_PLAN, DEMO_TRAINING
from .recipe import Recipe
from .sizes import DINOV3_B16, SIGLIP2_B16, VIT_B, VIT_L


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
        teachers=("clip-b16",),
        backbone=replace(VIT_B, drop_path=0.1),
        mask=MaskConfig("attention", 0.70),
        objectives=(AlignConfig(levels=5),),
        optim=OptimConfig(base_lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05, warmup_epochs=20.0, min_lr=1e-5),
        epochs=200,
        batch_size=1024,
    )
    return Recipe(CropPlan(), config)


def _variant(name: str, **changes) -> Recipe:
    base = maskalign_b16()
    return replace(base, config=replace(base.config, preset=f"maskalign-{name}", **changes))


def maskalign_l16() -> Recipe:
    """MaskAlign ViT-L/16 under CLIP ViT-L/14 at 196 px.

    Command:    student-train --cache CACHE --preset maskalign-l16 --out RUN
    Needs:      last 5 layers and attention of clip-l14: teacher-cache extract --teacher clip-l14
    Expected:   87.4 % fine-tuned, 200 epochs (ModelCard.md of its code; not reproduced here).
    Code over paper: as maskalign-b16; drop path .2 (paper .1).
    Deviations: as maskalign-b16.
    """
    return _variant("l16", teachers=("clip-l14",), backbone=replace(VIT_L, drop_path=0.2))


def maskalign_b16_dino() -> Recipe:
    """MaskAlign ViT-B/16 under DINO ViT-B/16.

    Command:    student-train --cache CACHE --preset maskalign-b16-dino --out RUN
    Needs:      last 5 layers and attention of dino-b16.
    Expected:   83.9 % fine-tuned, 200 epochs (its teacher ablation; not reproduced here).
    Deviations: as maskalign-b16; eps 1e-6 of DINO's own code in its norms and in the whitening of targets.
    """
    return _variant("b16-dino", teachers=("dino-b16",))


def maskalign_b16_dinov3() -> Recipe:
    """MaskAlign ViT-B/16 under DINOv3 ViT-B/16: a variant that no paper has.

    Command:    student-train --cache CACHE --preset maskalign-b16-dinov3 --out RUN
    Needs:      last 5 layers and attention of DINOv3 at 224 px, which is 14 x 14 patches (its own 256 px are 16 x 16):
                teacher-cache extract --teacher timm:vit_base_patch16_dinov3.lvd1689m --image-size 224
    Expected:   no number is known: neither MaskAlign nor DINOv3 reports this pair.
    Carried over: all of maskalign-b16, its settings for CLIP; masks by the CLS attention of the last block, over spatial patches,
                with registers among the keys; the 4 registers are dropped.
    Deviations: as maskalign-b16; eps 1e-5 of DINOv3's norms in the whitening of targets.
    """
    return _variant("b16-dinov3", teachers=(DINOV3_B16,))


def maskalign_b16_siglip2() -> Recipe:
    """MaskAlign ViT-B/16 under SigLIP 2 ViT-B/16: a variant that no paper has.

    Command:    student-train --cache CACHE --preset maskalign-b16-siglip2 --out RUN
    Needs:      last 5 layers and attention of SigLIP 2 at 224 px:
                teacher-cache extract --teacher timm:vit_base_patch16_siglip_224.v2_webli
    Expected:   no number is known: neither MaskAlign nor SigLIP 2 reports this pair.
    Carried over: all of maskalign-b16, its settings for CLIP. SigLIP has no CLS token: masks are drawn by the attention of its
                pooling head, and the loss is on patches alone; the student keeps its own CLS.
    Deviations: as maskalign-b16, without CLS in the loss; eps 1e-6 of SigLIP's norms in the whitening of targets.
    """
    return _variant("b16-siglip2", teachers=(SIGLIP2_B16,))


def maskalign_b16_layer_wise() -> Recipe:
    """MaskAlign ViT-B/16 without dynamic alignment: the last 5 student blocks one to one with the teacher's.

    Command:    student-train --cache CACHE --preset maskalign-b16-layer-wise --out RUN
    Needs:      last 5 layers and attention of clip-b16.
    Expected:   85.1 % fine-tuned, 200 epochs (its ablation; not reproduced here).
    Deviations: as maskalign-b16; the number was measured without CLS in the loss.
    """
    return _variant("b16-layer-wise", objectives=(AlignConfig(levels=5, mixing="layer-wise"),))


def maskalign_b16_top1() -> Recipe:
    """MaskAlign ViT-B/16 with the teacher's last block alone.

    Command:    student-train --cache CACHE --preset maskalign-b16-top1 --out RUN
    Needs:      last layer and attention of clip-b16: teacher-cache extract --teacher clip-b16 --layers last
    Expected:   84.9 % fine-tuned, 200 epochs (its ablation, K = 1; not reproduced here).
    Deviations: as maskalign-b16; the number was measured without CLS in the loss.
    """
    return _variant("b16-top1", objectives=(AlignConfig(levels=1),))


def maskalign_b16_random() -> Recipe:
    """MaskAlign ViT-B/16 with uniform masks.

    Command:    student-train --cache CACHE --preset maskalign-b16-random --out RUN
    Needs:      last 5 layers of clip-b16; works without attention.
    Expected:   85.1 % fine-tuned, 200 epochs (its ablation, random .7; not reproduced here).
    Deviations: as maskalign-b16; the number was measured without CLS in the loss.
    """
    return _variant("b16-random", mask=MaskConfig("random", 0.70))


def maskalign_demo() -> Recipe:
    """MaskAlign at the size of `make demo`, under the built-in teacher.

    Command:    student-train --cache CACHE --preset maskalign-demo --out RUN
    Deviations: size, schedule and learning rate are the demo's, equal for all -demo presets.
    """
    config = TrainConfig(
        preset="maskalign-demo", teachers=("demo",), backbone=DEMO_BACKBONE,
        mask=MaskConfig("attention", 0.70), objectives=(AlignConfig(levels=5),), optim=DEMO_OPTIM, **DEMO_TRAINING,
    )  # fmt: skip
    return Recipe(DEMO_PLAN, config)
