"""Is every byte of a cache the byte that was written, and does what is recorded in different places agree?

What one file cannot say of itself another says of it: cache.json, checksums.json and store.json name the SHA-256 of small files,
crops.npy the CRC-32C of every crop, commit records size and CRC-32 of every shard file; each of these carries its own checksum,
and spare.tar repeats the small ones. Everything is read once, shards and crops by several threads.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .beton import CropReader, read_checksums, tables_sha256
from .cache import Cache, View
from .commits import FILE_DTYPE, is_complete, read_commits, read_record
from .cropping import CLAIM, WORK
from .durable import ASIDE, crc32c, read_sealed
from .errors import CacheCorruptError, MismatchError, TeacherCacheError
from .progress import progress
from .quantize import ChannelStatistics
from .shard_check import ArrayCheck
from .small_files import SmallFiles
from .spare import SPARE
from .spec import StoreSpec
from .store import (
    Manifest,
    is_same_json,
    manifest_sha256,
    read_manifest,
    read_small_array,
    shared_sha256,
    small_array_shapes,
    small_files,
)

BLOCK = 4 << 20  # bytes of crops that a thread reads at a time
AGAIN = "Run the same command again."
STRAY = "belongs to nothing in this cache. Remove it."


@dataclass(frozen=True)
class Finding:
    """What was found out about one file or folder."""

    kind: str
    """`damaged`; `unfinished`: not all there yet; `unknown`: nothing that this program wrote; `foreign`: sound, but this machine
    decodes it to other pixels than the teacher saw; `unchecked`: a comparison that was asked for and cannot be made (again.py);
    `sound` while verify is at work."""
    path: str
    message: str


def open_cache(path: Path) -> tuple[Cache | None, list[Finding]]:
    """The cache at `path`; or None, and what is wrong with its cache.json, without which nothing else can be checked.

    Raises UsageError where there is no cache, BadInputError for one of another format version.
    """
    try:
        return Cache(path), []
    except CacheCorruptError:
        wrong = "its own checksum or its content does not fit." if (path / "cache.json").exists() else "is missing."
        return None, [Finding("damaged", str(path / "cache.json"), f"{wrong} Nothing else was checked.")]


def verify_folder(path: Path, sample: int | None = None, seed: int | None = None) -> tuple[list[Finding], int]:
    """`verify` of the cache at `path`, also of one that `open_cache` cannot open."""
    cache, findings = open_cache(path)
    return (findings, 1) if cache is None else verify(cache, sample, seed)


def verify(cache: Cache, sample: int | None = None, seed: int | None = None) -> tuple[list[Finding], int]:
    """Check a whole cache; returns what was found, and the number of files checked. No finding: it is sound and complete.

    Every file below the cache is either checked against a record or reported. sample: of each store and of the crops of each view
    only so many rows, drawn at random (from `seed`, if given), besides all small files, sizes, headers and indices.
    """
    draws = np.random.default_rng(seed)
    sizes = {str(path): status.st_size for path, status in _entries(cache.path) if not stat.S_ISDIR(status.st_mode)}
    findings: list[Finding] = []
    checked: set[str] = set()
    unit = "B" if sample is None else "files"
    with progress("verify", sum(sizes.values()) if sample is None else len(sizes), unit) as advance:
        for folder, check in _checks(cache, sample, draws):
            try:
                for finding in check:
                    if finding.path in sizes and finding.path not in checked:
                        advance(sizes[finding.path] if sample is None else 1)
                    checked.add(finding.path)
                    if finding.kind != "sound":
                        findings.append(finding)
            except (TeacherCacheError, OSError) as error:
                findings.append(Finding("damaged", str(folder), _without(folder, error)))
    # one finding speaks for all that lies below it
    told = tuple(f"{finding.path}/" for finding in findings)
    rest = [file for file in sizes if file not in checked and not file.startswith(told)]
    findings += [_left_over(file) if file.endswith(ASIDE) else Finding("unknown", file, STRAY) for file in rest]
    return findings, len(checked & sizes.keys())


def judge_shards(view: View, store: Path) -> tuple[np.ndarray, list[Finding]]:
    """bool [n_shards], the finished shards of a store of `view` in which verify finds no fault; and the faults in the others.

    Raises CacheCorruptError if the small files of the store are not sound.
    """
    manifest = read_manifest(store)
    view.require_own(manifest)
    files, finished, verdicts = _commits(store, manifest.store)
    sound, findings = finished.copy(), [verdict for verdict in verdicts if verdict.kind != "sound"]
    with progress(f"verify {store.name}", int(files["bytes"][finished].sum()), "B") as advance:
        for shard, column, finding in _shards(store, manifest, files, finished, None):
            if finding.kind != "sound":
                sound[shard] = False
                findings.append(finding)
            advance(int(files["bytes"][shard, column]))
    return sound, findings


def _without(path: Path, error: Exception) -> str:
    """An error's text without the path in front, which the finding names."""
    return str(error).removeprefix(f"{path}: ")


