"""Random crops of a batch on the device, all at once: the two looks at an image that a contrastive teacher learns from."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# B batch, s side of an image in pixels

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
JITTER, GREY_P, JITTER_P = 0.4, 0.2, 0.8
"""Strength of brightness, contrast and saturation; probabilities of losing all colour, and of any jitter (SimCLR's, weaker)."""
LUMA = (0.299, 0.587, 0.114)


def random_crops(images: Tensor, generator: torch.Generator, colours: bool = True) -> Tensor:
    """Random resized crops, flipped half the time, with jittered colours: float32 [B, 3, s, s] in 0..1.

    images: float32 [B, 3, s, s] in 0..1. generator: of the images' device; all that is random comes from it.
    """
    n, device = len(images), images.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(n, device=device).uniform_(low, high, generator=generator)

    area, ratio = uniform(*SCALE), uniform(*map(math.log, RATIO)).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)  # shares of the side
    sign = uniform(-1, 1).sign()
    zero = torch.zeros_like(width)
    rows = [width * sign, zero, uniform(-1, 1) * (1 - width), zero, height, uniform(-1, 1) * (1 - height)]
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), list(images.shape), align_corners=False)
    crops = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return _jittered(crops, uniform) if colours else crops


def _jittered(crops: Tensor, uniform) -> Tensor:
    luma = torch.tensor(LUMA, device=crops.device).view(3, 1, 1)
    some = (uniform(0, 1) < JITTER_P).float()

    def strength() -> Tensor:
        return (1 + some * uniform(-JITTER, JITTER)).view(-1, 1, 1, 1)

    crops = crops * strength()
    crops = crops.mean((1, 2, 3), keepdim=True).lerp(crops, strength())
    grey = (crops * luma).sum(1, keepdim=True)
    kept = strength() * (uniform(0, 1) >= GREY_P).float().view(-1, 1, 1, 1)
    return grey.lerp(crops, kept).clamp(0, 1)
