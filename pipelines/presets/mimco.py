"""MimCo (Zhou et al., MimCo: Masked Image Modeling Pre-training with Contrastive Teacher, 2022).

No public code was found. Masks and mask tokens follow SimMIM, heads and queues MoBY, which is what the paper says it does.
"""

from __future__ import annotations

from dataclasses import replace

from student.config import BackboneConfig, ContrastConfig, MaskConfig, OptimConfig, SwinConfig, TrainConfig
from teacher_cache.format.crop_plan import CropPlan

from .demo import DEMO_BACKBONE, DEMO_OPTIM, DEMO_PLAN, DEMO_TRAINING
from .recipe import Recipe
from .sizes import VIT_B, VIT_S


def _mimco(preset: str, teacher: str, backbone: BackboneConfig) -> Recipe:
    config = TrainConfig(
        preset=preset,
        teachers=(teacher,),
        backbone=backbone,
        mask=MaskConfig("unit", 0.6),
        objectives=(ContrastConfig(),),
        # 1e-3 for 512 crops; betas, clip and law are SimMIM's, first and last rate its 5e-7 and 5e-6 for 512 crops (config.py)
        optim=OptimConfig(base_lr=5e-4, betas=(0.9, 0.999), weight_decay=0.05, warmup_epochs=10.0, warmup_start=2e-6,
                          min_lr=2e-5, clip_grad=5.0, schedule="simmim"),
        epochs=100,
        batch_size=2048,
    )  # fmt: skip
    return Recipe(CropPlan(scale=(0.67, 1.0), resample="bilinear"), config)


def mimco_b16() -> Recipe:
    """MimCo ViT-B/16 under MoCo v3 ViT-B/16: InfoNCE of hidden patches and of the image against the frozen teacher.

    Command:    student-train --cache CACHE --preset mimco-b16 --out RUN
    Crops:      random resized, scale .67 to 1, bilinear, flip.
    Needs:      last layer of moco-v3-b16: teacher-cache extract --preset mimco-b16 --teacher moco-v3-b16 --layers last
    Expected:   83.7 % fine-tuned at 100 epochs, 83.89 % at 300 (the paper's comparison on ImageNet-1K; not reproduced here).
    Silent in the paper, followed here: 1 x 1 convolutions with batch norm at MoBY's widths; key projector with momentum .99 to 1;
                the teacher's online branch, behind its final norm; patch queue of one re-normalised mean key an image; both
                losses weigh 1; the student has the teacher's architecture, drop path .1 (SimMIM's ViT), MAE's initial weights;
                betas, clip, first and last rate and the law between them are SimMIM's; CLS decays.
    Deviations: each crop is seen epochs / views times, the paper draws a new one every epoch.
    """
    return _mimco("mimco-b16", "moco-v3-b16", replace(VIT_B, hidden="mask-token", positions="moco", drop_path=0.1))


def mimco_s16() -> Recipe:
    """MimCo ViT-S/16 (12 heads, as MoCo v3's) under MoCo v3 ViT-S/16.

    Command:    student-train --cache CACHE --preset mimco-s16 --out RUN
    Needs:      last layer of moco-v3-s16.
    Expected:   82.53 % fine-tuned at 100 epochs, 82.7 % at 300 (the paper's comparison on ImageNet-1K; not reproduced here).
    Deviations: as mimco-b16.
    """
    backbone = replace(VIT_S, heads=12, hidden="mask-token", positions="moco", drop_path=0.1)
    return _mimco("mimco-s16", "moco-v3-s16", backbone)


def mimco_swin_t() -> Recipe:
    """MimCo Swin-T under MoBY Swin-T.

    Command:    student-train --cache CACHE --preset mimco-swin-t --out RUN
    Needs:      last layer of moby-swin-t: teacher-cache extract --preset mimco-swin-t --teacher moby-swin-t --layers last
    Expected:   81.66 % fine-tuned at 100 epochs, 81.86 % at 300 (the paper's comparison on ImageNet-1K; not reproduced here).
    Deviations: as mimco-b16; no drop path (SimMIM's Swin).
    """
    return _mimco("mimco-swin-t", "moby-swin-t", SwinConfig())


def mimco_swin_b() -> Recipe:
    """MimCo Swin-B under MoBY Swin-B, whose weights were never published: train it with MoBY's code first.

    Command:    student-train --cache CACHE --preset mimco-swin-b --out RUN
    Needs:      last layer of moby-swin-b.
    Expected:   84.04 % fine-tuned at 100 epochs, 84.3 % at 300 (the paper's comparison on ImageNet-1K; not reproduced here).
    Deviations: as mimco-swin-t.
    """
    return _mimco("mimco-swin-b", "moby-swin-b", SwinConfig(embed_dim=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32)))


def mimco_demo() -> Recipe:
    """MimCo at the size of `make demo`, under the built-in teacher.

    Command:    student-train --cache CACHE --preset mimco-demo --out RUN
    Deviations: size, schedule and learning rate are the demo's, equal for all -demo presets; units of 2 x 2 patches, as at full
                size; no drop path; heads and queues as much smaller as the student is.
    """
    config = TrainConfig(
        preset="mimco-demo", teachers=("demo",), backbone=replace(DEMO_BACKBONE, hidden="mask-token", positions="moco"),
        mask=MaskConfig("unit", 0.6, unit=8), objectives=(ContrastConfig(hidden_dim=256, out_dim=64, queue=1024),),
        optim=DEMO_OPTIM, **DEMO_TRAINING,
    )  # fmt: skip
    return Recipe(DEMO_PLAN, config)
