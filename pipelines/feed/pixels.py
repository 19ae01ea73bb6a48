"""Pixels as a student gets them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from student.modules.pixels import PIXEL_MEAN, PIXEL_STD

# B batch


def normalise(images_u8: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W], by ImageNet's mean and standard deviation."""
    mean, std = _mean_and_std(images_u8.device)
    return (images_u8.permute(0, 3, 1, 2).float() / 255 - mean) / std


@functools.cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(values, device=device).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
