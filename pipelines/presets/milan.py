"""MILAN (Hou et al., MILAN: Masked Image Pretraining on Language Assisted Representation, 2022).

Where paper and released code differ, the code is followed; not so in the teacher's input (below).
"""

from __future__ import annotations

from dataclasses import replace

from student.config import CosineConfig, MaskConfig, OptimConfig, PredictorConfig, TrainConfig
from teacher_cache.format.crop_plan import CropPlan

from .demo import DEMO_BACKBONE, DEMO_OPTIM, DEMO_PLAN, DEMO_TRAINING
from .recipe import Recipe
from .sizes import DINOV3_B16, VIT_B, VIT_L


def milan_b16() -> Recipe:
    """MILAN ViT-B/16 under CLIP ViT-B/16: a prompting decoder predicts CLIP's projected tokens, 2 - 2 cos at all 197.

    Command:    student-train --cache CACHE --preset milan-b16 --out RUN
    Crops:      random resized, scale .2 to 1, bicubic, flip.
    Needs:      last layer and attention of clip-b16: teacher-cache extract --teacher clip-b16 --layers last
    Expected:   85.4 % fine-tuned, 78.9 % linear, 400 epochs (the paper's comparison on ImageNet-1K; not reproduced here).
    Code over paper: CLS is in the loss; visible tokens are projected before they are attended to; CLS is never drawn.
    Deviations: each crop is seen epochs / views times, the paper draws a new one every epoch; the teacher sees CLIP's own mean
                and deviation, of which the paper says nothing (its code: ImageNet's), so that one cache serves all CLIP methods.
    """
    config = TrainConfig(
        preset="milan-b16",
        teachers=("clip-b16",),
        backbone=VIT_B,
        mask=MaskConfig("attention", 0.75),
        objectives=(CosineConfig(scale=2.0, predictor=PredictorConfig("prompting")),),
        optim=OptimConfig(base_lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05, warmup_epochs=40.0),
        epochs=400,
        batch_size=4096,
    )
    return Recipe(CropPlan(), config)


def _variant(name: str, **changes) -> Recipe:
    base = milan_b16()
    return replace(base, config=replace(base.config, preset=f"milan-{name}", **changes))


def milan_l16() -> Recipe:
    """MILAN ViT-L/16 under CLIP ViT-L/14 at 196 px.

    Command:    student-train --cache CACHE --preset milan-l16 --out RUN
    Needs:      last layer and attention of clip-l14: teacher-cache extract --teacher clip-l14 --layers last
    Expected:   87.8 % fine-tuned, 84.1 % linear, 400 epochs (the paper's comparison on ImageNet-1K; not reproduced here).
    Deviations: as milan-b16; the paper does not say how L/14's 256 tokens meet 196 patches: 196 px, as in MaskAlign and CAE v2;
                its released script would load CLIP ViT-B/16 for every student.
    """
    return _variant("l16", teachers=("clip-l14",), backbone=VIT_L)


def milan_b16_dinov3() -> Recipe:
    """MILAN ViT-B/16 under DINOv3 ViT-B/16: a variant that no paper has.

    Command:    student-train --cache CACHE --preset milan-b16-dinov3 --out RUN
    Needs:      last layer and attention of DINOv3 at 224 px, which is 14 x 14 patches (its own 256 px are 16 x 16): teacher-cache
                extract --teacher timm:vit_base_patch16_dinov3.lvd1689m --image-size 224 --layers last
    Expected:   no number is known: neither MILAN nor DINOv3 reports this pair.
    Carried over: all of milan-b16, its settings for CLIP. DINOv3 has no projection: the decoder predicts the tokens behind its
                final norm, of CLS and of patches; masks by the CLS attention of the last block.
    Deviations: as milan-b16; nothing of the target is guided by language, which is MILAN's point.
    """
    return _variant("b16-dinov3", teachers=(DINOV3_B16,))


def milan_b16_random() -> Recipe:
    """MILAN ViT-B/16 with uniform masks: better for linear probing.

    Command:    student-train --cache CACHE --preset milan-b16-random --out RUN
    Needs:      last layer of clip-b16.
    Expected:   79.9 % linear, 400 epochs (the paper's linear probing table; not reproduced here).
    Deviations: as milan-b16.
    """
    return _variant("b16-random", mask=MaskConfig("random", 0.75))


def milan_b16_plain() -> Recipe:
    """MILAN ViT-B/16 with MAE's decoder instead of the prompting one.

    Command:    student-train --cache CACHE --preset milan-b16-plain --out RUN
    Needs:      last layer and attention of clip-b16.
    Expected:   84.1 % fine-tuned, 400 epochs (its ablation, semantic-aware sampling without prompting; not reproduced here).
    Deviations: as milan-b16.
    """
    return _variant("b16-plain", objectives=(CosineConfig(scale=2.0, predictor=PredictorConfig("self")),))


def milan_demo() -> Recipe:
    """MILAN at the size of `make demo`, under the built-in teacher, towards the tokens behind its final norm.

    Command:    student-train --cache CACHE --preset milan-demo --out RUN
    Deviations: size, schedule and learning rate are the demo's, equal for all -demo presets.
    """
    config = TrainConfig(
        preset="milan-demo", teachers=("demo",), backbone=DEMO_BACKBONE, mask=MaskConfig("attention", 0.75),
        objectives=(CosineConfig(scale=2.0, predictor=PredictorConfig("prompting", dim=48, depth=1, heads=4)),),
        optim=DEMO_OPTIM, **DEMO_TRAINING,
    )  # fmt: skip
    return Recipe(DEMO_PLAN, config)
