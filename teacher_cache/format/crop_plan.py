"""How the crops of a cache are drawn, as a value, and what is on record of each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..errors import UsageError

RESAMPLINGS = ("bicubic", "bilinear")

LEAST_SIZE, LARGEST_SIZE = 8, 4096
"""Sides of the crops that can be asked for, pixels. Below, no network has a patch; above, one crop alone has 50 MB. Caches with
crops of 1 to 7 pixels can be read: nothing has ever depended on the lower bound."""

CROP_FORMATS = {"jpeg95": 95, "jpeg90": 90, "raw": None}
"""Name -> JPEG quality (always 4:4:4), or None for plain RGB bytes."""


@dataclass(frozen=True)
class CropPlan:
    """How every crop of a cache is drawn."""

    kind: str = "random"
    """`random`: a random resized crop a view. `center`: resize the short side, cut the middle (for evaluation)."""
    seed: int = 0
    size: int = 224
    """Side of the square crop, pixels."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Range of the box's share of the image area (MAE, MR-MAE, MaskAlign and MILAN use .2 to 1)."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the box's width / height, drawn log-uniformly."""
    flip_p: float = 0.5
    resample: str = "bicubic"
    jitter: float = 0.0
    """Strength s of brightness, contrast and saturation, each factor uniform in 1-s .. 1+s; 0 is off."""
    resize: int = 256
    """`center` only: the short side before the cut, pixels. Of a random plan it says nothing; it is part of the identity of a
    cache all the same, because it always was."""

    def __post_init__(self) -> None:
        for name in ("scale", "ratio"):
            object.__setattr__(self, name, tuple(float(bound) for bound in getattr(self, name)))
        checks = {
            "kind must be random or center": self.kind in ("random", "center"),
            f"size must be 1 to {LARGEST_SIZE} pixels": type(self.size) is int and 1 <= self.size <= LARGEST_SIZE,
            "resize must be at least 1": type(self.resize) is int and self.resize >= 1,
            "resize must be at least size": self.kind != "center" or self.resize >= self.size,
            "scale must be 0 < low <= high <= 1": len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1] <= 1,
            "ratio must be 0 < low <= high": len(self.ratio) == 2 and 0 < self.ratio[0] <= self.ratio[1],
            "flip_p must be 0 to 1": 0 <= self.flip_p <= 1,
            "jitter must be 0 to 1": 0 <= self.jitter <= 1,
            "seed must be 0 to 2**63 - 1": isinstance(self.seed, int) and 0 <= self.seed < 2**63,
            f"resample must be one of {', '.join(RESAMPLINGS)}": self.resample in RESAMPLINGS,
        }
        for message, holds in checks.items():
            if not holds:
                raise UsageError(f"Crop plan: {message}; given {self}.")

    @classmethod
    def center(cls, size: int = 224) -> CropPlan:
        """The usual evaluation crop: short side to size * 8/7 (256 for 224), middle cut, no flip."""
        return cls(kind="center", size=size, resize=round(size * 8 / 7), flip_p=0.0)

    def changed(self, kind: str | None, size: int | None, seed: int | None) -> CropPlan:
        """This plan with what is not None changed. Another kind comes with that kind's own settings, and another size of a centre
        crop with another short side before the cut. Raises UsageError for a size that no crop is made of.
        """
        if size is not None and not LEAST_SIZE <= size <= LARGEST_SIZE:
            raise UsageError(f"Crops of {size} pixels: a side of {LEAST_SIZE} to {LARGEST_SIZE} pixels can be made.")
        kind, size, seed = kind or self.kind, size or self.size, self.seed if seed is None else seed
        if kind == "center" and (kind, size) != (self.kind, self.size):
            return dataclasses.replace(CropPlan.center(size), seed=seed)
        return dataclasses.replace(self if self.kind == kind else CropPlan(), size=size, seed=seed)

    @property
    def version(self) -> int:
        """The oldest format version of caches that has words for this plan: version 1 wants `resize` >= `size` of every kind."""
        return 1 if self.resize >= self.size else 2

    def to_json(self) -> dict:
        return {**dataclasses.asdict(self), "scale": list(self.scale), "ratio": list(self.ratio)}


@dataclass(frozen=True)
class Crop:
    """One drawn crop, in pixels of the upright original."""

    top: int
    left: int
    height: int
    width: int
    flip: bool
    jitter: tuple[float, float, float] = (1.0, 1.0, 1.0)
    jitter_order: tuple[int, int, int] = (0, 1, 2)
