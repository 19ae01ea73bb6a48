"""A recipe joins what only the top room may know together: a teacher, a crop plan and a training configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace

from student.config import ReconstructConfig, TrainConfig
from teacher_cache.crops import CropPlan

TINY_DIM, TINY_DEPTH, TINY_HEADS = 48, 2, 3


@dataclass(frozen=True)
class Recipe:
    """One preset: train `config` on crops drawn by `plan`, with targets of `teacher`."""

    plan: CropPlan
    config: TrainConfig

    @property
    def name(self) -> str:
        return self.config.preset

    @property
    def teacher(self) -> str | None:
        """None for methods without one (MAE)."""
        return self.config.teacher

    def tiny(self) -> Recipe:
        """The same method, small enough for a laptop: 2 narrow blocks, batch 8, 2 epochs, the preset's own grid and masks."""
        config = self.config
        fuse = tuple(sorted({max(1, block * TINY_DEPTH // config.backbone.depth) for block in config.backbone.fuse_blocks}))
        backbone = replace(config.backbone, dim=TINY_DIM, depth=TINY_DEPTH, heads=TINY_HEADS, fuse_blocks=fuse)
        objectives = tuple(
            replace(objective, dim=32, depth=1, heads=4) if isinstance(objective, ReconstructConfig) else objective
            for objective in config.objectives
        )
        optim = replace(config.optim, base_lr=1e-3, lr_per_256=False, min_lr=0.0, warmup_epochs=1.0)
        return replace(self, config=replace(config, backbone=backbone, objectives=objectives, optim=optim, epochs=2, batch_size=8,
                                            accumulate=1))  # fmt: skip
