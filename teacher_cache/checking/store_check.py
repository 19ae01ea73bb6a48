"""Is a store what was written: its small files and what they say together, its commit records, every shard file?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..cache import View
from ..errors import CacheCorruptError
from ..format import layout
from ..format.layout import SPARE
from ..store.commits import FILE_DTYPE, read_record
from ..store.manifest import small_array_shapes, small_files
from ..store.store import Store, begun_files, is_complete, is_same_json, shared_files
from ..terminal.progress import progress
from .advice import when_lost
from .findings import Checked, Finding, judge, without
from .policy import check_small_files, check_spare, draw_rows, in_threads
from .shard_check import ArrayCheck
from .small_files import SmallFiles


def check_store(view: View, path: Path, sample: int | None, draws: np.random.Generator, checked: Checked) -> Iterator[Finding]:
    """The small files of the store in `path`, what they say, what it was made from, its commit records and every shard file.

    A shard is `damaged` only if it is still declared finished after it was looked at.
    """
    small, commits = SmallFiles(path, "store"), path / layout.COMMITS
    is_folding = is_complete(path) and commits.exists()
    yield from check_small_files(small)
    if is_folding:  # after complete.json, spare.tar is written again and commits/ removed
        yield Finding("sound", str(small.folder / SPARE), "")
        yield Finding("unfinished", str(commits), "was left when the store was being completed. Run the same command again.")
    else:
        yield check_spare(small)
    if not is_complete(path) and not commits.exists() and layout.COMPLETE_JSON not in small.wrong:
        lost = f"the list of its finished shards (complete.json or commits/), and its copy in {SPARE}, are lost."
        yield Finding("damaged", str(path), f"{lost} {when_lost(path, 'store')}")
        return
    if {layout.STORE_JSON, layout.ZARR_JSON, layout.COMPLETE_JSON, layout.SHARDS_NPY} & small.wrong.keys():
        yield Finding("damaged", str(path), "its shards were not checked: that needs the small files named above.")
        return
    store = Store.open(path)
    if layout.CHECKSUMS_JSON not in SmallFiles(view.path, "view").wrong:  # else that is a finding of the view
        view.require_own(store.manifest)
    if not small.wrong:
        yield from _contradictions(view, store)

    files, finished, verdicts = _commits(store)
    yield from verdicts
    rows = np.flatnonzero(finished[np.arange(store.spec.n_rows) // store.spec.shard_rows])
    drawn = None if sample is None else rows[draw_rows(len(rows), sample, draws)]
    checked.rows[f"{view.path.name}/{path.name}"] = len(rows if drawn is None else drawn)
    for shard, _, finding in _shards(store, files, finished, drawn):
        if finding.kind == "sound" or _is_still_finished(store, shard, files):
            yield finding
    if not store.is_complete:
        message = f"{finished.sum()} of {len(finished)} shards are finished. Run the same teacher-cache extract command again."
        yield Finding("unfinished", str(path), message)


def _is_still_finished(store: Store, shard: int, files: np.ndarray) -> bool:
    """Whether the record of a shard is what it was; a repair takes it back before the shard is made again."""
    if store.is_complete:
        return np.array_equal(store.read_commits().files[shard], files[shard])
    try:
        store.require_unchanged()
        _, record, _ = read_record(layout.record_path(store.path, shard), store.spec, store.has_fp32_rows)
    except (CacheCorruptError, OSError):
        return False
    return np.array_equal(record, files[shard])


def judge_shards(view: View, store: Store) -> tuple[np.ndarray, list[Finding]]:
    """bool [n_shards], the finished shards of a store of `view` in which verify finds no fault; and the faults in the others.

    Raises CacheCorruptError if the small files of the store are not sound.
    """
    view.require_own(store.manifest)
    files, finished, verdicts = _commits(store)
    sound, findings = finished.copy(), [verdict for verdict in verdicts if verdict.kind != "sound"]
    with progress(f"verify {store.path.name}", int(files["bytes"][finished].sum()), "B") as advance:
        for shard, column, finding in _shards(store, files, finished, None):
            if finding.kind != "sound":
                sound[shard] = False
                findings.append(finding)
            advance(int(files["bytes"][shard, column]))
    return sound, findings


def _contradictions(view: View, store: Store) -> Iterator[Finding]:
    """What sound small files of a store say that does not fit together or cannot be used."""
    path, manifest, values = store.path, store.manifest, {}
    for name in small_array_shapes(manifest):
        try:
            values[name] = store.small_array(name)  # as the manifest has it, and finite
        except CacheCorruptError as error:
            yield judge(path / name, without(path / name, error))
            return
        if name.endswith("/spread") and not (values[name] > 0).all():
            yield judge(path / name, "holds spreads that are not positive.")
    if hashlib.sha256(values[layout.PROBE].tobytes()).hexdigest() != manifest.probe_sha256:
        yield judge(path / layout.PROBE, "its SHA-256 is not the one that the manifest names.")

    try:
        store.transform()
    except CacheCorruptError as error:
        yield judge(path / layout.QUANT, without(path, error))

    expected = small_files(manifest, values)
    if expected.keys() != store.files.keys():
        odd = ", ".join(sorted(expected.keys() ^ store.files.keys()))
        yield judge(path / layout.STORE_JSON, f"does not list the files of such a store: {odd}.")
    for name in sorted(expected.keys() & store.files.keys()):
        if name.endswith(layout.ZARR_JSON) and not is_same_json((path / name).read_bytes(), expected[name]):
            yield judge(path / name, "does not describe what the manifest says.")
    first = view.cache.view(0).path / path.name
    if first != path and _shared(first) not in (None, store.shared_sha256):
        yield judge(path / layout.STORE_JSON, f"its quantiser, head or probe is not that of {first}.")


def _shared(path: Path) -> dict[str, str] | None:
    """Store.shared_sha256 of the store in `path`; None where there is none, or it cannot say."""
    try:
        return shared_files(begun_files(path))
    except (FileNotFoundError, CacheCorruptError):
        return None


def _commits(store: Store) -> tuple[np.ndarray, np.ndarray, list[Finding]]:
    """FILE_DTYPE [n_shards, n_arrays]; bool [n_shards], which are finished; and a verdict on each commit record.

    A shard whose record is damaged is not finished.
    """
    spec, commits, complete = store.spec, store.path / layout.COMMITS, store.path / layout.COMPLETE_JSON
    if store.is_complete or not commits.exists():  # with neither, it raises
        verdicts = []
        try:
            store.read_fp32_rows()
        except CacheCorruptError as error:
            verdicts.append(judge(complete, without(complete, error)))
        return *store.read_commits(), verdicts
    files, finished = np.zeros((spec.n_shards, len(spec.array_names)), FILE_DTYPE), np.zeros(spec.n_shards, bool)
    verdicts = []
    for path in sorted(commits.glob(layout.RECORDS)):
        try:
            shard, record, _ = read_record(path, spec, store.has_fp32_rows)
        except CacheCorruptError as error:
            verdicts.append(judge(path, without(path, error)))
        else:
            files[shard], finished[shard] = record, True
            verdicts.append(judge(path, None))
    return files, finished, verdicts


def _shards(
    store: Store, files: np.ndarray, finished: np.ndarray, sample: np.ndarray | None
) -> Iterator[tuple[int, int, Finding]]:
    """(shard, column, verdict) of every file of every finished shard. sample: rows to check, None for all."""
    arrays = [ArrayCheck(store, array, sample) for array in store.spec.array_names]
    places = [(shard, column) for shard in np.flatnonzero(finished).tolist() for column in range(len(arrays))]

    def check(place: tuple[int, int]) -> tuple[int, int, Finding]:
        shard, column = place
        return shard, column, judge(arrays[column].path(shard), arrays[column].fault(shard, files[shard, column]))

    return in_threads(check, places)
