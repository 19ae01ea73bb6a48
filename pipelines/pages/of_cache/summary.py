"""What a cache says of itself, as lines of the page: identity, where targets come from, how far stores are, sizes."""

from __future__ import annotations

import numpy as np

from teacher_cache.cache import Cache, View
from teacher_cache.format.crop_plan import CropPlan
from teacher_cache.format.layout import CROPS_BETON
from teacher_cache.format.spec import ATTENTION_SOURCES, StoreSpec
from teacher_cache.store.reader import StoreReader
from teacher_cache.words import human

BAR_CELLS = 100
"""Of the bar that shows which shards are there."""


def identity(cache: Cache) -> list[tuple[str, str]]:
    """Which images and crops."""
    n_classes, skipped = len(cache.identity.classes), f"; {cache.n_skipped:,} were left out (skipped.txt)"
    return [
        ("crops", cache.crops_id),
        ("images", f"{cache.n_images:,} in {n_classes:,} classes{skipped * bool(cache.n_skipped)}"),
        ("drawn", _drawn(cache.plan)),
        ("kept as", cache.identity.crop_format),
        ("views", f"{len(cache.views()):,}"),
    ]


def _drawn(plan: CropPlan) -> str:
    drawn = f"{plan.kind}, {plan.size} px, {plan.resample}, seed {plan.seed}; "
    if plan.kind == "center":
        return f"{drawn}middle of a short side of {plan.resize} px"
    jitter = f", jitter {plan.jitter:g}" * bool(plan.jitter)
    return (
        f"{drawn}{plan.scale[0]:g} to {plan.scale[1]:g} of the area, ratio {plan.ratio[0]:.3g} to {plan.ratio[1]:.3g}, mirrored "
        f"{plan.flip_p:.0%}{jitter}"
    )


def provenance(store: StoreReader) -> list[tuple[str, str]]:
    """Whose targets, and what is kept of them."""
    teacher, spec, manifest = store.teacher, store.spec, store.manifest
    rows, columns = teacher.grid
    cls = "CLS" if teacher.has_cls else "no CLS"
    head = "a final norm" if teacher.has_final_norm else "no final norm"
    also = f", {ATTENTION_SOURCES[teacher.attention_source]} attention" if spec.attention else ", no attention"
    also += f", {spec.visible} of {teacher.n_patches} patches of each crop" * (spec.visible > 0)
    return [
        ("teacher", f"{teacher.name}: {rows} x {columns} patches of {teacher.patch_size} px, width {teacher.dim}, "
         f"{teacher.depth} blocks, {cls}, {teacher.n_registers} registers, {head}"),
        ("weights", f"{teacher.weights}, SHA-256 {teacher.weights_sha256}"),
        ("kept", f"layers {', '.join(map(str, spec.layers))}, {spec.dtype}{also}"),
        ("input", f"{teacher.image_size} px, {teacher.resize}, {manifest.precision}"),
        ("probe", f"SHA-256 {manifest.probe_sha256}"),
        ("software", ", ".join(f"{name} {number}" for name, number in sorted(manifest.software.items()))),
    ]  # fmt: skip


def stores(cache: Cache) -> list[dict]:
    """How far each store of each view is; `cells`: the share of finished shards in each part of the store."""
    found = []
    for view in cache.views():
        for name in view.store_names():
            store = view.store(name)
            spec, (files, finished) = store.spec, store.commits
            found.append({
                "view": view.number,
                "name": name,
                "cells": [float(part.mean()) for part in np.array_split(finished, min(BAR_CELLS, len(finished)))],
                "n_done": int(finished.sum()),
                "n_shards": spec.n_shards,
                "n_rows": n_rows_done(spec, finished),
                "rows": spec.n_rows,
                "bytes": int(files["bytes"].sum()),
            })  # fmt: skip
    return found


def sizes(view: View, store: StoreReader) -> list[tuple[str, ...]]:
    """Each array of a store, and the crops beside it: name, all, a crop before compression, a crop on disk."""
    n_rows, crop_bytes = n_rows_done(store.spec, store.finished), (view.path / CROPS_BETON).stat().st_size
    lines = [(CROPS_BETON, human(crop_bytes), "", human(crop_bytes / view.cache.n_images))]
    for array, column in store.columns.items():
        n_bytes = int(store.files["bytes"][:, column].sum())
        lines.append((array, human(n_bytes), human(store.spec.row_bytes(array, store.teacher)), human(n_bytes / n_rows)))
    return lines


def n_rows_done(spec: StoreSpec, finished: np.ndarray) -> int:
    """Rows of the finished shards, bool [n_shards]."""
    return sum(len(spec.rows_of(int(shard))) for shard in np.flatnonzero(finished))
