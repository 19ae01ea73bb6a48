"""Stored tokens back to float, on the device of the training."""

from __future__ import annotations

import torch
from torch import Tensor

# B batch, T tokens of a row, D width, G groups of channels


def dequantise(stored: Tensor, scale: Tensor, centre: Tensor, spread: Tensor, group: int, out: Tensor | None = None) -> Tensor:
    """format/quantize.py on the device: int8 [B, T, D] or, two to a byte, uint8 [B, T, ceil(D / 2)], and float16 [B, T, G] ->
    float32 [B, T, D], in `out` if it is given.

    As few passes over float32 values as can be: on a CPU or a GPU they take longer than the arithmetic.
    """
    dim = len(centre)
    if stored.dtype == torch.uint8:
        levels = torch.stack([stored & 15, stored >> 4], -1).flatten(-2)[..., :dim].view(torch.int8) - 8
    else:
        levels = stored
    if dim % group == 0:
        standardised = (levels.unflatten(-1, (-1, group)) * scale.float().unsqueeze(-1)).flatten(-2)
    else:
        standardised = levels * scale.float().repeat_interleave(group, dim=-1)[..., :dim]
    return torch.addcmul(centre, standardised, spread, out=out)
