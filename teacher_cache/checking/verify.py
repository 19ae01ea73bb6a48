"""Is every byte of a cache the byte that was written, and does what is recorded in different places agree?

What one file cannot say of itself another says of it: cache.json, checksums.json and store.json name the SHA-256 of small files,
crops.npy the CRC-32C of every crop, commit records size and CRC-32 of every shard file; each of these carries its own checksum,
and spare.tar repeats the small ones. Everything is read once, shards and crops by several threads. view_check.py and
store_check.py look into one view and one store, writers.py says where somebody was writing meanwhile.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..cache import Cache
from ..errors import CacheCorruptError, NotAllowedError, TeacherCacheError, UsageError
from ..files.claims import holder_of
from ..files.durable import ASIDE, allowed_by, link_fault
from ..format import layout
from ..format.layout import CROPS_CLAIM, SPARE, WORK, store_name, view_path
from ..terminal.progress import progress
from .advice import when_lost
from .findings import Checked, Finding, without
from .policy import check_small_files, check_spare
from .small_files import SmallFiles
from .store_check import check_store
from .view_check import check_view
from .writers import Snapshot, left_claims

RUN_AGAIN = "Run the same command again."
STRAY = "belongs to nothing in this cache. Remove it."


def open_cache(path: Path) -> tuple[Cache | None, list[Finding]]:
    """The cache at `path`; or None, and what is wrong with its cache.json, without which nothing else can be checked.

    Raises UsageError where there is no cache, BadInputError for one of another format version.
    """
    holder = holder_of(path / CROPS_CLAIM)
    try:
        return Cache(path), []
    except (CacheCorruptError, UsageError) as error:
        if holder is not None:
            return None, [Finding("unfinished", str(path), f"{holder} is at work on it: its crops are not finished.", holder)]
        if isinstance(error, UsageError):
            raise
        wrong = "its own checksum or its content does not fit." if (path / layout.CACHE_JSON).exists() else "is missing."
        if SmallFiles(path, "cache").lost:
            wrong += f" Its copy in {SPARE} is lost too. {when_lost(path, 'cache')}"
        return None, [Finding("damaged", str(path / layout.CACHE_JSON), f"{wrong} Nothing else was checked.")]


def verify_folder(path: Path, sample: int | None = None, seed: int | None = None) -> tuple[list[Finding], Checked]:
    """`verify` of the cache at `path`, also of one that `open_cache` cannot open."""
    cache, findings = open_cache(path)
    return (findings, Checked(1)) if cache is None else verify(cache, sample, seed)


def verify(cache: Cache, sample: int | None = None, seed: int | None = None) -> tuple[list[Finding], Checked]:
    """Check a whole cache; returns what was found, and how much was checked. No finding: it is sound and complete.

    Every file below the cache is either checked against a record or reported. sample: of each store and of the crops of each view
    only so many rows, drawn at random (from `seed`, if given), besides all small files, sizes, headers and indices.
    """
    draws, before = np.random.default_rng(seed), Snapshot(cache.path)
    sizes, findings, seen, checked = before.sizes, [], set(), Checked()
    unit = "B" if sample is None else "files"
    with progress("verify", sum(sizes.values()) if sample is None else len(sizes), unit) as advance:
        for folder, check in _checks(cache, sample, draws, checked):
            try:
                for finding in check:
                    if finding.path in sizes and finding.path not in seen:
                        advance(sizes[finding.path] if sample is None else 1)
                    seen.add(finding.path)
                    if finding.kind != "sound":
                        findings.append(finding)
            except (NotAllowedError, PermissionError) as error:  # of bytes that may not be read nothing is known
                findings.append(Finding("unchecked", str(folder), f"could not be checked: {allowed_by(error)}"))
            except (TeacherCacheError, OSError) as error:
                findings.append(Finding("damaged", str(folder), without(folder, error)))
    findings += _rest(sizes, seen, findings)
    checked.n_files = len(seen & sizes.keys())
    checked.n_bytes = sum(sizes[path] for path in seen & sizes.keys()) if sample is None else None
    return list(before.without_busy(findings)), checked


def _rest(sizes: dict[str, int], seen: set[str], findings: list[Finding]) -> Iterator[Finding]:
    """What no check has looked at. One finding speaks for all that lies below it, but not for links."""
    damaged, below = {f.path for f in findings if f.kind == "damaged"}, tuple(f"{finding.path}/" for finding in findings)
    for file in sizes:
        if file not in damaged and (wrong := link_fault(Path(file))):
            yield Finding("unknown", file, wrong)
        elif file not in seen and not file.startswith(below):
            yield _left_over(file) if file.endswith(ASIDE) else Finding("unknown", file, STRAY)


def _checks(cache: Cache, sample: int | None, draws: np.random.Generator, checked: Checked
            ) -> Iterator[tuple[Path, Iterator[Finding]]]:  # fmt: skip
    """A folder and the findings in it, for each part of the cache; unfinished things first."""
    yield cache.path, _unfinished(cache)
    yield cache.path, left_claims(cache.path)
    yield cache.path, _lists(cache)
    try:
        labels = cache.images().labels
    except (CacheCorruptError, FileNotFoundError):  # a finding of _lists
        labels = None
    for view in cache.views_on_disk():
        yield view.path, check_view(view, labels, sample, draws, checked)
        for store in sorted(path for path in view.path.glob(layout.STORES) if not path.is_symlink()):
            yield store, check_store(view, store, sample, draws, checked)


def _unfinished(cache: Cache) -> Iterator[Finding]:
    """What is not there yet, or was left by an interrupted writer; begun stores and claims tell of themselves."""
    yield from _missing(cache)
    if (cache.path / WORK).exists():
        yield Finding("unfinished", str(cache.path / WORK), f"a crop stage was begun and not finished. {RUN_AGAIN}")
    left = (cache.path.glob(pattern) for pattern in (f"*{ASIDE}", f"{layout.VIEWS}/*{ASIDE}"))  # in a store, the store says it
    for aside in sorted(itertools.chain(*left)):
        if aside.name != WORK:
            yield _left_over(str(aside))


def _missing(cache: Cache) -> Iterator[Finding]:
    """The first view that is not there although a later one is, and stores that only some views have."""
    there = cache.views_on_disk()
    views = {view.number: view.path for view in there}
    if not any(view.is_cropped for view in there):
        yield Finding("unfinished", str(view_path(cache.path, 0)), "the cache has no finished view.")
        return
    gap = next(number for number in range(len(views) + 1) if number not in views)
    if gap < max(views) and not view_path(cache.path, gap).is_symlink():
        views[gap] = view_path(cache.path, gap)
        yield Finding("unfinished", str(views[gap]), f"there is no view {gap}, but there is a view {max(views)}.")
    names = {view: {path.name for path in views[view].glob(layout.STORES)} for view in sorted(views)}
    for name in sorted(set().union(*names.values())):
        having = next(view for view in names if name in names[view])
        for view in names:
            if name not in names[view]:
                message = f"view {view} has no store of {store_name(name)}, but view {having} has one."
                yield Finding("unfinished", str(views[view] / name), message)


def _left_over(path: str) -> Finding:
    return Finding("unfinished", path, f"left by an interrupted writer, or by remove. {RUN_AGAIN[:-1]}, or remove it.")


def _lists(cache: Cache) -> Iterator[Finding]:
    files = SmallFiles(cache.path, "cache")
    yield from check_small_files(files)
    yield check_spare(files)
    if not files.wrong:
        cache.images()
