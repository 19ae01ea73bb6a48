"""Everything a cache holds about a few crops, read and checked, ready to be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from teacher_cache.cache import View
from teacher_cache.crops.beton import CropReader
from teacher_cache.crops.cutting import load_image
from teacher_cache.crops.images import read_image
from teacher_cache.errors import NotInCacheError, UsageError
from teacher_cache.format.crop_plan import CropPlan
from teacher_cache.inspecting.inspect import ranges
from teacher_cache.store.manifest import extract_command
from teacher_cache.store.reader import StoreReader

# N patches, D width

ORIGINAL_SIDE = 1024
"""Originals are drawn at most so large, pixels."""


@dataclass(frozen=True)
class LookedAt:
    """One crop and what is stored of it."""

    row: int
    name: str
    class_name: str
    """Empty where the images have no classes."""
    record: np.void
    """CROP_DTYPE: box, flip and jitter."""
    pixels: np.ndarray
    """uint8 [size, size, 3], as the teacher saw them."""
    attention: np.ndarray | None
    """float32 [N], the teacher's attention to the patches; None if the store keeps none."""
    tokens: dict[int, np.ndarray]
    """float32 [N, D] by layer: whitened patch tokens, without CLS; NaN for patches that a store of visible tokens leaves out."""
    original: Image.Image | None
    """Upright, at most ORIGINAL_SIDE pixels a side."""

    @property
    def is_kept(self) -> np.ndarray:
        """bool [N], the patches whose tokens are stored."""
        return np.isfinite(next(iter(self.tokens.values()))[:, 0])


def require_rows(view: View, store: StoreReader, rows: Sequence[int]) -> None:
    """Raise UsageError for rows that a cache cannot have, NotInCacheError for those it has not yet, saying which are there."""
    outside = [row for row in rows if not 0 <= row < len(store)]
    if outside:
        raise UsageError(f"--row {outside[0]}: {view.cache.path} has rows 0 to {len(store) - 1}.")
    missing = [row for row in rows if not store.finished[row // store.spec.shard_rows]]
    if missing:
        command = extract_command(view.cache.path, store.path.stem, store.manifest)
        raise NotInCacheError(
            f"--row {missing[0]}: not extracted yet in view {view.number}; there are {finished_ranges(store)}. Make the others: "
            f"{command}"
        )


def finished_ranges(store: StoreReader, most: int = 5) -> str:
    """The rows that are there, in words: `rows 0 to 4,095 and 8,192 to 9,999`."""
    rows = [(store.spec.rows_of(first), store.spec.rows_of(stop - 1)) for first, stop in ranges(store.finished)]
    runs = [f"{first.start:,} to {last.stop - 1:,}" for first, last in rows]
    if not runs:
        return "no rows"
    if len(runs) > most:
        return f"rows {', '.join(runs[:most])} and {len(runs) - most:,} ranges more"
    return "rows " + " and ".join([", ".join(runs[:-1]), runs[-1]] if runs[1:] else runs)


def look(view: View, store: StoreReader, rows: Sequence[int], images_dir: Path | None = None,
         layers: Sequence[int] | None = None) -> list[LookedAt]:  # fmt: skip
    """What is stored of `rows` of a view, each a crop of its own.

    images_dir: the originals, if they are at hand. layers: those whose tokens are read; None: all that are stored.
    """
    require_rows(view, store, rows)
    reader, images = CropReader(view.path), view.cache.images()
    pixels, first_patch = reader.read(rows), int(store.teacher.has_cls)
    index = store.read("index", rows) if store.spec.visible else None
    tokens = {
        layer: _on_all_patches(store.tokens(rows, layer)[:, first_patch:], index, store.teacher.n_patches)
        for layer in layers or store.spec.layers
    }  # [rows, N, D]
    attention = store.read("attention", rows) if store.spec.attention else None
    return [
        LookedAt(
            row=row,
            name=images.names[row],
            class_name=images.classes[images.labels[row]] if images.labels[row] >= 0 else "",
            record=reader.crops[row],
            pixels=pixels[i],
            attention=None if attention is None else attention[i],
            tokens={layer: values[i] for layer, values in tokens.items()},
            original=None if images_dir is None else _original(images_dir, images.names[row], reader.crops[row]),
        )
        for i, row in enumerate(rows)
    ]


def _on_all_patches(tokens: np.ndarray, index: np.ndarray | None, n_patches: int) -> np.ndarray:
    """Tokens [n, K, D] of the patches `index` [n, K] at their places among all: [n, N, D], NaN elsewhere. None: they are all."""
    if index is None:
        return tokens
    places = np.full((len(tokens), n_patches, tokens.shape[2]), np.nan, "float32")
    np.put_along_axis(places, index[..., None].astype("int64"), tokens, axis=1)
    return places


def _original(images_dir: Path, name: str, record: np.void) -> Image.Image:
    if not (images_dir / name).is_file():
        raise UsageError(f"--images {images_dir}: has no {name}. Give the folder that the crops were cut from.")
    image = load_image(read_image(images_dir, name), name)
    if image.size != (record["image_width"], record["image_height"]):
        raise UsageError(
            f"--images {images_dir}: {name} has {image.width} x {image.height} pixels, the crop was cut from "
            f"{record['image_width']} x {record['image_height']}. Give the folder that the crops were cut from."
        )
    image.thumbnail((ORIGINAL_SIDE, ORIGINAL_SIDE))
    return image


def box_of(plan: CropPlan, record: np.void) -> tuple[float, float, float, float]:
    """(left, top, width, height) of what a crop shows, pixels of the upright original."""
    if plan.kind == "center":  # the record names the whole image, which is resized before the middle is cut
        height, width = int(record["image_height"]), int(record["image_width"])
        side = plan.size * min(height, width) / plan.resize
        return (width - side) / 2, (height - side) / 2, side, side
    return tuple(int(record[field]) for field in ("left", "top", "width", "height"))
