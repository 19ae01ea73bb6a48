"""Small pictures of crops, as parts of a page."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from markupsafe import Markup
from PIL import Image

from teacher_cache.crops.beton import CropReader

from ..page import data_uri


def thumbnail(reader: CropReader, row: int, side: int) -> Markup:
    """The crop of a row as the address of a JPEG of at most `side` pixels."""
    return data_uri(_jpeg(next(_small(reader, np.array([row]), side)), quality=85), "image/jpeg")


def sprite(reader: CropReader, rows: np.ndarray, side: int) -> tuple[Markup, int]:
    """All crops of `rows` on one JPEG, in lines of `columns` squares of `side` pixels; and `columns`."""
    columns = max(1, int(np.ceil(np.sqrt(len(rows)))))
    canvas = np.zeros((-(-len(rows) // columns) * side, columns * side, 3), "uint8")
    for i, pixels in enumerate(_small(reader, rows, side)):
        line, column = divmod(i, columns)
        canvas[line * side : (line + 1) * side, column * side : (column + 1) * side] = pixels
    return data_uri(_jpeg(canvas, quality=70), "image/jpeg"), columns


def _small(reader: CropReader, rows: np.ndarray, side: int) -> Iterator[np.ndarray]:
    """The crops of `rows`, each as uint8 [side, side, 3]."""
    for pixels in reader.each(rows):
        yield np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS))


def _jpeg(pixels: np.ndarray, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
