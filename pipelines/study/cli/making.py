"""The caches of a study: each made once, grown by views when a cell needs more, and timed."""

from __future__ import annotations

import json
import time
from pathlib import Path

from teacher_cache.cache import Cache
from teacher_cache.extraction.make import make_cache
from teacher_cache.files.durable import make_folder, write_whole
from teacher_cache.format.crop_plan import CropPlan
from teacher_cache.format.layout import CACHE_JSON
from teacher_cache.inspecting.inspect import describe

PLAN = CropPlan(size=32, scale=(0.4, 1.0))
"""Crops of all cells: bicubic, flipped half the time."""


def cache_with(folder: Path, images: Path, views: int, code: str | None, weights: Path | None, device: str) -> tuple[Cache, dict]:
    """The cache in `folder` with `views` views at least, and what those cost: {"views", "seconds", "whole", "bytes", ...}.

    code: of cells.CODES, of the teacher's last 5 blocks and its attention; None: crops alone. seconds: of those views, by the
    call that made them. whole: whether no interruption has hidden some of them. Raises as make_cache does.
    """
    log = folder.with_name(f"{folder.name}.made.json")
    calls = json.loads(log.read_text()) if log.exists() else []
    make_folder(folder.parent)
    covered = sum(call["views"] for call in calls if call["seconds"] is not None)
    if covered < views:
        again = bool(calls) and calls[-1]["seconds"] is None
        there = len(Cache(folder).views()) if (folder / CACHE_JSON).exists() else 0
        wanted = max(views, there)
        call = {"views": wanted - covered, "seconds": None, "whole": not again}
        calls = [*calls[: len(calls) - again], call]
        _keep(log, calls)
        options: dict = {}
        if code is not None:
            kept = {"tokens": code} if code.startswith("visible:") else {"dtype": code}
            options = {"teacher": "demo", "weights": weights, "device": device, "batch_size": 256, **kept}
        started = time.monotonic()
        make_cache(folder, images=images, plan=PLAN, views=wanted, **options)
        call["seconds"] = round(time.monotonic() - started, 2)
        _keep(log, calls)
    cache = Cache(folder)
    return cache, _cost(cache, calls, views, code is not None)


def _keep(log: Path, calls: list[dict]) -> None:
    write_whole(log, json.dumps(calls, indent=1).encode())


def _cost(cache: Cache, calls: list[dict], views: int, has_targets: bool) -> dict:
    """Of the first `views` views. A call's seconds are shared by its views alike."""
    seconds, left, whole = 0.0, views, True
    for call in calls:
        n = min(left, call["views"])
        seconds += call["seconds"] * n / call["views"] if n else 0.0
        whole, left = whole and (call["whole"] or not n), left - n
    told = describe(cache)["views"][:views]
    crops = sum(view["crop_bytes"] for view in told)
    targets = sum(store["bytes"] for view in told for store in view["stores"]) if has_targets else 0
    each = cache.n_images * views
    return {"views": views, "seconds": round(seconds, 2), "whole": whole, "bytes": crops + targets,
            "crop_bytes_a_crop": round(crops / each, 1), "target_bytes_a_crop": round(targets / each, 1)}  # fmt: skip
