"""ViT sizes that several papers share (patch 16, 224 pixels), and newer teachers that presets name."""

from __future__ import annotations

from student.config import ViTConfig

DINOV3_B16 = "timm:vit_base_patch16_dinov3.lvd1689m"
SIGLIP2_B16 = "timm:vit_base_patch16_siglip_224.v2_webli"

VIT_S = ViTConfig(dim=384, depth=12, heads=6)
VIT_B = ViTConfig(dim=768, depth=12, heads=12)
VIT_L = ViTConfig(dim=1024, depth=24, heads=16)
