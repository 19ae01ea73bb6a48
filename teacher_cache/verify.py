"""Is every byte of a cache the byte that was written? Reads everything once, at the speed of the disk and CRC-32C.

What one file cannot say of itself another says of it: cache.json and store.json name the SHA-256 of small files, crops.npy the
CRC-32C of every crop, commit records size and CRC-32C of every shard file, and each of these carries its own checksum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .beton import CropReader, tables_sha256
from .cache import Cache, View
from .commits import is_complete, read_commits, shard_file
from .durable import ASIDE, crc32c, read_sealed, sha256_file
from .errors import TeacherCacheError
from .progress import progress
from .store import Manifest, read_manifest

CHUNK = 1 << 22  # bytes read at a time


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (`damaged`) or not there yet (`unfinished`)."""

    kind: str
    path: str
    message: str


def verify(cache: Cache) -> tuple[list[Finding], int]:
    """Check a whole cache; returns what was found, and the number of files checked. No finding: it is sound."""
    findings: list[Finding] = []
    n_files = 0
    views = cache.views()
    total = sum(file.stat().st_size for file in cache.path.rglob("*") if file.is_file())
    with progress("verify", total, "B") as advance:
        for check in _checks(cache, views):
            try:
                for path, wrong in check:
                    n_files += 1
                    advance(path.stat().st_size if path.exists() else 0)
                    if wrong:
                        findings.append(Finding("damaged", str(path), wrong))
            except (TeacherCacheError, OSError) as error:
                findings.append(Finding("damaged", str(cache.path), str(error)))
    for view in views:
        for name in view.store_names():
            if not is_complete(view.store_path(name)):
                findings.append(_unfinished(view.store_path(name)))
    if (cache.path / "crops.partial").exists():
        findings.append(Finding("unfinished", str(cache.path / "crops.partial"), "a crop stage was begun and not finished."))
    if not views:
        findings.append(Finding("unfinished", str(cache.path), "it has no finished view."))
    return findings, n_files


def _checks(cache: Cache, views: list[View]) -> Iterator[Iterator[tuple[Path, str | None]]]:
    """One iterator a part of the cache, each giving (file, what is wrong with it or None)."""
    yield _hashed(cache.path, cache.files)
    yield _identity(cache)
    for view in views:
        yield _view_files(view)
        yield _crop_bytes(view)
        for name in view.store_names():
            store = view.store_path(name)
            yield _hashed(store, read_sealed(store / "store.json")["files"], {"store.json", "complete.json", "shards.npy"})
            yield _shards(store)
            yield _belongs(view, store)


def _hashed(folder: Path, files: dict[str, str], sealed: set[str] = frozenset()) -> Iterator[tuple[Path, str | None]]:
    """Files whose SHA-256 is on record, and sealed files beside them."""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            yield path, "is missing."
        else:
            yield path, None if sha256_file(path) == expected else "its SHA-256 is not the recorded one."
    for name in sealed:
        if (folder / name).exists() and name.endswith(".json"):
            read_sealed(folder / name)


def _identity(cache: Cache) -> Iterator[tuple[Path, str | None]]:
    cache.images()
    yield cache.path / "cache.json", None


def _view_files(view: View) -> Iterator[tuple[Path, str | None]]:
    record = read_sealed(view.path / "checksums.json")
    yield from _hashed(view.path, record["files"])
    if record["crops_id"] != view.cache.crops_id:
        yield view.path / "checksums.json", f"names crops {record['crops_id'][:12]}, the cache is {view.cache.crops_id[:12]}."
    beton, path = record["crops.beton"], view.path / "crops.beton"
    if not path.is_file():
        yield path, "is missing."
    elif path.stat().st_size != beton["bytes"]:
        yield path, f"has {path.stat().st_size} bytes, {beton['bytes']} were written."
    elif tables_sha256(path) != beton["tables_sha256"]:
        yield path, "its tables are not those that were written."


def _crop_bytes(view: View) -> Iterator[tuple[Path, str | None]]:
    """The CRC-32C of every encoded crop, and the labels."""
    reader = CropReader(view.path)
    bad = [
        row
        for row, (start, size, crc) in enumerate(zip(reader.pointers.tolist(), reader.sizes.tolist(), reader.crcs, strict=True))
        if crc32c(reader.bytes[start : start + size].tobytes()) != crc
    ]
    message = f"{len(bad)} damaged crops, rows {bad[:5]}{' ...' if len(bad) > 5 else ''}." if bad else None
    if not bad and not np.array_equal(reader.labels, view.cache.images().labels):
        message = "its labels are not those of labels.npy."
    yield reader.path, message


def _shards(store: Path) -> Iterator[tuple[Path, str | None]]:
    """Size and CRC-32C of every shard file against the commit records."""
    manifest = read_manifest(store)
    spec = manifest.store
    files, finished = read_commits(store, spec)
    for shard in np.flatnonzero(finished).tolist():
        for column, array in enumerate(spec.array_names):
            n_dims = 1 + len(spec.row_shape(array, manifest.teacher))
            yield _shard(shard_file(store, array, shard, n_dims), files[shard, column])


def _shard(path: Path, record) -> tuple[Path, str | None]:
    if not path.is_file():
        return path, "is missing."
    size = path.stat().st_size
    if size != record["bytes"]:
        return path, f"has {size} bytes, {record['bytes']} were committed."
    crc = 0
    with open(path, "rb") as file:
        while data := file.read(CHUNK):
            crc = crc32c(data, crc)
    return path, None if crc == record["crc32c"] else "its CRC-32C is not the committed one."


def _belongs(view: View, store: Path) -> Iterator[tuple[Path, str | None]]:
    """The store was made from the crops of this view."""
    manifest: Manifest = read_manifest(store)
    wrong = None
    if (manifest.crops_id, manifest.crops_sha256, manifest.view) != (view.cache.crops_id, view.crops_sha256, view.number):
        wrong = "was made from other crops than those beside it."
    elif manifest.store.n_rows != view.cache.n_images:
        wrong = f"has {manifest.store.n_rows} rows, the cache {view.cache.n_images} images."
    yield store / "zarr.json", wrong


def _unfinished(store: Path) -> Finding:
    manifest = read_manifest(store)
    _, finished = read_commits(store, manifest.store)
    left = sum(1 for _ in store.rglob(f"*{ASIDE}"))
    return Finding(
        "unfinished", str(store),
        f"{finished.sum()} of {len(finished)} shards are finished{f', {left} files aside' if left else ''}. "
        "Run the same teacher-cache extract command again.",
    )  # fmt: skip
