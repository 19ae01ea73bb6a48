"""teacher-cache show: crops, and what the teacher says of them, as a picture."""

from __future__ import annotations

from pathlib import Path

import click

from ..terminal.command import one_line_errors, say
from .options import CACHE, STORE, VIEW, PatchPlace, RowRange


@click.command()
@CACHE
@click.option("--row", "rows", type=RowRange(), multiple=True, help="A row, or several as A:B; may be repeated. [default: 0]")
@VIEW
@STORE
@click.option("--images", type=click.Path(path_type=Path), help="The originals: draw the crop's box on them.")
@click.option("--patch", type=PatchPlace(), help="The patch that others are compared with. [default: the most attended]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the masks.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="A .png, .pdf or .svg. [default: row-I-view-V.png]")
def show(cache: Path, rows: tuple[range, ...], view: int, teacher: str | None, images: Path | None, patch, seed: int,
         out: Path | None):  # fmt: skip
    """Draw a crop, what the teacher says of it, and what a student would see of it.

    One row: the crop (and its box on the original), CLS attention, the principal components of each layer's patch tokens as
    colours, their likeness to one patch, and a mask of each law that the presets use. Several rows make a sheet.

    \b
    Example:
      teacher-cache show --row 17 --images imagenet/train CACHE
      teacher-cache show --row 0:8 --row 100 --view 1 -o sheet.png CACHE
    """
    with one_line_errors(""):
        from pipelines.pages.of_crops.show import numbers_of
        from pipelines.pages.of_crops.show import show as draw

        numbers = numbers_of(rows or (range(1),))
        out = out or Path(f"row-{numbers[0]}{f'-and-{len(numbers) - 1}-more' * (len(numbers) > 1)}-view-{view}.png")
        draw(cache, numbers, view, out, say, teacher=teacher, images=images, patch=patch, seed=seed)
        say(f"Wrote {out}")
