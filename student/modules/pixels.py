"""What the pixels of a student are normalised by."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of RGB in 0..1: as in all six methods' pre-training."""

PIXELS = {"mean": list(PIXEL_MEAN), "std": list(PIXEL_STD)}
"""The same as a run's records have it."""

# B batch


def normalise(images_u8: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W], by ImageNet's mean and standard deviation."""
    mean, std = _mean_and_std(images_u8.device)
    return (images_u8.permute(0, 3, 1, 2).float() / 255 - mean) / std


@functools.cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(values, device=device).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
