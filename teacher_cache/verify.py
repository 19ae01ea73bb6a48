"""Is every byte of a cache the byte that was written? Reads everything once, at the speed of the disk and CRC-32C.

What one file cannot say of itself another says of it: cache.json and store.json name the SHA-256 of small files, crops.npy the
CRC-32C of every crop, commit records size and CRC-32 of every shard file, and each of these carries its own checksum.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .beton import CropReader, tables_sha256
from .cache import Cache, View
from .commits import is_complete, read_commits, shard_file
from .cropping import CLAIM, WORK
from .durable import ASIDE, crc32c, read_sealed, sha256_file
from .errors import TeacherCacheError
from .progress import progress
from .spec import StoreSpec
from .store import read_manifest

CHUNK = 1 << 22  # bytes read at a time


@dataclass(frozen=True)
class Finding:
    """What was found out about one file or folder."""

    kind: str
    """`damaged`; `unfinished`: not all there yet; `unknown`: nothing that this program wrote; `sound` while it is at work."""
    path: str
    message: str


def verify(cache: Cache) -> tuple[list[Finding], int]:
    """Check a whole cache; returns what was found, and the number of files checked. No finding: it is sound and complete.

    Every file below the cache is either checked against a record or reported.
    """
    sizes = {str(file): file.stat().st_size for file in sorted(cache.path.rglob("*")) if file.is_file()}
    findings: list[Finding] = []
    checked: set[str] = set()
    with progress("verify", sum(sizes.values()), "B") as advance:
        for folder, check in _checks(cache):
            try:
                for finding in check:
                    if finding.path not in checked:
                        advance(sizes.get(finding.path, 0))
                    checked.add(finding.path)
                    if finding.kind != "sound":
                        findings.append(finding)
            except (TeacherCacheError, OSError) as error:
                findings.append(Finding("damaged", str(folder), str(error)))
    # one finding speaks for all that lies below it
    told = tuple(f"{finding.path}/" for finding in findings)
    rest = [file for file in sizes if file not in checked and not file.startswith(told)]
    findings += [Finding("unknown", file, "belongs to nothing in this cache. Remove it.") for file in rest]
    return findings, len(checked & sizes.keys())


def _judge(path: Path, wrong: str | None) -> Finding:
    return Finding("damaged" if wrong else "sound", str(path), wrong or "")


def _checks(cache: Cache) -> Iterator[tuple[Path, Iterator[Finding]]]:
    """A folder and the findings in it, for each part of the cache; unfinished things first."""
    yield cache.path, _unfinished(cache)
    yield cache.path, _lists(cache)
    for path in sorted(cache.path.glob("view-*")):
        if path.name.removeprefix("view-").isdecimal():
            view = cache.view(int(path.name.removeprefix("view-")))
            yield view.path, _crops(view)
            for store in sorted(view.path.glob("*.zarr")):
                yield store, _store(view, store)


def _unfinished(cache: Cache) -> Iterator[Finding]:
    """What an interrupted or running writer leaves, other than a begun store."""
    if not cache.views():
        yield Finding("unfinished", str(cache.path / "view-000"), "the cache has no finished view.")
    if (cache.path / WORK).exists():
        message = "a crop stage was begun and not finished. Run the same command again."
        yield Finding("unfinished", str(cache.path / WORK), message)
    for claim in [*cache.path.glob(CLAIM), *cache.path.glob("view-*/*.claim")]:
        yield Finding("unfinished", str(claim), "a writer is at work, or was killed. Run the same command again.")
    for aside in sorted([*cache.path.glob(f"*{ASIDE}"), *cache.path.glob(f"view-*/*{ASIDE}")]):  # in a store, the store says it
        if aside.name != WORK:
            yield Finding("unfinished", str(aside), "left by an interrupted writer. Run the same command again, or remove it.")


def _hashed(folder: Path, files: dict[str, str]) -> Iterator[Finding]:
    """Files whose SHA-256 is on record."""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            yield _judge(path, "is missing.")
        else:
            yield _judge(path, None if sha256_file(path) == expected else "its SHA-256 is not the recorded one.")


def _lists(cache: Cache) -> Iterator[Finding]:
    yield _judge(cache.path / "cache.json", None)  # opening the cache has checked it
    verdicts = list(_hashed(cache.path, cache.files))
    yield from verdicts
    if all(verdict.kind == "sound" for verdict in verdicts):
        cache.images()


def _crops(view: View) -> Iterator[Finding]:
    """checksums.json, crops.npy, and of crops.beton the tables, the CRC-32C of every encoded crop and the labels."""
    record, beton = view.path / "checksums.json", view.path / "crops.beton"
    if not record.exists():
        yield _judge(record, "is missing.")
        return
    sums = read_sealed(record)
    same = sums["crops_id"] == view.cache.crops_id
    yield _judge(record, None if same else f"names crops {sums['crops_id'][:12]}, the cache is {view.cache.crops_id[:12]}.")
    verdicts = list(_hashed(view.path, sums["files"]))
    yield from verdicts

    if not beton.is_file():
        yield _judge(beton, "is missing.")
    elif beton.stat().st_size != sums["crops.beton"]["bytes"]:
        yield _judge(beton, f"has {beton.stat().st_size} bytes, {sums['crops.beton']['bytes']} were written.")
    elif tables_sha256(beton) != sums["crops.beton"]["tables_sha256"]:
        yield _judge(beton, "its tables or padding are not those that were written.")
    elif any(verdict.kind != "sound" for verdict in verdicts):
        yield _judge(beton, "its crops cannot be checked without a sound crops.npy.")
    else:
        yield _judge(beton, _damaged_crops(view))


def _damaged_crops(view: View) -> str | None:
    reader = CropReader(view.path)
    bad = [
        row
        for row, (start, size, crc) in enumerate(zip(reader.pointers.tolist(), reader.sizes.tolist(), reader.crcs, strict=True))
        if crc32c(reader.bytes[start : start + size].tobytes()) != crc
    ]
    if bad:
        return f"{len(bad)} damaged crops, rows {bad[:5]}{' ...' if len(bad) > 5 else ''}."
    if not np.array_equal(reader.labels, view.cache.images().labels):
        return "its labels are not those of labels.npy."
    return None


def _store(view: View, store: Path) -> Iterator[Finding]:
    """The small files of a store, what it was made from, its commit records and every shard file."""
    if not (store / "store.json").exists():
        yield _judge(store / "store.json", "is missing.")
        return
    yield _judge(store / "store.json", None)
    yield from _hashed(store, read_sealed(store / "store.json")["files"])
    manifest = read_manifest(store)
    view.require_own(manifest)
    spec = manifest.store
    files, finished = read_commits(store, spec)
    yield from (_judge(record, None) for record in _records(store, spec, finished))
    for shard in np.flatnonzero(finished).tolist():
        for column, array in enumerate(spec.array_names):
            n_dims = 1 + len(spec.row_shape(array, manifest.teacher))
            path = shard_file(store, array, shard, n_dims)
            yield _judge(path, _damaged_shard(path, files[shard, column]))
    if not is_complete(store):
        message = f"{finished.sum()} of {len(finished)} shards are finished. Run the same teacher-cache extract command again."
        yield Finding("unfinished", str(store), message)


def _records(store: Path, spec: StoreSpec, finished: np.ndarray) -> list[Path]:
    """The files that `read_commits` has just found to be right."""
    if is_complete(store):
        return [store / "complete.json", store / "shards.npy"]
    return [store / "commits" / f"{shard:06d}.json" for shard in np.flatnonzero(finished)]


def _damaged_shard(path: Path, record) -> str | None:
    if not path.is_file():
        return "is missing."
    size = path.stat().st_size
    if size != record["bytes"]:
        return f"has {size} bytes, {record['bytes']} were committed."
    crc = 0
    with open(path, "rb") as file:
        while data := file.read(CHUNK):
            crc = zlib.crc32(data, crc)
    return None if crc == record["crc32"] else "its CRC-32 is not the committed one."
