"""How the crops of a view were cut, from crops.npy alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from teacher_cache.format.crop_plan import CropPlan

CELLS = 24
"""Side of the map of where boxes lie."""
MOST_BOXES = 200_000
"""Looked at, evenly spaced."""


@dataclass(frozen=True)
class BoxFigures:
    """Distributions over crops."""

    n: int
    areas: np.ndarray
    """float64 [n], share of the original's area."""
    ratios: np.ndarray
    """Width over height."""
    magnification: np.ndarray
    """Pixels of the crop to one of the box, by the square root of the area; above 1 pixels are made up."""
    flipped: float
    """Share of crops that are mirrored."""
    cover: np.ndarray
    """float64 [CELLS, CELLS]: share of crops that show this part of their original."""


def box_figures(crops: np.ndarray, plan: CropPlan) -> BoxFigures:
    """crops: CROP_DTYPE [n_images]."""
    crops = crops[:: max(1, len(crops) // MOST_BOXES)]
    height, width, top, left, image_height, image_width = (
        crops[field].astype("float64") for field in ("height", "width", "top", "left", "image_height", "image_width")
    )
    if plan.kind == "center":  # the record names the whole image
        side = plan.size * np.minimum(image_height, image_width) / plan.resize
        top, left, height, width = (image_height - side) / 2, (image_width - side) / 2, side, side

    cells = (np.arange(CELLS) + 0.5) / CELLS  # centres, in shares of a side

    def shown(start: np.ndarray, size: np.ndarray, whole: np.ndarray) -> np.ndarray:
        """bool [n, CELLS]: whether a box reaches over a cell's centre, along one side."""
        return ((start / whole)[:, None] <= cells) & (cells < ((start + size) / whole)[:, None])

    rows, columns = shown(top, height, image_height), shown(left, width, image_width)
    cover = rows.T.astype("float32") @ columns.astype("float32") / len(crops)
    return BoxFigures(
        n=len(crops),
        areas=height * width / (image_height * image_width),
        ratios=width / height,
        magnification=plan.size / np.sqrt(height * width),
        flipped=float(crops["flip"].mean()),
        cover=cover.astype("float64"),
    )
