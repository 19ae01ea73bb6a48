"""What every masker is, and the noise that all of them draw from."""

from __future__ import annotations

import functools
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch, Mask, Needs
from ..seeds import position_seed

# B batch, N patches


@functools.lru_cache(maxsize=2)  # a step may be cut into many micro-batches
def draw_noise(seed: int, step: int, n_rows: int, n_patches: int) -> Tensor:
    """The noise of one step: float32 [n_rows, n_patches] in (0, 1), on the CPU, for the whole global batch. Not to be changed."""
    generator = torch.Generator().manual_seed(position_seed("mask", seed, step))
    noise = torch.rand(n_rows, n_patches, generator=generator)  # [0, 1), in steps of 2^-24
    np.maximum(noise.numpy(), 2.0**-25, out=noise.numpy())  # not by torch's threads: see ahead.py
    return noise


class Masker(Protocol):
    """Draws a mask; `needs` says what of the first teacher it looks at."""

    needs: Needs

    def __call__(self, batch: Batch, noise: Tensor) -> Mask:
        """The mask of a batch, on the device of its images. noise: float32 [B, N] in (0, 1), on any device."""
        ...
