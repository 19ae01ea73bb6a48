"""What is in a cache, from JSON, names and sizes alone: neither torch nor zarr is imported."""

from __future__ import annotations

from dataclasses import asdict

from .cache import Cache, View
from .commits import is_complete, read_commits
from .estimate import human
from .store import Manifest, read_manifest


def describe(cache: Cache) -> dict:
    """Everything `teacher-cache inspect` says, as plain JSON values."""
    identity = cache.identity
    return {
        "path": str(cache.path),
        "crops_id": cache.crops_id,
        "n_images": cache.n_images,
        "n_skipped": cache.n_skipped,
        "n_classes": len(identity.classes),
        "crop_format": identity.crop_format,
        "plan": identity.plan.to_json(),
        "views": [_describe_view(view) for view in cache.views()],
    }


def _describe_view(view: View) -> dict:
    beton = (view.path / "crops.beton").stat().st_size if (view.path / "crops.beton").exists() else 0
    stores = [_describe_store(view, name) for name in view.store_names()]
    return {"view": view.number, "crop_bytes": beton, "stores": stores}


def _describe_store(view: View, name: str) -> dict:
    path = view.store_path(name)
    manifest = read_manifest(path)
    spec, teacher = manifest.store, manifest.teacher
    files, finished = read_commits(path, spec)
    n_rows = sum(len(spec.rows_of(int(shard))) for shard in finished.nonzero()[0])
    n_bytes = int(files["bytes"].sum())
    return {
        "name": name, "complete": is_complete(path), "rows_done": n_rows, "rows": spec.n_rows,
        "shards_done": int(finished.sum()), "shards": spec.n_shards, "bytes": n_bytes,
        "bytes_per_crop": bytes_per_crop(manifest, n_bytes / n_rows if n_rows else None),
        "teacher": teacher.to_json(), "store": spec.to_json(), "precision": manifest.precision,
        "fidelity": [asdict(layer) for layer in manifest.fidelity], "probe_sha256": manifest.probe_sha256,
        "software": manifest.software,
    }  # fmt: skip


def bytes_per_crop(manifest: Manifest, on_disk: float | None) -> dict:
    """Bytes of one crop's targets: as float16, as quantised, and as they lie on disk (None before the first shard)."""
    spec, teacher = manifest.store, manifest.teacher
    quantised = sum(spec.row_bytes(array, teacher) for array in spec.array_names)
    attention = spec.row_bytes("attention", teacher) if spec.attention else 0
    float16 = len(spec.layers) * teacher.n_tokens * teacher.dim * 2 + attention
    return {"float16": float16, "quantised": quantised, "on_disk": None if on_disk is None else round(on_disk)}


def in_words(cache: dict) -> str:
    """What `describe` found, for people."""
    plan = cache["plan"]
    lines = [
        f"{cache['path']}  (crops {cache['crops_id'][:12]})",
        f"  images   {cache['n_images']:,} in {cache['n_classes']:,} classes"
        + (f", {cache['n_skipped']:,} left out (skipped.txt)" if cache["n_skipped"] else ""),
        f"  crops    {plan['kind']}, {plan['size']} px, {cache['crop_format']}, {plan['resample']}, seed {plan['seed']}"
        + ("" if plan["kind"] == "center" else f", scale {plan['scale'][0]:g} to {plan['scale'][1]:g}, flip {plan['flip_p']:g}"
           + f", jitter {plan['jitter']:g}" * bool(plan["jitter"])),
        f"  views    {len(cache['views'])}",
    ]  # fmt: skip
    for view in cache["views"]:
        lines.append(f"\n  view {view['view']}: crops.beton {human(view['crop_bytes'])}, "
                     f"{len(view['stores'])} teacher{'s' * (len(view['stores']) != 1)}")  # fmt: skip
        lines += [line for store in view["stores"] for line in _store_lines(store)]
    return "\n".join(lines)


def _store_lines(store: dict) -> list[str]:
    teacher, spec, per_crop = store["teacher"], store["store"], store["bytes_per_crop"]
    share = store["rows_done"] / store["rows"]
    on_disk = "nothing yet" if per_crop["on_disk"] is None else human(per_crop["on_disk"])
    codecs = sorted({codec for _, codec in spec["codecs"]})
    lines = [
        f"    {store['name']}: {teacher['name']}, weights {teacher['weights']} (sha256 {teacher['weights_sha256'][:12]}), "
        f"{teacher['image_size']} px, {store['precision']}",
        f"      rows      {store['rows_done']:,} of {store['rows']:,} ({share:.0%}), {store['shards_done']:,} of "
        f"{store['shards']:,} shards, {'complete' if store['complete'] else 'NOT complete: run extract again'}",
        f"      kept      layers {', '.join(map(str, spec['layers']))} of {teacher['depth']}, {spec['dtype']}, "
        f"codec {'/'.join(codecs)}" + ", attention" * spec["attention"],
        f"      bytes     {human(store['bytes'])}; a crop: {human(per_crop['float16'])} as float16 -> "
        f"{human(per_crop['quantised'])} quantised -> {on_disk} on disk",
        "      fidelity  standardised error of a token, in %: layer (median / p99 / worst)",
    ]
    for layer in store["fidelity"]:
        lines.append(f"                {layer['layer']:>2}  ({layer['median']:.2%} / {layer['p99']:.2%} / {layer['worst']:.2%})")
    return lines
