"""Is a store what was written: its small files and what they say together, its commit records, every shard file?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..cache import View
from ..errors import CacheCorruptError
from ..files.durable import read_sealed
from ..format.quantize import ChannelStatistics
from ..format.spec import StoreSpec
from ..store.commits import FILE_DTYPE, has_fp32_rows, is_complete, read_commits, read_fp32_rows, read_record
from ..store.manifest import (
    Manifest,
    is_same_json,
    manifest_sha256,
    read_manifest,
    read_small_array,
    shared_sha256,
    small_array_shapes,
    small_files,
)
from ..store.spare import SPARE
from ..terminal.progress import progress
from .advice import when_lost
from .findings import Checked, Finding, judge, without
from .policy import check_small_files, check_spare, draw_rows, in_threads
from .shard_check import ArrayCheck
from .small_files import SmallFiles


def check_store(view: View, store: Path, sample: int | None, draws: np.random.Generator, checked: Checked) -> Iterator[Finding]:
    """The small files of a store, what they say, what it was made from, its commit records and every shard file.

    A shard is `damaged` only if it is still declared finished after it was looked at.
    """
    small, is_folding = SmallFiles(store, "store"), is_complete(store) and (store / "commits").exists()
    yield from check_small_files(small)
    if is_folding:  # after complete.json, spare.tar is written again and commits/ removed
        yield Finding("sound", str(small.folder / SPARE), "")
        yield Finding(
            "unfinished", str(store / "commits"), "was left when the store was being completed. Run the same command again."
        )
    else:
        yield check_spare(small)
    if not is_complete(store) and not (store / "commits").exists() and "complete.json" not in small.wrong:
        lost = f"the list of its finished shards (complete.json or commits/), and its copy in {SPARE}, are lost."
        yield Finding("damaged", str(store), f"{lost} {when_lost(store, 'store')}")
        return
    if {"store.json", "zarr.json", "complete.json", "shards.npy"} & small.wrong.keys():
        yield Finding("damaged", str(store), "its shards were not checked: that needs the small files named above.")
        return
    manifest = read_manifest(store)
    if "checksums.json" not in SmallFiles(view.path, "view").wrong:  # else that is told of the view
        view.require_own(manifest)
    if not small.wrong:
        yield from _contradictions(view, store, manifest)

    spec = manifest.store
    files, finished, verdicts = _commits(store, spec)
    yield from verdicts
    rows = np.flatnonzero(finished[np.arange(spec.n_rows) // spec.shard_rows])
    drawn = None if sample is None else rows[draw_rows(len(rows), sample, draws)]
    checked.rows[f"{view.path.name}/{store.name}"] = len(rows if drawn is None else drawn)
    for shard, _, finding in _shards(store, manifest, files, finished, drawn):
        if finding.kind == "sound" or _is_still_finished(store, spec, shard, files):
            yield finding
    if not is_complete(store):
        message = f"{finished.sum()} of {len(finished)} shards are finished. Run the same teacher-cache extract command again."
        yield Finding("unfinished", str(store), message)


def _is_still_finished(store: Path, spec: StoreSpec, shard: int, files: np.ndarray) -> bool:
    """Whether the record of a shard is what it was; a repair takes it back before the shard is made again."""
    if is_complete(store):
        now, _ = read_commits(store, spec)
        return np.array_equal(now[shard], files[shard])
    try:
        _, record, _ = read_record(store / "commits" / f"{shard:06d}.json", spec, has_fp32_rows(store))
    except (CacheCorruptError, OSError):
        return False
    return np.array_equal(record, files[shard])


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


def _contradictions(view: View, store: Path, manifest: Manifest) -> Iterator[Finding]:
    """What sound small files of a store say that does not fit together or cannot be used."""
    values = {}
    for name in small_array_shapes(manifest):
        try:
            values[name] = read_small_array(store, name)  # as the manifest has it, and finite
        except CacheCorruptError as error:
            yield judge(store / name, without(store / name, error))
            return
        if name.endswith("/spread") and not (values[name] > 0).all():
            yield judge(store / name, "holds spreads that are not positive.")
    if hashlib.sha256(values["probe"].tobytes()).hexdigest() != manifest.probe_sha256:
        yield judge(store / "probe", "its SHA-256 is not the one that the manifest names.")

    layers = manifest.store.layers if manifest.store.is_quantised else ()
    statistics = {i: ChannelStatistics(values[f"quant/{i:02d}/centre"], values[f"quant/{i:02d}/spread"]) for i in layers}
    head = {name.removeprefix("head/"): array for name, array in values.items() if name.startswith("head/")}
    expected = small_files(manifest, statistics, head, values["probe"])
    on_record = read_sealed(store / "store.json")["files"].keys()
    if expected.keys() != on_record:
        odd = ", ".join(sorted(expected.keys() ^ on_record))
        yield judge(store / "store.json", f"does not list the files of such a store: {odd}.")
    for name in sorted(expected.keys() & on_record):
        if name.endswith("zarr.json") and not is_same_json((store / name).read_bytes(), expected[name]):
            yield judge(store / name, "does not describe what the manifest says.")
    first = view.cache.view(0).path / store.name
    if first != store and _shared(first) not in (None, _shared(store)):
        yield judge(store / "store.json", f"its quantiser, head or probe is not that of {first}.")


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
        verdicts = []
        try:
            read_fp32_rows(store, spec)
        except CacheCorruptError as error:
            verdicts.append(judge(store / "complete.json", without(store / "complete.json", error)))
        return *read_commits(store, spec), verdicts
    files, finished = np.zeros((spec.n_shards, len(spec.array_names)), FILE_DTYPE), np.zeros(spec.n_shards, bool)
    verdicts, has_rows = [], has_fp32_rows(store)
    for path in sorted((store / "commits").glob("*.json")):
        try:
            shard, record, _ = read_record(path, spec, has_rows)
        except CacheCorruptError as error:
            verdicts.append(judge(path, without(path, error)))
        else:
            files[shard], finished[shard] = record, True
            verdicts.append(judge(path, None))
    return files, finished, verdicts


def _shards(store: Path, manifest: Manifest, files: np.ndarray, finished: np.ndarray, sample: np.ndarray | None
            ) -> Iterator[tuple[int, int, Finding]]:  # fmt: skip
    """(shard, column, verdict) of every file of every finished shard. sample: rows to check, None for all."""
    arrays = [ArrayCheck(store, manifest, array, manifest_sha256(store), sample) for array in manifest.store.array_names]
    places = [(shard, column) for shard in np.flatnonzero(finished).tolist() for column in range(len(arrays))]

    def check(place: tuple[int, int]) -> tuple[int, int, Finding]:
        shard, column = place
        return shard, column, judge(arrays[column].path(shard), arrays[column].fault(shard, files[shard, column]))

    return in_threads(check, places)