def _judge(path: Path, wrong: str | None) -> Finding:
    return Finding("damaged" if wrong else "sound", str(path), wrong or "")


def _checks(cache: Cache, sample: int | None, draws: np.random.Generator) -> Iterator[tuple[Path, Iterator[Finding]]]:
    """A folder and the findings in it, for each part of the cache; unfinished things first."""
    yield cache.path, _unfinished(cache)
    yield cache.path, _links(cache)
    yield cache.path, _lists(cache)
    try:
        labels = cache.images().labels
    except (CacheCorruptError, FileNotFoundError):  # said by _lists
        labels = None
    for view in views_on_disk(cache):
        yield view.path, _view(view, labels, sample, draws)
        for store in sorted(path for path in view.path.glob("*.zarr") if not path.is_symlink()):
            yield store, _store(view, store, sample, draws)


def views_on_disk(cache: Cache) -> list[View]:
    """Every view folder, also one that has lost its checksums.json; none that is a link."""
    folders = sorted(path for path in cache.path.glob("view-*") if path.is_dir() and not path.is_symlink())
    numbers = [path.name.removeprefix("view-") for path in folders]
    views = [cache.view(int(number)) for number in numbers if number.isascii() and number.isdecimal()]
    return [view for view in views if view.path in folders]


def _unfinished(cache: Cache) -> Iterator[Finding]:
    """What an interrupted or running writer leaves, other than a begun store."""
    if not any(view.is_cropped for view in views_on_disk(cache)):
        yield Finding("unfinished", str(cache.path / "view-000"), "the cache has no finished view.")
    if (cache.path / WORK).exists():
        yield Finding("unfinished", str(cache.path / WORK), f"a crop stage was begun and not finished. {AGAIN}")
    for claim in [*cache.path.glob(CLAIM), *cache.path.glob("view-*/*.claim"), *cache.path.glob("view-*/*.claims")]:
        yield Finding("unfinished", str(claim), f"a writer is at work, or was killed. {AGAIN}")
    for aside in sorted([*cache.path.glob(f"*{ASIDE}"), *cache.path.glob(f"view-*/*{ASIDE}")]):  # in a store, the store says it
        if aside.name != WORK:
            yield _left_over(str(aside))


def _left_over(path: str) -> Finding:
    return Finding("unfinished", path, "left by an interrupted writer. Run the same command again, or remove it.")


