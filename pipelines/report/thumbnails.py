"""Small pictures of crops, as parts of a page."""

from __future__ import annotations

import io

import numpy as np
from markupsafe import Markup
from PIL import Image

from teacher_cache.beton import CropReader

from ..pages.page import data_uri

BLOCK = 64  # crops decoded at a time


def thumbnail(reader: CropReader, row: int, side: int) -> Markup:
    """The crop of a row as the address of a JPEG of at most `side` pixels."""
    return data_uri(_jpeg(_small(reader, np.array([row]), side)[0], quality=85), "image/jpeg")


def sprite(reader: CropReader, rows: np.ndarray, side: int) -> tuple[Markup, int]:
    """All crops of `rows` on one JPEG, in lines of `columns` squares of `side` pixels; and `columns`."""
    columns = max(1, int(np.ceil(np.sqrt(len(rows)))))
    canvas = np.zeros((-(-len(rows) // columns) * side, columns * side, 3), "uint8")
    for start in range(0, len(rows), BLOCK):
        for place, pixels in enumerate(_small(reader, rows[start : start + BLOCK], side), start=start):
            line, column = divmod(place, columns)
            canvas[line * side : (line + 1) * side, column * side : (column + 1) * side] = pixels
    return data_uri(_jpeg(canvas, quality=70), "image/jpeg"), columns


def _small(reader: CropReader, rows: np.ndarray, side: int) -> np.ndarray:
    """uint8 [n, side, side, 3]."""
    images = (Image.fromarray(pixels) for pixels in reader.read(rows))
    return np.stack([np.asarray(image.resize((side, side), Image.Resampling.LANCZOS)) for image in images])


def _jpeg(pixels: np.ndarray, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
