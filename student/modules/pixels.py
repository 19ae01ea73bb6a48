"""What the pixels of a student are normalised by."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of RGB in 0..1: as in all six methods' pre-training."""

PIXELS = {"mean": list(PIXEL_MEAN), "std": list(PIXEL_STD)}
"""The same as a run's records have it."""

# B batch


def normalise(images_u8: Tensor, mean: Sequence[float] = PIXEL_MEAN, std: Sequence[float] = PIXEL_STD) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W], by a mean and standard deviation of RGB in 0..1: ImageNet's unless given."""
    mean_of, std_of = _mean_and_std(images_u8.device, tuple(mean), tuple(std))
    return (images_u8.permute(0, 3, 1, 2).float() / 255 - mean_of) / std_of


@functools.cache
def _mean_and_std(device: torch.device, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))
