"""The encoders. A backbone is a file here, a config class with its `kind`, and a line in BACKBONES.

A backbone is a module `backbone(images, mask) -> Encoded` with `encode_all(images) -> [B, C+N, D]` for evaluation and
`has_cls`, whether C is 1, and `behind_blocks`, the names of its submodules that only `Encoded.tokens` goes through.
"""

from __future__ import annotations

from torch import nn

from ...config import BackboneConfig, MCMAEConfig, SwinConfig, ViTConfig
from .encoded import Encoded
from .mcmae import MCMAE
from .swin import Swin
from .vit import ViT

BACKBONES = {
    ViTConfig: ViT,
    MCMAEConfig: MCMAE,
    SwinConfig: Swin,
}


def build_backbone(config: BackboneConfig) -> nn.Module:
    """The backbone a config describes, with fresh initial weights."""
    return BACKBONES[type(config)](config)


__all__ = ["BACKBONES", "MCMAE", "Encoded", "Swin", "ViT", "build_backbone"]
