"""From visible tokens to a token for every patch.

`Decoder` is MAE's. Its steps are methods of their own because the prompting decoder of MILAN and the latent regressor of
CAE v2 differ in the middle one alone: `place` puts visible and mask tokens on the grid, the blocks mix them, `norm` ends.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .initial_weights import init_linear_and_norm
from .masking import Mask, take
from .positions import sincos_positions

# B batch, N patches, D width of the decoder


class Decoder(nn.Module):
    """Self-attention over visible and mask tokens together (MAE models_mae.py:45-58, :172-195)."""

    def __init__(self, encoder_dim: int, grid: tuple[int, int], dim: int, depth: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.register_buffer("positions", sincos_positions(dim, grid)[None], persistent=False)
        self.blocks = nn.Sequential(*[Block(dim, heads, mlp_ratio, qkv_bias=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)

        init_linear_and_norm(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, mask: Mask) -> Tensor:
        """Predicted tokens [B, 1+N, D], CLS first and patches row by row, from encoder tokens [B, 1+n_keep, C]."""
        return self.norm(self.blocks(self.place(tokens, mask)))

    def place(self, tokens: Tensor, mask: Mask) -> Tensor:
        """CLS, visible tokens and mask tokens at their places, with positions: [B, 1+N, D]."""
        tokens = self.embed(tokens)  # [B, 1+n_keep, D]
        cls, visible = tokens[:, :1], tokens[:, 1:]

        hidden = self.mask_token.expand(*mask.drop.shape, -1)  # [B, n_drop, D]
        patches = take(torch.cat([visible, hidden], dim=1), mask.restore)  # [B, N, D]
        return torch.cat([cls, patches], dim=1) + self.positions
