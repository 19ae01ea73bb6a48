"""Swin with mask tokens in place of hidden patches: timm's SwinTransformer as SimMIM masks it.

Its parameters are timm's and one more, `mask_token`. Names in public code (SimMIM, MoBY): the same behind `encoder.`, but
`layers.i.downsample` there is `layers.{i+1}.downsample` here, and the buffers `attn_mask` and `relative_position_index` are made
anew.
"""

from __future__ import annotations

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from ...batch import Mask
from ...config import SwinConfig
from .encoded import Encoded

# B batch, N tokens of the last stage, D their width


class Swin(SwinTransformer):
    """Swin without a classifier; tokens are those of its last stage, row by row, without CLS. LayerNorm eps 1e-5."""

    has_cls = False
    behind_blocks = ("norm",)

    def __init__(self, config: SwinConfig):
        super().__init__(
            img_size=config.image_size,
            patch_size=config.patch_size,
            num_classes=0,
            embed_dim=config.embed_dim,
            depths=config.depths,
            num_heads=config.heads,
            window_size=config.window,
            mlp_ratio=config.mlp_ratio,
            drop_path_rate=config.drop_path,
        )
        self.grid = config.grid
        self.mask_token = nn.Parameter(torch.empty(1, 1, 1, config.embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        tables = [name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")]
        self.no_decay = frozenset({"mask_token", *tables})  # SimMIM optimizer.py:47-66

    def forward(self, images: Tensor, mask: Mask) -> Encoded:
        """Encode images [B, 3, H, W]; the mask token replaces embedded patches that are hidden (SimMIM simmim.py:28-36)."""
        patches = self.patch_embed(images)  # [B, rows, columns, width of the first stage]
        scale = patches.shape[1] // self.grid[0]
        hidden = mask.is_hidden.unflatten(1, self.grid).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        return self._encode(torch.where(hidden[..., None], self.mask_token.to(patches.dtype), patches))

    def encode_all(self, images: Tensor) -> Tensor:
        """All tokens [B, N, D] behind the final norm, for evaluation."""
        return self._encode(self.patch_embed(images)).tokens

    def _encode(self, x: Tensor) -> Encoded:
        for stage in self.layers[:-1]:
            x = stage(x)
        x, layers = self.layers[-1].downsample(x), []
        for block in self.layers[-1].blocks:
            x = block(x)
            layers.append(x.flatten(1, 2))
        return Encoded(tokens=self.norm(x).flatten(1, 2), layers=tuple(layers), has_cls=False)
