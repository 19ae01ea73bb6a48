"""What joins caches and students.

    CachedDataset(cache, "clip-b16")    crops and targets as a torch Dataset, for a trainer of one's own

The names are imported when first used: torch and FFCV take seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .feed.dataset import CachedDataset as CachedDataset

_HOME_OF = {"CachedDataset": "feed.dataset"}
__all__ = ["CachedDataset"]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
