"""Who teaches a run: stores of its cache, or teachers on the spot."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from teacher_cache.errors import UnknownNameError
from teacher_cache.format.layout import store_file_name
from teacher_cache.words import quoted

if TYPE_CHECKING:
    from teacher_cache.cache import Cache


@dataclasses.dataclass(frozen=True)
class Lesson:
    """Who teaches a run: what the student must know of them, and how its batches are made."""

    names: tuple[str, ...]
    shapes: tuple
    source: Callable
    """(cache, needs, reading options with the run's masks, other options) -> student.batch.BatchSource"""


def stored_lesson(cache: Cache, teachers: tuple[str, ...], grid: tuple[int, int] | None = None) -> Lesson:
    """Targets from the cache, or none at all. grid: of the student's patches, for the command that makes what is missing."""
    from pipelines.feed.cached_source import CachedSource
    from pipelines.feed.crop_source import CropSource
    from pipelines.feed.teacher_values import stored_shape

    names = tuple(_store_of(cache, name, grid) for name in teachers)
    shapes = tuple(stored_shape(cache, name) for name in names)
    if not names:
        return Lesson((), (), lambda cache, needs, reading, data: CropSource(cache, **data))
    return Lesson(names, shapes, lambda cache, needs, reading, data: CachedSource(cache, names, needs, **reading, **data))


def live_lesson(
    names: tuple[str, ...],
    weights: tuple[str, ...],
    device: str,
    precision: str,
    grid: tuple[int, int] | None = None,
    raw: bool = False,
) -> Lesson:
    """Teachers run on the spot, by their names for `teacher-cache extract --teacher`.

    grid: of the student's patches; teachers of the table come at the image size that gives them the same. None: at their own.
    raw: whether their block outputs are not whitened; then they have no final norm that could be told from them.
    """
    from pipelines.feed.live_source import LiveSource
    from pipelines.feed.teacher_values import teacher_shape
    from teacher_cache.teachers import load_teacher
    from teacher_cache.teachers.families import image_size_for

    given = weights or (None,) * len(names)
    sizes = [None if grid is None else image_size_for(name, grid) for name in names]
    loaded = [load_teacher(name, path, size, device, precision) for name, path, size in zip(names, given, sizes, strict=True)]
    shapes = tuple(teacher_shape(teacher.spec) for teacher in loaded)
    if raw:
        loaded = [teacher.give_raw() for teacher in loaded]
        shapes = tuple(dataclasses.replace(shape, has_final_norm=False) for shape in shapes)
    return Lesson(tuple(names), shapes, lambda cache, needs, reading, data: LiveSource(cache, loaded, needs, **data))


def any_store(cache: Cache, names: tuple[str, ...]) -> tuple[str, ...]:
    """`names`; for one that a cache with one store lacks, that store, because a miniature takes any."""
    there = cache.finished_view(0).store_names()
    if len(there) != 1 or len(names) != 1 or store_file_name(names[0]) in there:
        return names
    return tuple(there)


def _store_of(cache: Cache, name: str, grid: tuple[int, int] | None) -> str:
    """The file name of the store called `name`, or UnknownNameError listing what is there."""
    names, store = cache.finished_view(0).store_names(), store_file_name(name)
    if store not in names:
        there = f"it has {', '.join(names)}" if names else "it has no targets at all"
        other = f" To learn from another: --teacher {names[0]}." if names else ""
        from teacher_cache.teachers import OPEN_CLIP_PREFIX, TEACHERS, TIMM_PREFIX
        from teacher_cache.teachers.families import options_for

        is_teacher = name in TEACHERS or name.startswith((TIMM_PREFIX, OPEN_CLIP_PREFIX))
        make = f"teacher-cache extract --teacher {name}{options_for(name, grid)} {quoted(cache.path)}"
        command = f" Make them: {make}" if is_teacher else ""
        raise UnknownNameError(f"{cache.path} has no targets of {name}; {there}.{other}{command}")
    return store