def _entries(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Everything below `root`, in order; symlinks are not followed."""
    yield from ((path, path.lstat()) for path in sorted(root.rglob("*")))


def _links(cache: Cache) -> Iterator[Finding]:
    for path, status in _entries(cache.path):
        if stat.S_ISLNK(status.st_mode):
            yield Finding("unknown", str(path), f"is a symbolic link to {path.readlink()}. Put the file or folder itself there.")


def _small_files(files: SmallFiles) -> Iterator[Finding]:
    yield from (_judge(files.folder / name, files.wrong.get(name)) for name in files.names)


def _spare(files: SmallFiles) -> Finding:
    return _judge(files.folder / SPARE, files.spare_fault())


def _lists(cache: Cache) -> Iterator[Finding]:
    files = SmallFiles(cache.path, "cache")
    yield from _small_files(files)
    yield _spare(files)
    if not files.wrong:
        cache.images()


def _view(view: View, labels: np.ndarray | None, sample: int | None, draws: np.random.Generator) -> Iterator[Finding]:
    """The small files of a view, and crops.beton: its length, tables, labels, every crop, and how this machine decodes it."""
    files, beton = SmallFiles(view.path, "view"), view.path / "crops.beton"
    yield from _small_files(files)
    yield _spare(files)
    if files.wrong:
        yield _judge(beton, "its crops were not checked: they need a sound crops.npy and checksums.json.")
        return
    sums = read_checksums(view.path)
    if sums["crops_id"] != view.cache.crops_id:
        names = f"names crops {sums['crops_id'][:12]}, the cache is {view.cache.crops_id[:12]}."
        yield _judge(view.path / "checksums.json", names)
    if not beton.is_file():
        yield _judge(beton, "is missing.")
    elif beton.stat().st_size != sums["crops.beton"]["bytes"]:
        yield _judge(beton, f"has {beton.stat().st_size} bytes, {sums['crops.beton']['bytes']} were written.")
    elif not has_tables(beton, sums["crops.beton"]["tables_sha256"]):
        yield _judge(beton, "its tables or padding are not those that were written.")
    else:
        yield _crops(view, labels, sample, draws)


def _crops(view: View, labels: np.ndarray | None, sample: int | None, draws: np.random.Generator) -> Finding:
    """The verdict on a crops.beton whose tables are sound. labels: of the cache, None if they are damaged."""
    reader = CropReader(view.path)
    if len(reader) != view.cache.n_images:
        return _judge(reader.path, f"has {len(reader)} rows, the cache {view.cache.n_images}.")
    if labels is not None and not np.array_equal(reader.labels, labels):
        return _judge(reader.path, "its labels are not those of labels.npy.")
    rows = np.arange(len(reader)) if sample is None else draw_rows(len(reader), sample, draws)
    bad = damaged_crops(reader.path, reader.pointers, reader.sizes, reader.crcs, rows)
    if bad:
        return _judge(reader.path, f"{len(bad)} damaged crops, rows {bad[:5]}{' ...' if len(bad) > 5 else ''}.")
    try:
        reader.require_same_decoder()
    except MismatchError as error:
        return Finding("foreign", str(reader.path), _without(reader.path, error))
    except CacheCorruptError as error:  # one that is not in the sample
        return _judge(reader.path, _without(reader.path, error))
    return _judge(reader.path, None)


def has_tables(beton: Path, sha256: str) -> bool:
    """Whether all of a crops.beton that is no crop is as recorded."""
    try:
        return tables_sha256(beton) == sha256
    except CacheCorruptError:
        return False


def damaged_crops(path: Path, pointers: np.ndarray, sizes: np.ndarray, crcs: np.ndarray, rows: np.ndarray) -> list[int]:
    """Those of `rows` whose encoded crop in `path` does not have its CRC-32C, also because the file ends before it.

    pointers, sizes, crcs: of all rows. rows: ascending; neighbours are read together.
    """
    blocks, ends = [], pointers + sizes
    begin = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1 or ends[rows[i]] - pointers[rows[begin]] > BLOCK:
            blocks.append(rows[begin:i].tolist())
            begin = i

    def damaged(block: list[int]) -> list[int]:
        start, end = int(pointers[block[0]]), int(ends[block[-1]])
        data = np.frombuffer(os.pread(file.fileno(), end - start, start), "u1")
        places = [(row, int(pointers[row]) - start, int(sizes[row])) for row in block]
        return [row for row, place, size in places if crc32c(data[place : place + size]) != crcs[row]]

    with open(path, "rb") as file:
        return [row for bad in in_threads(damaged, blocks) for row in bad]


def draw_rows(n_rows: int, sample: int, draws: np.random.Generator) -> np.ndarray:
    """`sample` different rows of n_rows, ascending; all if there are no more."""
    return np.sort(draws.permutation(n_rows)[:sample])


def in_threads(function: Callable, items: Iterable) -> Iterator:
    """`map` on as many threads as there are processors; reading, CRC-32 and decompression work without the GIL."""
    pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="verify")
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)


def _store(view: View, store: Path, sample: int | None, draws: np.random.Generator) -> Iterator[Finding]:
    """The small files of a store, what they say, what it was made from, its commit records and every shard file."""
    small, is_folding = SmallFiles(store, "store"), is_complete(store) and (store / "commits").exists()
    yield from _small_files(small)
    if is_folding:  # after complete.json, spare.tar is written again and commits/ removed
        yield Finding("sound", str(small.folder / SPARE), "")
        yield Finding("unfinished", str(store / "commits"), f"was left when the store was being completed. {AGAIN}")
    else:
        yield _spare(small)
    if {"store.json", "zarr.json", "complete.json", "shards.npy"} & small.wrong.keys():
        yield Finding("damaged", str(store), "its shards were not checked: that needs the small files named above.")
        return
    manifest = read_manifest(store)
    view.require_own(manifest)
    if not small.wrong:
        yield from _contradictions(view, store, manifest)

    spec = manifest.store
    files, finished, verdicts = _commits(store, spec)
    yield from verdicts
    rows = np.flatnonzero(finished[np.arange(spec.n_rows) // spec.shard_rows])
    drawn = None if sample is None else rows[draw_rows(len(rows), sample, draws)]
    for _, _, finding in _shards(store, manifest, files, finished, drawn):
        yield finding
    if not is_complete(store):
        message = f"{finished.sum()} of {len(finished)} shards are finished. Run the same teacher-cache extract command again."
        yield Finding("unfinished", str(store), message)


def _contradictions(view: View, store: Path, manifest: Manifest) -> Iterator[Finding]:
    """What sound small files of a store say that does not fit together or cannot be used."""
    values = {}
    for name in small_array_shapes(manifest):
        try:
            values[name] = read_small_array(store, name)  # as the manifest has it, and finite
        except CacheCorruptError as error:
            yield _judge(store / name, _without(store / name, error))
            return
        if name.endswith("/spread") and not (values[name] > 0).all():
            yield _judge(store / name, "holds spreads that are not positive.")
    if hashlib.sha256(values["probe"].tobytes()).hexdigest() != manifest.probe_sha256:
        yield _judge(store / "probe", "its SHA-256 is not the one that the manifest names.")

    layers = manifest.store.layers if manifest.store.is_quantised else ()
    statistics = {i: ChannelStatistics(values[f"quant/{i:02d}/centre"], values[f"quant/{i:02d}/spread"]) for i in layers}
    head = {name.removeprefix("head/"): array for name, array in values.items() if name.startswith("head/")}
    expected = small_files(manifest, statistics, head, values["probe"])
    on_record = read_sealed(store / "store.json")["files"].keys()
    if expected.keys() != on_record:
        odd = ", ".join(sorted(expected.keys() ^ on_record))
        yield _judge(store / "store.json", f"does not list the files of such a store: {odd}.")
    for name in sorted(expected.keys() & on_record):
        if name.endswith("zarr.json") and not is_same_json((store / name).read_bytes(), expected[name]):
            yield _judge(store / name, "does not describe what the manifest says.")
    first = view.cache.view(0).path / store.name
    if first != store and _shared(first) not in (None, _shared(store)):
        yield _judge(store / "store.json", f"its quantiser, head or probe is not that of {first}.")


def _shared(store: Path) -> dict[str, str] | None:
    """What all views of a teacher share, by name and SHA-256; None where there is no such store, or it cannot say."""
    try:
        return shared_sha256(store)
    except (FileNotFoundError, CacheCorruptError):
        return None


def _commits(store: Path, spec: StoreSpec) -> tuple[np.ndarray, np.ndarray, list[Finding]]:
    """FILE_DTYPE [n_shards, n_arrays]; bool [n_shards], which are finished; and a verdict on each commit record.

    A shard whose record is damaged is not finished.
    """
    if is_complete(store) or not (store / "commits").exists():  # with neither, it raises
        return *read_commits(store, spec), []
    files, finished = np.zeros((spec.n_shards, len(spec.array_names)), FILE_DTYPE), np.zeros(spec.n_shards, bool)
    verdicts = []
    for path in sorted((store / "commits").glob("*.json")):
        try:
            shard, record = read_record(path, spec)
        except CacheCorruptError as error:
            verdicts.append(_judge(path, _without(path, error)))
        else:
            files[shard], finished[shard] = record, True
            verdicts.append(_judge(path, None))
    return files, finished, verdicts


def _shards(store: Path, manifest: Manifest, files: np.ndarray, finished: np.ndarray, sample: np.ndarray | None
            ) -> Iterator[tuple[int, int, Finding]]:  # fmt: skip
    """(shard, column, verdict) of every file of every finished shard. sample: rows to check, None for all."""
    arrays = [ArrayCheck(store, manifest, array, manifest_sha256(store), sample) for array in manifest.store.array_names]
    places = [(shard, column) for shard in np.flatnonzero(finished).tolist() for column in range(len(arrays))]

    def check(place: tuple[int, int]) -> tuple[int, int, Finding]:
        shard, column = place
        return shard, column, _judge(arrays[column].path(shard), arrays[column].fault(shard, files[shard, column]))

    return in_threads(check, places)
