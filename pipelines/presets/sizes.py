"""ViT sizes that several papers share (patch 16, 224 pixels)."""

from __future__ import annotations

from student.config import ViTConfig

VIT_S = ViTConfig(dim=384, depth=12, heads=6)
VIT_B = ViTConfig(dim=768, depth=12, heads=12)
VIT_L = ViTConfig(dim=1024, depth=24, heads=16)
