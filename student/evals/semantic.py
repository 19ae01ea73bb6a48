"""Semantic-aware probing (MILAN, section 4.4): the encoder sees only those patches that a teacher attends to most."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from .subject import Subject

# B batch, N patches, n of them kept

SHARE = 0.5
"""Of the patches, in training and in the test: the paper's (its code keeps .7)."""


def most_attended(attention: Tensor, share: float = SHARE) -> Tensor:
    """int64 [B, n]: the n = int(share * N) patches, one at least, of the highest attention [B, N], in their own order."""
    n = max(1, int(share * attention.shape[1]))
    return attention.topk(n, dim=1).indices.sort(dim=1).values


def seeing_most_attended(subject: Subject, teacher: Subject, share: float = SHARE) -> Callable[[Tensor], Tensor]:
    """From images, normalised for `subject`, to its tokens [B, C+n, D] of the patches that `teacher` attends to most.

    Raises ConfigError for teachers with another grid.
    """
    if tuple(teacher.encoder.grid) != tuple(subject.encoder.grid):
        raise ConfigError(
            f"{teacher.name} attends over {teacher.encoder.grid} patches, {subject.name} has {subject.encoder.grid}. Give a "
            "--teacher of the same grid."
        )

    def encode(images: Tensor) -> Tensor:
        return subject.encode_kept(images, most_attended(teacher.attention(renormalised(images, subject, teacher)), share))

    return encode


def renormalised(images: Tensor, of: Subject, to: Subject) -> Tensor:
    """Images [B, 3, H, W] normalised for one subject, as another one wants them; its size too, bicubically."""
    mean, std, new_mean, new_std = (
        torch.tensor(v, device=images.device).view(3, 1, 1) for v in (of.mean, of.std, to.mean, to.std)
    )
    pixels = images.float() * std + mean
    if images.shape[-1] != to.image_size:
        pixels = F.interpolate(pixels, (to.image_size, to.image_size), mode="bicubic", align_corners=False)
    return (pixels - new_mean) / new_std
