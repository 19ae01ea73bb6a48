"""What several commands share: options, and the types of their values. Nothing here imports torch."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click

from ..errors import UsageError
from ..format.crop_plan import CROP_FORMATS, LARGEST_SIZE, LEAST_SIZE
from ..format.dtypes import DTYPES, dtype_of

KEPT = "Finished work is kept; the same command goes on from there."
CACHE = click.argument("cache", type=click.Path(path_type=Path))
SIDE = click.IntRange(LEAST_SIZE, LARGEST_SIZE)
CROP_SIZE = click.option("--crop-size", type=SIDE, help="Side of a crop, pixels; a teacher of another size resizes it. "
                         "[default: what the teacher takes; 224 for teacher-cache crop]")  # fmt: skip
CROP_FORMAT = click.option("--crop-format", type=click.Choice(list(CROP_FORMATS)), help="How crops are stored. [default: jpeg95]")


def options(*options):
    """One decorator from several."""

    def decorate(function):
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


CROP_OPTIONS = options(
    click.option("--images", type=click.Path(path_type=Path), help="Folder of class folders with images, or of images."),
    click.option("--views", type=click.IntRange(1), help="Passes over the images, one crop an image each. [default: 1, "
                 "or what the cache has]"),
    click.option("--preset", help="Take the crop plan of this training preset (student-train --list)."),
    click.option("--plan", type=click.Choice(["random", "center"]), help="random: random resized crops for training; center: "
                 "short side resized, middle cut, for evaluation. [default: random]"),
    CROP_SIZE,
    CROP_FORMAT,
    click.option("--seed", type=click.IntRange(0), help="Of the order of images and of all crops. [default: 0]"),
    click.option("--skip-bad", is_flag=True, help="Leave out images that cannot be decoded, and list them in skipped.txt."),
    click.option("--workers", type=click.IntRange(1), help="Threads that cut crops. [default: one a processor]"),
)  # fmt: skip


TAKE_OVER = click.option("--take-over", is_flag=True, help="Say that whoever holds CACHE is gone: do not watch its claim for "
                         "minutes first. A locked one is refused all the same. Not for scripts that several "
                         "processes run.")  # fmt: skip
REPAIR = click.option("--repair", is_flag=True, help="Mend what verify finds in CACHE, and say what was mended.")
DRY_RUN = click.option("--dry-run", is_flag=True, help="Say what would be made and how large it is; write nothing.")


class ShardRange(click.ParamType):
    """`A:B`, half-open like a slice of Python; A is 0 and B the end if left out."""

    name = "A:B"

    def convert(self, value, param, context) -> range:
        match = re.fullmatch(r"([0-9]*):([0-9]*)", value)
        shards = range(int(match[1] or 0), int(match[2] or sys.maxsize)) if match else range(0)
        if not shards:
            self.fail(f"{value!r} is no range of shards. Give A:B with A < B, such as 0:40.", param, context)
        return shards


class TokenChoice(click.ParamType):
    """`all` or `visible:K`, as the number of patches to keep: 0 is all."""

    name = "all|visible:K"

    def convert(self, value, param, context) -> int:
        from ..extraction.make import n_visible

        try:
            return n_visible(value)
        except UsageError as error:
            self.fail(str(error), param, context)


class Dtype(click.ParamType):
    """How values are stored, in the spelling that stores have."""

    name = "|".join(DTYPES)

    def convert(self, value, param, context) -> str:
        try:
            return dtype_of(value)
        except UsageError as error:
            self.fail(str(error), param, context)


class RowRange(click.ParamType):
    """`I`, one row, or `A:B`, half-open like a slice of Python."""

    name = "I|A:B"

    def convert(self, value, param, context) -> range:
        match = re.fullmatch(r"([0-9]{1,10})(?::([0-9]{1,10}))?", value)
        rows = range(int(match[1]), int(match[2] or int(match[1]) + 1)) if match else range(0)
        if not rows:
            self.fail(f"{value!r} is no row. Give a number from 0, or A:B with A < B, such as 0:8.", param, context)
        return rows


class PatchPlace(click.ParamType):
    """`R,C`: row and column of a patch, from 0."""

    name = "R,C"

    def convert(self, value, param, context) -> tuple[int, int]:
        match = re.fullmatch(r"([0-9]{1,5}),([0-9]{1,5})", value)
        if not match:
            self.fail(f"{value!r} is no patch. Give its row and column from 0, such as 3,5.", param, context)
        return int(match[1]), int(match[2])


VIEW = click.option("--view", type=click.IntRange(0), default=0, show_default=True, help="Pass over the images, from 0.")
STORE = click.option("--teacher", help="Which store, if there are several.")
JSON = click.option("--json", "as_json", is_flag=True, help="Machine-readable.")


def grid_of(preset: str | None) -> tuple[int, int] | None:
    """(rows, columns) of patches of a preset's student; None without one, or where it learns without a teacher."""
    if not preset:
        return None
    from pipelines.presets import recipe

    chosen = recipe(preset)
    return chosen.config.backbone.grid if chosen.teachers else None


def with_preset(options: dict) -> dict:
    """The options of the crop stage with the crop plan of the preset in the place of its name."""
    if not options["preset"]:
        return options
    from pipelines.presets import recipe

    return {**options, "preset": recipe(options["preset"]).plan}
