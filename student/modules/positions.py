"""Fixed sine-cosine position tables, in the two conventions of the field.

The MAE family (MAE, MILAN, MaskAlign, MR-MAE, MCMAE) has columns in the first half of the channels, MoCo v3 and CAE have rows
there. The numbers are the same, the halves swapped; loading a checkpoint with the other table is a silent error, which is why
the conventions have a file and a test of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_positions(dim: int, grid: tuple[int, int], convention: str = "mae") -> Tensor:
    """Position table float32 [1 + N, dim] for CLS (zeros) and N = rows * columns patches, row by row.

    The channels are [sin(column), cos(column), sin(row), cos(row)] for `mae` (MAE util/pos_embed.py:28,42-45) and [sin(row),
    cos(row), sin(column), cos(column)] for `moco` (MoCo v3 vits.py:53-68, CAE modeling_cae_helper.py:229-248), dim / 4 each,
    with frequencies 10000^(-k / (dim / 4)). `dim` must be a multiple of 4.
    """
    rows, columns = grid
    quarter = dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)

    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    halves = [angles.reshape(-1, 1) * frequencies for angles in (column, row)]  # each [N, dim / 4]
    if convention == "moco":
        halves.reverse()

    patches = torch.cat([wave for angles in halves for wave in (angles.sin(), angles.cos())], dim=1)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), patches]).float()
