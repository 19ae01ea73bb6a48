"""What the ViTs of DINO, MoCo v3, SLIP and MAE share: timm's blocks and names, an official file with a layout of its
own.

Without their wrappers, these files have the same names and shapes, and each would load as any other of its size; MoCo
v3's ViT-S and DINO's differ in nothing but their heads, which no file tells. Their position tables do differ: MAE's
and MoCo v3's are two fixed sine-cosine tables, DINO's and SLIP's are learned. So the table in the file, which is
loaded and never made anew, also says whose file it is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import BadInputError
from . import TeacherEntry
from .base import Teacher, check_precision
from .timm_vit import as_teacher, at_image_size, build_vit
from .weights.load import Layout, is_random, load_weights, require_weights

LEARNED = "learned"
COLUMNS_FIRST = "MAE's fixed one (sine and cosine of the column, then of the row)"
ROWS_FIRST = "MoCo v3's fixed one (sine and cosine of the row, then of the column)"


def load_published(
    entry: TeacherEntry,
    weights: str | os.PathLike | None,
    image_size: int | None = None,
    device: str = "cpu",
    precision: str = "fp32",
    *,
    layouts: Sequence[Layout],
    positions: str,
) -> Teacher:
    """The teacher of one line of the table, from one of its official layouts; see `load_teacher`.

    layouts, positions: bound by the module of each family, to make its own `load`; positions is the kind of its position
      table: LEARNED, COLUMNS_FIRST or ROWS_FIRST
    Raises BadInputError for a file that does not fit, also where only the position table shows it.
    """
    check_precision(precision, device)
    weights = require_weights(entry, weights)
    model = build_vit(entry, weight_init="skip")
    if entry.projection_dim:
        model.projection = nn.Parameter(torch.empty(entry.dim, entry.projection_dim))  # as a name to fill; forward ignores it
    loaded = load_weights(model, weights, layouts, entry.pickled)
    found = positions if is_random(weights) else kind_of_positions(model.pos_embed.detach())
    if found != positions:
        raise BadInputError(
            f"--weights {weights} is another teacher's file: its names and shapes fit {entry.name}, but its position table is "
            f"{found}, and should be {positions}. Heads and normalisation may differ too, and no file tells those. "
            "Give the file published for this teacher (`teacher-cache teachers` names it)."
        )
    at_image_size(model, entry.name, image_size or entry.image_size)
    projection = model.projection if entry.projection_dim else None
    return as_teacher(entry.name, model, loaded, entry.mean, entry.std, device, precision, projection)


def kind_of_positions(table: Tensor) -> str:
    """What kind of table [1, 1 + side * side, D] this is, to within what half precision leaves of it."""
    side = round((table.shape[1] - 1) ** 0.5)
    for kind in (COLUMNS_FIRST, ROWS_FIRST):
        if torch.allclose(table, fixed_positions(side, table.shape[2], kind), atol=1e-2):
            return kind
    return LEARNED


def fixed_positions(side: int, dim: int, kind: str) -> Tensor:
    """The table [1, 1 + side * side, dim] of a square grid: zeros for CLS; sin, cos of one coordinate, then of the other."""
    frequencies = 10_000 ** -(torch.arange(dim // 4) / (dim // 4))
    angles = torch.arange(side)[:, None] * frequencies  # [side, dim / 4]
    coordinate = torch.cat([angles.sin(), angles.cos()], 1)  # [side, dim / 2]
    rows, columns = coordinate.repeat_interleave(side, 0), coordinate.repeat(side, 1)  # [side * side, dim / 2]
    halves = [columns, rows] if kind == COLUMNS_FIRST else [rows, columns]
    return torch.cat([torch.zeros(1, dim), torch.cat(halves, 1)])[None]
