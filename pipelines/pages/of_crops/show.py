"""`teacher-cache show`: from options to a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from teacher_cache.cache import Cache
from teacher_cache.errors import UsageError
from teacher_cache.format.spec import TeacherSpec

from ...feed.teacher_values import teacher_shape
from ..page import require_writable
from .crops import LookedAt, look
from .laws import hidden_patches, laws_for, one_a_kind
from .panels import require_format
from .picture import Scene, picture_of_one, sheet, sheet_layers

MOST_ROWS = 64
"""Of one sheet: about 60 million pixels."""


def numbers_of(ranges: Sequence[range]) -> list[int]:
    """The rows of some ranges, each once, in that order. UsageError if they are too many for a sheet."""
    n_rows = sum(map(len, ranges))
    if n_rows > MOST_ROWS:
        raise UsageError(f"{n_rows:,} rows are asked for; a sheet has at most {MOST_ROWS}. Give fewer, or make several.")
    return list(dict.fromkeys(row for some in ranges for row in some))


def show(cache_dir: Path, rows: Sequence[int], view: int, out: Path, say: Callable[[str], None], *, teacher: str | None = None,
         images: Path | None = None, patch: tuple[int, int] | None = None, seed: int = 0) -> None:  # fmt: skip
    """Write the picture of one row, or a sheet of several.

    images: folder of the originals. patch: (row, column) of the patch that others are compared with. seed: of the masks. say:
    called with what cannot be drawn.
    """
    require_writable(out, outside_of=cache_dir)
    require_format(out)
    finished = Cache(cache_dir).finished_view(view)
    store = finished.targets(teacher)
    index = None if patch is None else _index(patch, store.teacher)
    crops = look(finished, store, rows, images, store.spec.layers if len(rows) == 1 else sheet_layers(store.spec.layers))

    if store.spec.visible:
        kept = f"{store.spec.visible} of {store.teacher.n_patches} patches"
        say(f"{store.path.stem} keeps {kept} of each crop; the others are grey.")
        if index is not None:
            _require_kept(index, crops, store.teacher)

    shape = teacher_shape(store.teacher)
    laws = laws_for(shape)
    if len(rows) > 1:
        laws = one_a_kind(laws)
    attention = np.stack([crop.attention for crop in crops]) if store.spec.attention else None
    if attention is None:
        say(f"The store of {store.teacher.name} has no attention: the picture has none, and no masks that are drawn by it.")
    if not laws:
        say(f"No preset has a grid of {shape.grid[0]} x {shape.grid[1]} patches: the picture has no masks.")
    hidden = [hidden_patches(law, shape, attention, len(rows), seed) for law in laws]
    scene = Scene(crops, store.teacher, finished.cache.plan, view, laws, hidden, index)
    (picture_of_one if len(rows) == 1 else sheet)(scene).write(out)


def _require_kept(index: int, crops: Sequence[LookedAt], teacher: TeacherSpec) -> None:
    """Raise UsageError if a store of visible tokens leaves out the patch that others are to be compared with."""
    for crop in crops:
        if not crop.is_kept[index]:
            row, column = divmod(int(np.flatnonzero(crop.is_kept)[0]), teacher.grid[1])
            raise UsageError(
                f"--patch: this patch of row {crop.row} is not stored. Give one that is, such as {row},{column}, or leave "
                "--patch out for the most attended of each crop."
            )


def _index(patch: tuple[int, int], teacher: TeacherSpec) -> int:
    row, column = patch
    if not (0 <= row < teacher.grid[0] and 0 <= column < teacher.grid[1]):
        raise UsageError(
            f"--patch {row},{column}: {teacher.name} has {teacher.grid[0]} x {teacher.grid[1]} patches. Give 0,0 to "
            f"{teacher.grid[0] - 1},{teacher.grid[1] - 1}."
        )
    return row * teacher.grid[1] + column
