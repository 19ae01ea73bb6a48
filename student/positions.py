"""The fixed sine-cosine position table of the MAE family (MAE, MILAN, MaskAlign, MR-MAE).

MoCo v3 and CAE use the same numbers with the two halves of the channel axis swapped; loading a checkpoint with the other
table is a silent error, which is why the convention has a file and a test of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """Position table float32 [1 + N, dim] for CLS (zeros) and N = rows * columns patches, row by row.

    The channels are [sin(column), cos(column), sin(row), cos(row)], dim / 4 each, with frequencies
    10000^(-k / (dim / 4)) (MAE util/pos_embed.py:28,42-45). `dim` must be a multiple of 4.
    """
    rows, columns = grid
    quarter = dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)

    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    column_angles = column.reshape(-1, 1) * frequencies  # [N, dim / 4]
    row_angles = row.reshape(-1, 1) * frequencies

    patches = torch.cat([column_angles.sin(), column_angles.cos(), row_angles.sin(), row_angles.cos()], dim=1)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), patches]).float()
