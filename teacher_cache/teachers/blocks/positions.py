"""How a table of absolute positions follows another grid, by the rule that its family was published with, and is on record.

Code bases follow at least four rules, and a trained table tells them apart: the normed tokens of a DINOv2 at 224 px are off by
2.2 % under OURS and by 4.8 % under timm's (docs/teachers.md). At the native grid all are the same.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import BadInputError
from ...format.spec import TeacherSpec


@dataclass(frozen=True)
class PositionRule:
    """How a square table of patches becomes one of another grid."""

    words: str
    """`TeacherSpec.positions`, as far as it is about a table."""
    mode: str = "bicubic"
    antialias: bool = False
    offset: float = 0.0
    """Added to the grid before it is divided by the table's own to give the scale factor; 0: the size alone says it."""
    counts_patches: bool = False
    """Whether a rotation counts the patches of another grid, where timm spreads them over the native one."""

    def resize(self, table: Tensor, n_prefix: int, grid: tuple[int, int]) -> Tensor:
        """The table for `grid`; returned unchanged when its own is the same.

        table: [..., n_prefix + rows, D] with a square grid; the first `n_prefix` rows (CLS, registers) are kept as they are.
        Raises BadInputError for a table that is no square grid.
        """
        prefix, patches = table.float().split([n_prefix, table.shape[-2] - n_prefix], dim=-2)
        side = round(patches.shape[-2] ** 0.5)
        if side * side != patches.shape[-2]:
            raise BadInputError(f"The position table has {patches.shape[-2]} patch rows, which is no square grid.")
        if grid == (side, side):
            return table
        image = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)  # [1, D, rows, columns]
        how = {"mode": self.mode, "align_corners": False, "antialias": self.antialias}
        if self.offset:
            image = F.interpolate(image, scale_factor=tuple((n + self.offset) / side for n in grid), **how)
        else:
            image = F.interpolate(image, size=grid, **how)
        patches = image.permute(0, 2, 3, 1).reshape(*table.shape[:-2], grid[0] * grid[1], -1)
        return torch.cat([prefix, patches], dim=-2)


OURS = PositionRule("bicubic, align_corners=False, no antialias, in float32")
"""MaskAlign's (and Hugging Face's), the same for pixels and positions: of all families without a line below."""
_BY_FACTOR = "align_corners=False, no antialias, by the factor (grid + 0.1) / native grid, in float32"
DINOV2 = PositionRule(f"bicubic, {_BY_FACTOR}", offset=0.1)
DINOV2_REGISTERS = PositionRule("bicubic, align_corners=False, antialias, in float32", antialias=True)
TIPS = PositionRule(f"bilinear, {_BY_FACTOR}", mode="bilinear", offset=0.1)
BILINEAR = PositionRule("bilinear, align_corners=False, no antialias, in float32", mode="bilinear")
PE = PositionRule(f"{BILINEAR.words}, RoPE counts patches", mode="bilinear", counts_patches=True)
RULES = {rule.words: rule for rule in (OURS, DINOV2, DINOV2_REGISTERS, TIPS, BILINEAR, PE)}
FAMILIES = (
    ("*_reg?_dinov2", DINOV2_REGISTERS),
    ("*_dinov2", DINOV2),
    ("*_tipsv2", TIPS),
    ("vit_pe_*", PE),
    ("*_radio_v?", BILINEAR),
)
"""timm's names for architectures, as shell patterns -> the rule that this family's own code follows."""

NO_POSITIONS = "none: there is no table of absolute positions"
"""`TeacherSpec.positions` of a teacher whose blocks know them by other means, if at all."""
_AND = "; "
"""Between the rule for a table and what is said of a rotation."""


def of_family(architecture: str) -> PositionRule:
    """How the family of these weights was published to resize its table; told by timm's name for the architecture."""
    return next((rule for pattern, rule in FAMILIES if fnmatch.fnmatchcase(architecture, pattern)), OURS)


def in_words(rule: PositionRule, has_table: bool, rotation: str | None) -> str:
    """`TeacherSpec.positions`: the rule for the table, if there is one, and what the blocks rotate by, if they do."""
    table = rule.words if has_table or rotation is None else None
    if not has_table and rotation is None:
        return NO_POSITIONS
    return _AND.join(filter(None, (table, rotation)))


def as_begun(rule: PositionRule, begun: TeacherSpec | None) -> PositionRule:
    """The family's rule, or the one that is on record in a store that was begun with another: it is gone on with under that."""
    if begun is None:
        return rule
    if begun.positions is None:  # before they were on record there was one rule for all
        return OURS
    return RULES.get(begun.positions.partition(_AND)[0], rule)
