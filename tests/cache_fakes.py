"""What the tests of the format share: a folder's contents as a value, damage, and an interruption at a chosen moment."""

from __future__ import annotations

from pathlib import Path

from teacher_cache.cache import Cache
from teacher_cache.cropping import make_crops, plan_job
from teacher_cache.crops import CropPlan

PLAN = CropPlan(size=32, scale=(0.3, 1.0))


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file below `folder`."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def crop_folder(cache_dir: Path, images: Path | None, n_views: int = 1, plan: CropPlan = PLAN, crop_format: str = "jpeg95",
                skip_bad: bool = False, workers: int = 2) -> Cache:  # fmt: skip
    """What `teacher-cache crop` does."""
    job = plan_job(cache_dir, images, plan, crop_format, n_views)
    return make_crops(job, skip_bad, workers) if job else Cache(cache_dir)


def flip_bit(path: Path, bit: int) -> None:
    """Invert one bit, counted from the start of the file; negative numbers count from its end."""
    data = bytearray(path.read_bytes())
    bit %= 8 * len(data)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


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
