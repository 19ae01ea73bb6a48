"""What is in a cache, from JSON, names and sizes alone: neither torch nor zarr is imported."""

from __future__ import annotations

import hashlib
from dataclasses import asdict

import numpy as np

from ..cache import Cache, View
from ..files.durable import ASIDE, canonical_json
from ..format.layout import CROPS_BETON
from ..store.manifest import Manifest, extract_command


def describe(cache: Cache) -> dict:
    """Everything `teacher-cache inspect` says, as plain JSON values."""
    identity = cache.identity
    return {
        "path": str(cache.path),
        "crops_id": cache.crops_id,
        "n_images": cache.n_images,
        "n_skipped": cache.n_skipped,
        "n_classes": len(identity.classes),
        "names_sha256": identity.names_sha256,
        "labels_sha256": identity.labels_sha256,
        "crop_format": identity.crop_format,
        "plan": identity.plan.to_json(),
        "views": [_describe_view(view) for view in cache.views()],
        "left_over": left_over(cache),
    }


def left_over(cache: Cache) -> list[str]:
    """What writers that were killed, or removals, have left under names that nothing reads, relative to the cache."""
    asides = [*cache.path.glob(f"*{ASIDE}"), *cache.path.glob(f"view-*/*{ASIDE}")]
    return sorted(aside.relative_to(cache.path).as_posix() for aside in asides)


def _describe_view(view: View) -> dict:
    beton = view.path / CROPS_BETON
    n_bytes = beton.stat().st_size if beton.exists() else 0
    stores = [_describe_store(view, name) for name in view.store_names()]
    return {"view": view.number, "crops_sha256": view.crops_sha256, "crop_bytes": n_bytes, "stores": stores}


def _describe_store(view: View, name: str) -> dict:
    store = view.store(name)
    manifest, spec, teacher = store.manifest, store.spec, store.teacher
    files, finished = store.commits
    n_rows = sum(len(spec.rows_of(int(shard))) for shard in finished.nonzero()[0])
    n_bytes = int(files["bytes"].sum())
    complete = store.is_complete
    return {
        "name": name, "complete": complete, "rows_done": n_rows, "rows": spec.n_rows,
        "shards_done": int(finished.sum()), "shards": spec.n_shards, "missing_shards": ranges(~finished), "bytes": n_bytes,
        "bytes_per_crop": bytes_per_crop(manifest, n_bytes / n_rows if n_rows else None),
        "read_with": {str(layer): list(spec.read_with(layer)[:-1]) for layer in spec.layers}, "source": manifest.source,
        "teacher": teacher.to_json(), "store": spec.to_json(), "precision": manifest.precision,
        "fidelity": [asdict(layer) for layer in manifest.fidelity], "probe_sha256": manifest.probe_sha256,
        "shared_sha256": hashlib.sha256(canonical_json(store.shared_sha256)).hexdigest(), "software": manifest.software,
        "made": None if manifest.made is None else manifest.made.to_json(), "fp32_rows": len(store.read_fp32_rows()),
        "finish": None if complete else extract_command(view.cache.path, name, manifest),
    }  # fmt: skip


def ranges(chosen: np.ndarray) -> list[list[int]]:
    """bool [n] -> the runs of True as [first, one behind the last], as --shards takes them."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype("int8")))
    return edges.reshape(-1, 2).tolist()


def bytes_per_crop(manifest: Manifest, on_disk: float | None) -> dict:
    """Bytes of one crop's targets: what is kept as float16, as quantised, and on disk (None before the first shard)."""
    spec, teacher = manifest.store, manifest.teacher
    quantised = sum(spec.row_bytes(array, teacher) for array in spec.array_names)
    attention = spec.row_bytes("attention", teacher) if spec.attention else 0
    float16 = len(spec.layers) * spec.n_tokens(teacher) * teacher.dim * 2 + attention
    return {"float16": float16, "quantised": quantised, "on_disk": None if on_disk is None else round(on_disk)}
