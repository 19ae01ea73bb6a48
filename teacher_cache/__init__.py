"""Run a frozen vision teacher once over baked crops; keep its tokens and attention in a compressed zarr store.

    cache = make_cache("cache", images="imagenet/train", teacher="clip-b16", weights="ViT-B-16.pt")
    cache = open("cache")                                  one that is there
    targets = cache.view(0).targets("clip-b16")            what the teacher says of its crops
    tokens = targets.tokens([17, 4], layer=-1)             float32 [2, C+N, D]
    pixels = cache.view(0).pixels([17, 4])                 uint8 [2, size, size, 3]
    findings = verify("cache")                             empty: sound and complete

The names below are imported when first used: torch takes seconds, and reading needs none. All errors are TeacherCacheError
(teacher_cache.errors draws their tree).
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from .cache import Cache as Cache
    from .cache import View as View
    from .checking.findings import Finding as Finding
    from .errors import TeacherCacheError as TeacherCacheError
    from .extraction.make import make_cache as make_cache
    from .extraction.remove import remove_store as remove_store
    from .extraction.remove import remove_view as remove_view
    from .format.crop_plan import CropPlan as CropPlan
    from .store.reader import StoreReader as StoreReader

if sys.byteorder != "little":
    raise ImportError(
        "teacher-cache works on little-endian machines only: a cache holds little-endian numbers, which compiled loops read "
        f"as they lie. This one is {sys.byteorder}-endian. Read its arrays with zarr there (docs/format.md)."
    )

_HOME_OF = {
    "Cache": "cache",
    "CropPlan": "format.crop_plan",
    "Finding": "checking.findings",
    "StoreReader": "store.reader",
    "TeacherCacheError": "errors",
    "View": "cache",
    "make_cache": "extraction.make",
    "remove_store": "extraction.remove",
    "remove_view": "extraction.remove",
}
__all__ = [
    "Cache",
    "CropPlan",
    "Finding",
    "StoreReader",
    "TeacherCacheError",
    "View",
    "make_cache",
    "open",
    "remove_store",
    "remove_view",
    "verify",
]


def open(path: str | os.PathLike) -> Cache:
    """The cache in the folder `path`. Reads small files only; raises as `Cache` does."""
    from pathlib import Path

    from .cache import Cache

    return Cache(Path(path))


def verify(
    cache: Cache | str | os.PathLike,
    *,
    sample: int | None = None,
    images: str | os.PathLike | None = None,
    weights: str | None = None,
    teacher: str | None = None,
    say: Callable[[str], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Finding]:
    """What is wrong with a cache; an empty list if every byte is the one that was written and every row is there.

    sample: of each store and of the crops of each view only so many rows, drawn at random. images: the originals, to cut 64
    crops again and compare. weights: the teacher's (a file, `random:SEED` or `built-in`), to run it on 64 rows and compare;
    teacher: the store that they belong to, if there are several. say, progress: as for `make_cache`.
    Raises UsageError where there is no cache, BadInputError for one of another format version.
    """
    from .checking.check import check
    from .terminal.progress import told_to

    with told_to(say, progress):
        path = cache if isinstance(cache, str | os.PathLike) else cache.path
        return check(path, sample=sample, images=images, weights=weights, teacher=teacher).findings


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
