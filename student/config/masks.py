"""Which patches a student sees."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .backbones import BackboneConfig
from .section import Section, require, require_positive


@dataclass(frozen=True)
class MaskConfig(Section):
    """The law by which patches are hidden, on the grid of the backbone's output tokens."""

    kind: Literal["random", "attention", "attention-top", "block", "unit"] = "random"
    """random: uniform. attention: drawn by the teacher's attention. attention-top: always its most salient. block: hidden in
    rectangles, to an exact count (CAE). unit: uniform over square units of several patches (SimMIM)."""
    ratio: float = 0.75
    """Share of the patches, or units, that is hidden."""
    min_block: int = 16
    """Smallest rectangle, patches; `block` only."""
    unit: int = 32
    """Side of a unit, pixels; `unit` only."""

    def validate(self):
        require(0 <= self.ratio < 1, f"mask.ratio must be in 0..1, below 1, not {self.ratio}.")
        require_positive(self, "mask", "min_block", "unit")

    def validate_with(self, backbone: BackboneConfig) -> None:
        """Raise ConfigError where the mask does not fit the backbone's grid."""
        if self.kind == "unit":
            fits = self.unit % backbone.stride == 0 and backbone.image_size % self.unit == 0
            require(
                fits,
                f"mask.unit={self.unit} must be a multiple of the {backbone.stride} pixels of a token and divide the "
                f"{backbone.image_size} pixels of the image.",
            )
        n_drop = backbone.n_patches - self.n_keep(backbone)
        require(n_drop < backbone.n_patches, f"mask.ratio={self.ratio} hides all {backbone.n_patches} patches.")
        if self.kind == "block" and n_drop:
            rows, columns = backbone.grid  # a rectangle's sides are below these, and rounded
            require(
                min(self.min_block, n_drop) < (rows - 0.5) * (columns - 0.5),
                f"mask.min_block={self.min_block}: on {rows} x {columns} patches, {n_drop} of which are to be hidden, no "
                "rectangle of so many leaves a row and a column free. Lower mask.min_block, or set a larger backbone.image_size.",
            )

    def unit_side(self, backbone: BackboneConfig) -> int:
        """Tokens along the side of a unit."""
        return self.unit // backbone.stride

    def n_keep(self, backbone: BackboneConfig) -> int:
        """Number of visible patches.

        In float arithmetic, as every MAE fork computes it: .70 of 196 keeps 58. Of units, ceil(ratio * units) are hidden: 30
        of 49 (SimMIM data_simmim.py:30).
        """
        if self.kind == "unit":
            n_units = (backbone.image_size // self.unit) ** 2
            return (n_units - math.ceil(n_units * self.ratio)) * self.unit_side(backbone) ** 2
        return int(backbone.n_patches * (1 - self.ratio))
