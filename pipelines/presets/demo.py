"""What the -demo presets have in common, so that they differ in their method alone."""

from __future__ import annotations

from student.config import OptimConfig, PredictorConfig, ReconstructConfig, ViTConfig
from teacher_cache.format.crop_plan import CropPlan

DEMO_PLAN = CropPlan(size=32, scale=(0.5, 1.0), flip_p=0.0)
"""Digits: mild crops, and no flip, which would turn some into other signs."""
DEMO_BACKBONE = ViTConfig(image_size=32, patch_size=4, dim=64, depth=6, heads=4)
"""The demo teacher's own size."""
DEMO_DECODER = ReconstructConfig(decoder=PredictorConfig(dim=48, depth=1, heads=4))
DEMO_OPTIM = OptimConfig(base_lr=4e-3, betas=(0.9, 0.95), weight_decay=0.05, warmup_epochs=1.0)
DEMO_TRAINING = {"epochs": 12, "batch_size": 64}
