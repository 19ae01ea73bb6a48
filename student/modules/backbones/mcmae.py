"""MCMAE's backbone: two masked-convolution stages, then ViT blocks over the visible tokens (MCMAE models_convmae.py).

A depthwise convolution is the only operation that mixes positions before hidden patches are dropped, and its input is
multiplied by the mask, so nothing of a hidden patch reaches a visible one. With the CLS token of version 2 (MR-MCMAE).

Names in public code (prefix or name there -> here): `patch_embed{1,2,3}.{proj,norm}` -> `embeds.{0,1,2}.{proj,norm}`,
`blocks1`, `blocks2` -> `stages.0`, `stages.1`, in each `conv1, attn, conv2` -> `conv1, depthwise, conv2`, `patch_embed4` ->
`project`, `blocks3` -> `blocks`, `stage1_output_decode`, `stage2_output_decode` -> `fuse.0`, `fuse.1`; `norm`, `pos_embed` (there
without a row for CLS) and `cls_token` are the same.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ...batch import Mask, take
from ...config import MCMAEConfig
from ..initial_weights import init_linear_and_norm
from ..positions import sincos_positions
from .encoded import Encoded

# B batch, N patches, D width of the last stage; h, w rows and columns of a stage, d its width


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, d, h, w]; eps 1e-5."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Embed(nn.Module):
    """A strided convolution, a norm and GELU: [B, c, h, w] -> [B, d, h/s, w/s] (MCMAE vision_transformer.py:174-196)."""

    def __init__(self, channels: int, dim: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, stride, stride)
        self.norm = ChannelNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(self.proj(x)))


class ConvMlp(nn.Module):
    """Two 1 x 1 convolutions with GELU between them."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(dim, hidden_dim, 1), nn.Conv2d(hidden_dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class MaskedConvBlock(nn.Module):
    """x + conv2(depthwise(visible * conv1(norm1(x)))), then x + mlp(norm2(x)) (MCMAE vision_transformer.py:101-123)."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(dim), ChannelNorm(dim)
        self.conv1, self.conv2 = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.depthwise = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.drop_path1, self.drop_path2 = DropPath(drop_path), DropPath(drop_path)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """x [B, d, h, w]; visible [B, 1, h, w], 1 where a position may be seen."""
        x = x + self.drop_path1(self.conv2(self.depthwise(visible * self.conv1(self.norm1(x)))))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class MCMAE(nn.Module):
    """Masked-convolution stages, then a ViT with CLS and MAE's positions; `layers` of its output are the ViT blocks'."""

    has_cls = True
    behind_blocks = ("norm", "fuse")

    def __init__(self, config: MCMAEConfig):
        super().__init__()
        self.grid = config.grid
        last = sum(config.depths) - 1
        rates = [config.drop_path * block / max(1, last) for block in range(last + 1)]
        conv_dims = config.dims[:2]

        channels = (3, *conv_dims)
        self.embeds = nn.ModuleList(Embed(*sizes) for sizes in zip(channels, config.dims, config.strides, strict=True))
        self.stages = nn.ModuleList(
            nn.ModuleList(MaskedConvBlock(dim, config.mlp_ratio, rates.pop(0)) for _ in range(depth))
            for dim, depth in zip(conv_dims, config.depths, strict=False)
        )
        self.project = nn.Linear(config.dim, config.dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim))
        self.pos_embed = nn.Parameter(sincos_positions(config.dim, config.grid)[None], requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(config.dim, config.heads, config.mlp_ratio, qkv_bias=True, drop_path=rate) for rate in rates
        )
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        # From a stage to the grid of the last one: the product of the strides that follow it.
        strides = [math.prod(config.strides[stage + 1 :]) for stage in range(2)] if config.fuse_stages else []
        self.fuse = nn.ModuleList(nn.Conv2d(dim, config.dim, s, s) for dim, s in zip(conv_dims, strides, strict=False))

        # Convolutions other than the last embedding keep torch's own initial weights, as there (models_convmae.py:84-86).
        init_linear_and_norm(self)
        nn.init.xavier_uniform_(self.embeds[-1].proj.weight.view(config.dim, -1))
        nn.init.normal_(self.cls_token, std=0.02)

    def forward(self, images: Tensor, mask: Mask) -> Encoded:
        """Encode CLS and the visible patches of images [B, 3, H, W]."""
        visible = (~mask.is_hidden).to(images.dtype).unflatten(1, self.grid)[:, None]  # [B, 1, rows, columns]
        patches, stages = self._convolve(images, visible)
        tokens, layers = self._attend(take(patches, mask.keep))

        fused = tokens
        for convolution, stage in zip(self.fuse, stages, strict=False):
            added = take(convolution(stage).flatten(2).transpose(1, 2), mask.keep)  # [B, n_keep, D]
            fused = fused + F.pad(added, (0, 0, 1, 0))  # nothing is added to CLS
        return Encoded(tokens=self.norm(fused), layers=layers)

    def encode_all(self, images: Tensor) -> Tensor:
        """All tokens [B, 1+N, D] after the last block and the final norm, for evaluation: nothing hidden, no stage fused
        (MCMAE models_convvit.py:29-50)."""
        patches, _ = self._convolve(images, images.new_ones(len(images), 1, *self.grid))
        return self.norm(self._attend(patches)[0])

    def _convolve(self, images: Tensor, visible: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Patches with positions [B, N, D] and the outputs of both convolution stages, from visible [B, 1, rows, columns]."""
        x, stages = images, []
        for embed, blocks in zip(self.embeds, self.stages, strict=False):
            x = embed(x)
            seen = visible.repeat_interleave(x.shape[2] // self.grid[0], 2).repeat_interleave(x.shape[3] // self.grid[1], 3)
            for block in blocks:
                x = block(x, seen)
            stages.append(x)
        x = self.embeds[-1](x).flatten(2).transpose(1, 2)  # [B, N, D]
        return self.project(x) + self.pos_embed[:, 1:], stages

    def _attend(self, patches: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output of the last block and of all blocks, each [B, 1+n, D], from patches [B, n, D]."""
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(patches), -1, -1)
        tokens, layers = torch.cat([cls, patches], dim=1), []
        for block in self.blocks:
            tokens = block(tokens)
            layers.append(tokens)
        return tokens, tuple(layers)
