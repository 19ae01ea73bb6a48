"""A recipe joins what only the top room may know together: teachers, a crop plan and a training configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from student.config import (
    AlignConfig,
    BackboneConfig,
    ContrastConfig,
    CosineConfig,
    MCMAEConfig,
    ObjectiveConfig,
    PredictorConfig,
    ReconstructConfig,
    SwinConfig,
    TrainConfig,
    ViTConfig,
)
from student.errors import ConfigError
from teacher_cache.format.crop_plan import CropPlan

if TYPE_CHECKING:  # it imports torch
    from student.batch import TeacherShape

TINY_IMAGE, TINY_GRID, TINY_DIM, TINY_DEPTH, TINY_HEADS = 32, 4, 48, 2, 3
TINY_MOST = 64
"""Patches a side of a miniature without teacher, at most."""


@dataclass(frozen=True)
class Recipe:
    """One preset: train `config` on crops drawn by `plan`, with targets of `config.teachers`."""

    plan: CropPlan
    config: TrainConfig
    former: Mapping[str, object] = field(default_factory=dict)
    """Settings that were corrected since runs of the preset were begun: dotted name -> JSON value before. Those runs go on so."""

    @property
    def name(self) -> str:
        return self.config.preset

    @property
    def teachers(self) -> tuple[str, ...]:
        """Empty for methods without one (MAE)."""
        return self.config.teachers

    def mismatches(self, plan: CropPlan, teachers: Sequence[str]) -> list[str]:
        """How a cache differs from what the preset was made for, a line each: its crop plan, and the teachers behind its stores.

        The seed of the plan is free. Shapes are not looked at here: the student refuses what does not fit.
        """
        here, expected = plan.to_json(), self.plan.to_json()
        lines = [
            f"crop plan {key}: {here[key]} in the cache, {expected[key]} in the preset"
            for key in here
            if key != "seed" and here[key] != expected[key]
        ]
        for found, wanted in zip(teachers, self.teachers, strict=True):
            if found != wanted:
                lines.append(f"teacher: {found} in the cache, {wanted} in the preset")
        return lines

    def tiny(self, teachers: tuple[TeacherShape, ...] = (), image_size: int = TINY_IMAGE) -> Recipe:
        """The same method in miniature, on the grid of the first teacher (or 4 x 4): narrow, 2 blocks, batch 8, 2 epochs.

        Strides, mask units and block sizes scale with the grid, so that a student still hides the same share in the same way.
        """
        config = self.config
        grid = teachers[0].grid[0] if teachers else _tiny_grid(image_size)
        is_contrast = any(isinstance(objective, ContrastConfig) for objective in config.objectives)
        dim = teachers[0].dim if is_contrast and teachers else TINY_DIM  # MimCo's student is as wide as its teacher
        levels = [o.levels for o in config.objectives if isinstance(o, AlignConfig) and o.mixing == "layer-wise"]
        depth = max([TINY_DEPTH, *levels])
        backbone = _tiny_backbone(config.backbone, image_size, image_size // grid, dim, depth)
        unit_side = max(1, config.mask.unit // config.backbone.stride)
        mask = replace(
            config.mask,
            unit=(unit_side if backbone.grid[0] % unit_side == 0 else 1) * backbone.stride,
            min_block=max(1, config.mask.min_block * backbone.n_patches // config.backbone.n_patches),
        )
        objectives = tuple(_tiny_objective(objective, backbone, config.backbone, teachers) for objective in config.objectives)
        optim = replace(config.optim, base_lr=1e-3, lr_per_256=False, min_lr=0.0, warmup_epochs=1.0)
        small = replace(config, backbone=backbone, mask=mask, objectives=objectives, optim=optim, epochs=2, batch_size=8,
                        accumulate=1)  # fmt: skip
        return replace(self, config=small)


def _tiny_grid(image_size: int) -> int:
    """Patches a side, without a teacher to say how many: the fewest from TINY_GRID on that fill the image, or fewer.

    Raises ConfigError for a size without divisors, such as 257, of which pixels would be the patches.
    """
    fitting = [side for side in range(1, TINY_MOST + 1) if image_size % side == 0]
    grid = next((side for side in fitting if side >= TINY_GRID), fitting[-1])
    if grid == 1:
        raise ConfigError(
            f"Crops of {image_size} px: no grid of 2 to {TINY_MOST} patches a side fills them. Take crops of another size, such "
            f"as {image_size // 16 * 16} px."
        )
    return grid


def _tiny_backbone(full: BackboneConfig, image_size: int, stride: int, dim: int, depth: int) -> BackboneConfig:
    if isinstance(full, ViTConfig):
        fuse = tuple(sorted({max(1, block * depth // full.depth) for block in full.fuse_blocks}))
        heads = TINY_HEADS if dim % TINY_HEADS == 0 else 2
        return replace(full, image_size=image_size, patch_size=stride, dim=dim, depth=depth, heads=heads, fuse_blocks=fuse)
    if isinstance(full, MCMAEConfig):
        last = 2 if stride % 2 == 0 else 1
        middle = 2 if stride // last % 2 == 0 else 1
        return replace(full, image_size=image_size, strides=(stride // last // middle, middle, last), dims=(16, 24, dim),
                       depths=(1, 1, depth), heads=TINY_HEADS)  # fmt: skip
    assert isinstance(full, SwinConfig)
    n_stages = 2 if stride % 2 == 0 else 1
    return replace(full, image_size=image_size, patch_size=stride // n_stages, embed_dim=dim // n_stages,
                   window=image_size // stride, depths=(1, 2)[-n_stages:], heads=(2, 2)[-n_stages:])  # fmt: skip


def _tiny_objective(
    full: ObjectiveConfig, backbone: BackboneConfig, full_backbone: BackboneConfig, teachers: tuple[TeacherShape, ...]
) -> ObjectiveConfig:
    if isinstance(full, AlignConfig) and teachers:
        return replace(full, levels=min(full.levels, teachers[full.teacher].depth))
    if isinstance(full, ReconstructConfig):
        return replace(full, decoder=_tiny_predictor(full.decoder, 32))
    if isinstance(full, CosineConfig):
        is_regressor = full.predictor.style == "regressor"
        dim = backbone.dim * full.predictor.dim // full_backbone.dim if is_regressor else 32
        return replace(full, predictor=_tiny_predictor(full.predictor, dim))
    if isinstance(full, ContrastConfig):
        return replace(full, hidden_dim=32, out_dim=16, queue=16)
    return full


def _tiny_predictor(full: PredictorConfig, dim: int) -> PredictorConfig:
    return replace(full, dim=dim, depth=min(1, full.depth), heads=4)
