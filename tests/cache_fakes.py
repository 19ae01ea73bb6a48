"""What the tests of the format share: a folder's contents as a value, damage, and an interruption at a chosen moment."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from teacher_cache.cache import Cache
from teacher_cache.extraction.cropping import make_crops, plan_job, remove_left_over
from teacher_cache.format.crop_plan import CropPlan

PLAN = CropPlan(size=32, scale=(0.3, 1.0))


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file below `folder`."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def crop_folder(cache_dir: Path, images: Path | None, n_views: int = 1, plan: CropPlan = PLAN, crop_format: str = "jpeg95",
                skip_bad: bool = False, workers: int = 2) -> Cache:  # fmt: skip
    """What `teacher-cache crop` does."""
    job = plan_job(cache_dir, images, plan, crop_format, n_views)
    if job is not None:
        return make_crops(job, skip_bad, workers)
    remove_left_over(cache_dir)
    return Cache(cache_dir)


def flip_bit(path: Path, bit: int) -> None:
    """Invert one bit, counted from the start of the file; negative numbers count from its end."""
    data = bytearray(path.read_bytes())
    bit %= 8 * len(data)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


CHANGES = ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir")


def kills(act: Callable[[], None], every: int = 1) -> Iterator[None]:
    """Run `act`, killed before its first change of the disk, then before the one `every` changes later, and so on.

    Changes are fsync, rename and making or removing a name. Yields after each death; the caller puts back what `act` starts from.
    Ends, having done all of `act`, when there is no further change to die before.
    """
    call = 1
    while _dies(act, call):
        yield
        call += every


def _dies(act: Callable[[], None], call: int) -> bool:
    """Whether `act`, run until its `call`-th change of the disk, did not come to its end."""
    left = call

    def mortal(change):
        def wrapper(*arguments, **options):
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return change(*arguments, **options)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, mortal(getattr(os, name)))
        try:
            act()
        except KeyboardInterrupt:
            return True
    return False


def failing_at(function, call: int, error: BaseException):
    """`function`, but its `call`-th call (from 1) raises `error` before anything is done."""
    n_calls = 0

    def wrapper(*arguments, **options):
        nonlocal n_calls
        n_calls += 1
        if n_calls == call:
            raise error
        return function(*arguments, **options)

    return wrapper
