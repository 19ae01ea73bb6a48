"""The student's encoder: timm's VisionTransformer, fed with the visible patches only.

It is a subclass without parameters of its own, so `backbone.state_dict()` is a timm checkpoint as it stands and loads
strictly into `timm.create_model(..., num_classes=0)` of the same size; there is nothing to export or to rename.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .config import BackboneConfig
from .initial_weights import init_linear_and_norm
from .masking import Mask, take
from .positions import sincos_positions

# B batch, N patches, D width


@dataclass(frozen=True)
class Encoded:
    """What the encoder made of the visible patches; row 0 of the token axis is CLS."""

    tokens: Tensor  # [B, 1+n_keep, D], final norm of the last block or of the sum of the fused blocks
    layers: tuple[Tensor, ...]  # each [B, 1+n_keep, D]: the output of every block, before any norm


class Backbone(VisionTransformer):
    """A ViT with MAE's fixed positions and initial weights; LayerNorm eps 1e-6, CLS token, no classifier.

    `forward_features(images)` stays timm's own; `forward(images, mask)` is the masked pass of pre-training.
    """

    def __init__(self, config: BackboneConfig):
        super().__init__(
            img_size=config.image_size,
            patch_size=config.patch_size,
            num_classes=0,
            embed_dim=config.dim,
            depth=config.depth,
            num_heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            drop_path_rate=config.drop_path,
            weight_init="skip",
        )
        self.fuse_blocks = config.fuse_blocks or (config.depth,)

        # A frozen parameter rather than a buffer: timm has it as a parameter, and the names must agree.
        self.pos_embed = nn.Parameter(sincos_positions(config.dim, config.grid)[None], requires_grad=False)
        init_linear_and_norm(self)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(config.dim, -1))  # as a Linear over pixels
        nn.init.normal_(self.cls_token, std=0.02)

    def forward(self, images: Tensor, mask: Mask) -> Encoded:
        """Encode CLS and the visible patches of images [B, 3, H, W]."""
        patches = self.patch_embed(images) + self.pos_embed[:, 1:]  # [B, N, D]
        visible = take(patches, mask.keep)  # [B, n_keep, D]

        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        tokens = torch.cat([cls, visible], dim=1)  # [B, 1+n_keep, D]

        layers = []
        for block in self.blocks:
            tokens = block(tokens)
            layers.append(tokens)

        fused = sum(layers[number - 1] for number in self.fuse_blocks)
        return Encoded(tokens=self.norm(fused), layers=tuple(layers))

    def encode_all(self, images: Tensor) -> Tensor:
        """All tokens [B, 1+N, D] after the last block and the final norm, for evaluation: exactly what timm gives.

        `fuse_blocks` plays no part here: fusion belongs to pre-training, downstream the last block is used
        (MR-MAE, P000:77). Call `eval()` first, or drop path will be at work.
        """
        return self.forward_features(images)
