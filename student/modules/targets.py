"""What "the target" means: teacher tokens from the whitened form they come in, and pixels by the patch.

Whitened tokens z determine everything a teacher's last norm and projection would give, because that norm whitens
first: final_norm = gamma * z + beta, projection = final_norm @ P.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import TeacherHead

# B batch, N patches, D width of the teacher, E its projected width, p side of a patch in pixels


def final_norm(whitened: Tensor, head: TeacherHead) -> Tensor:
    """The last block's tokens behind the teacher's own final norm, float32 [..., D]."""
    return whitened.float() * head.gamma + head.beta


def teacher_output(whitened: Tensor, head: TeacherHead) -> Tensor:
    """The last block's tokens in the teacher's output space, float32 [..., E].

    Behind its projection where it has one (CLIP, SLIP), else behind its final norm, and E is D (DINO).
    """
    tokens = final_norm(whitened, head)
    if head.projection is None:
        return tokens
    with torch.autocast(tokens.device.type, enabled=False):  # the target does not lose digits to the student's precision
        return tokens @ head.projection


def unit_length(tokens: Tensor) -> Tensor:
    """Tokens divided by their L2 norm, float32 [..., D]."""
    return F.normalize(tokens.float(), dim=-1)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Pixels of each patch, [B, N, p * p * 3]: patches row by row, in a patch (row, column, channel)."""
    n_images, n_channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    cut = images.reshape(n_images, n_channels, rows, patch_size, columns, patch_size)
    return torch.einsum("bcipjq->bijpqc", cut).reshape(n_images, rows * columns, -1)


def normalise_patches(patches: Tensor) -> Tensor:
    """Each patch with mean 0 and variance 1 over all its values, float32 (MAE models_mae.py:204-208).

    Unbiased variance and eps 1e-6, as there.
    """
    patches = patches.float()
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=1)
    return (patches - mean) / (variance + 1e-6).sqrt()
