"""A plain ViT: timm's VisionTransformer, fed with the visible patches, or with mask tokens in place of hidden ones.

It is a subclass whose parameters are timm's, so `state_dict()` is a timm checkpoint as it stands and loads strictly into
`timm.create_model(..., num_classes=0)` of the same size; only where `hidden` is "mask-token" there is one more, `mask_token`.

Names in public code: MAE, MILAN and MaskAlign have the same. CAE has `blocks.i.gamma_1`, `gamma_2` for `ls1.gamma`, `ls2.gamma`,
and `attn.q_bias`, `attn.v_bias` for the outer thirds of `attn.qkv.bias`, whose middle third, the bias of keys, is zero there:
softmax does not see a bias on keys, which adds the same to all logits of a query.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ...batch import Mask, take
from ...config import ViTConfig
from ..initial_weights import init_linear_and_norm, init_narrow
from ..positions import sincos_positions
from .encoded import Encoded

# B batch, N patches, D width


class ViT(VisionTransformer):
    """A ViT with fixed positions and a CLS token; LayerNorm eps 1e-6, no classifier.

    `forward_features(images)` stays timm's own; `forward(images, mask)` is the masked pass of pre-training.
    """

    has_cls = True
    behind_blocks = ("norm",)
    no_decay = frozenset({"mask_token"})  # SimMIM optimizer.py:47-66

    def __init__(self, config: ViTConfig):
        super().__init__(
            img_size=config.image_size,
            patch_size=config.patch_size,
            num_classes=0,
            embed_dim=config.dim,
            depth=config.depth,
            num_heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            drop_path_rate=config.drop_path,
            init_values=config.layer_scale,
            weight_init="skip",
        )
        self.fuse_blocks = config.fuse_blocks or (config.depth,)
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.dim)) if config.hidden == "mask-token" else None

        # A frozen parameter rather than a buffer: timm has it as a parameter, and the names must agree.
        table = sincos_positions(config.dim, config.grid, config.positions)
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)
        init_linear_and_norm(self)
        if config.init == "cae":  # modeling_cae_helper.py:9-10, 266-269
            init_narrow(self.patch_embed.proj.weight)
            nn.init.zeros_(self.patch_embed.proj.bias)
            init_narrow(self.cls_token)
        else:
            nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(config.dim, -1))  # as a Linear over pixels
            nn.init.normal_(self.cls_token, std=0.02)
        if self.mask_token is not None:
            nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, mask: Mask) -> Encoded:
        """Encode images [B, 3, H, W]: CLS and the visible patches, or all patches where mask tokens stand for hidden ones."""
        patches = self.patch_embed(images)  # [B, N, D]
        if self.mask_token is None:
            patches = take(patches + self.pos_embed[:, 1:], mask.keep)  # [B, n_keep, D]
        else:
            patches = torch.where(mask.is_hidden[..., None], self.mask_token.to(patches.dtype), patches) + self.pos_embed[:, 1:]

        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        tokens = torch.cat([cls, patches], dim=1)  # [B, 1+n, D]

        layers = []
        for block in self.blocks:
            tokens = block(tokens)
            layers.append(tokens)

        fused = sum(layers[number - 1] for number in self.fuse_blocks)
        return Encoded(tokens=self.norm(fused), layers=tuple(layers))

    def encode_all(self, images: Tensor) -> Tensor:
        """All tokens [B, 1+N, D] after the last block and the final norm, for evaluation: exactly what timm gives.

        `fuse_blocks` plays no part here: fusion belongs to pre-training, downstream the last block is used
        (MR-MAE, "multi-layer fusion"). Call `eval()` first, or drop path will be at work.
        """
        return self.forward_features(images)
