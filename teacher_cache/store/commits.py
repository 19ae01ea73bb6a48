"""Which shards of a store are finished, and the size and checksum of each of their files.

The checksum of a shard file is CRC-32 (zlib's), not CRC-32C: every chunk in it ends with its own CRC-32C, and a CRC taken on
over data and their CRC of the same kind does not depend on the data. It would be the same for any two shards of equal sizes.

While work goes on there is one small sealed record a finished shard, `commits/000123.json`, written last by rename. When all
are there they are folded into `shards.npy`, and `complete.json` names its SHA-256. There is no other list of shards: a store has
`commits/`, or `complete.json`, or has lost one of them.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..errors import BadInputError, CacheCorruptError, UsageError
from ..files import guard
from ..files.durable import (
    inside,
    make_folder,
    npy_bytes,
    read_npy,
    read_sealed,
    remove,
    remove_folder,
    seal,
    sha256_file,
    write_whole,
)
from ..format.spec import MAX_FP32_ROWS, StoreSpec
from . import spare
from .manifest import read_manifest

T = TypeVar("T")
FILE_DTYPE = np.dtype([("bytes", "<u8"), ("crc32", "<u4")])
"""One shard file: its length and the CRC-32 of all its bytes."""
NO_ROWS = np.zeros(0, "int64")
AGAIN = ".fp32"
"""Ends the name of a file that keeps what an undone commit record said of rows made in fp32."""


def record_path(store: Path, shard: int) -> Path:
    return store / "commits" / f"{shard:06d}.json"


def write_commit(store: Path, shard: int, files: np.ndarray, fp32_rows: Sequence[int] = ()) -> None:
    """Declare a shard finished. files: FILE_DTYPE [n_arrays], in the order of StoreSpec.array_names.

    fp32_rows: of the shard, ascending, that were made in fp32 because bf16 gave none; a store before version 3 can have none.
    """
    record = {"shard": shard, "files": [[int(file["bytes"]), int(file["crc32"])] for file in files]}
    if has_fp32_rows(store):
        record["fp32_rows"] = [int(row) for row in fp32_rows]
    elif len(fp32_rows):
        raise UsageError(f"{store}: a store of an older version than 3 has no place for rows made in fp32.")
    write_whole(record_path(store, shard), seal(record))


def has_fp32_rows(store: Path) -> bool:
    """Whether the version of a store has words for them."""
    return read_manifest(store).format_version >= 3


def is_complete(store: Path) -> bool:
    return (store / "complete.json").exists()


def _records(store: Path) -> list[Path]:
    """The commit records of a store that is not complete. CacheCorruptError if it has lost complete.json or its records."""
    if not (store / "commits").is_dir():
        raise CacheCorruptError(
            f"{store} has neither complete.json nor commits/: it was complete and has lost the list of its shards. Run the same "
            "teacher-cache extract command with --repair, which restores it from spare.tar."
        )
    return sorted(inside(store, "commits").glob("*.json"))


def _unless_complete(store: Path, read: Callable[[list[Path]], T]) -> T | None:
    """What `read` makes of the commit records; None if the store is complete, or another process completed it meanwhile."""
    try:
        found = None if is_complete(store) else read(_records(store))
    except CacheCorruptError:
        if is_complete(store):
            return None
        raise
    return None if is_complete(store) else found


def count_commits(store: Path, spec: StoreSpec) -> int:
    """Number of finished shards, from names alone (fast at any size)."""
    n_records = _unless_complete(store, len)
    return spec.n_shards if n_records is None else n_records


def read_record(path: Path, spec: StoreSpec, has_fp32_rows: bool) -> tuple[int, np.ndarray, np.ndarray]:
    """The shard that a commit record declares finished, FILE_DTYPE [n_arrays] of its files, and int64 [n], its rows made in fp32.

    has_fp32_rows: whether the store's version has words for these.
    Raises CacheCorruptError for a record that is damaged, misnamed or not of a store like this.
    """
    try:
        record = read_sealed(path)
    except FileNotFoundError:
        raise CacheCorruptError(f"{path}: vanished while it was read.") from None
    shard, files = record.get("shard"), record.get("files")
    named = type(shard) is int and 0 <= shard < spec.n_shards and path == record_path(path.parent.parent, shard)
    if not named or not isinstance(files, list) or len(files) != len(spec.array_names) or not all(map(_is_file, files)):
        raise CacheCorruptError(f"{path}: not a commit record of this store.")
    if not has_fp32_rows:
        rows = NO_ROWS
    else:
        rows = _require_rows(path, record.get("fp32_rows"), spec.rows_of(shard), spec.shard_rows)
    return shard, np.array([tuple(file) for file in files], FILE_DTYPE), rows


def _require_rows(path: Path, rows, of: range, most: int) -> np.ndarray:
    """int64 [n], the `fp32_rows` of a sealed file: ascending numbers of the rows `of`, or CacheCorruptError."""
    if not isinstance(rows, list) or len(rows) > most or not all(type(row) is int and row in of for row in rows):
        raise CacheCorruptError(f"{path}: fp32_rows must be rows of {of.start} to {of.stop - 1}, at most {most:,}.")
    if any(a >= b for a, b in itertools.pairwise(rows)):
        raise CacheCorruptError(f"{path}: fp32_rows must be ascending.")
    return np.array(rows, "int64")


def read_fp32_rows(store: Path, spec: StoreSpec) -> np.ndarray:
    """int64 [n], ascending: rows of finished shards that a bf16 teacher gave in fp32. Of a store before version 3, none.

    Raises CacheCorruptError for a damaged or foreign record.
    """
    if not has_fp32_rows(store):
        return NO_ROWS

    def read(records: list[Path]) -> np.ndarray:
        return np.concatenate([NO_ROWS, *(read_record(path, spec, True)[2] for path in records)])

    found = _unless_complete(store, read)
    if found is not None:
        return found
    path = store / "complete.json"
    return _require_rows(path, read_sealed(path).get("fp32_rows"), range(spec.n_rows), MAX_FP32_ROWS)


def read_fp32_rows_to_make(store: Path, spec: StoreSpec) -> np.ndarray:
    """int64 [n], ascending: rows of shards that `unfold` declared unfinished, which have to be made in fp32 again."""
    rows = [NO_ROWS]
    for path in sorted(inside(store, "commits").glob(f"*{AGAIN}")):
        try:
            rows.append(_require_rows(path, read_sealed(path).get("fp32_rows"), range(spec.n_rows), spec.shard_rows))
        except CacheCorruptError as error:
            raise CacheCorruptError(f"{error} Delete that file; the rows it names will be found again.") from error
    return np.concatenate(rows)


def _is_file(pair) -> bool:
    """Whether `pair` is [bytes, CRC-32]."""
    is_pair = isinstance(pair, list) and len(pair) == 2 and all(type(number) is int for number in pair)
    return is_pair and 0 <= pair[0] < 2**63 and 0 <= pair[1] < 2**32


def read_commits(store: Path, spec: StoreSpec) -> tuple[np.ndarray, np.ndarray]:
    """FILE_DTYPE [n_shards, n_arrays] and bool [n_shards]: the files, and which shards are finished.

    Raises CacheCorruptError for a damaged or foreign record.
    """
    shape = (spec.n_shards, len(spec.array_names))

    def read(records: list[Path]) -> tuple[np.ndarray, np.ndarray]:
        files, finished = np.zeros(shape, FILE_DTYPE), np.zeros(spec.n_shards, bool)
        has_rows = bool(records) and has_fp32_rows(store)
        for path in records:
            shard, of_shard, _ = read_record(path, spec, has_rows)
            files[shard], finished[shard] = of_shard, True
        return files, finished

    return _unless_complete(store, read) or (_read_table(store, shape), np.ones(spec.n_shards, bool))


def _read_table(store: Path, shape: tuple[int, int]) -> np.ndarray:
    """FILE_DTYPE [n_shards, n_arrays] of a complete store: shards.npy, which has to be the one that complete.json names."""
    complete, table = read_sealed(store / "complete.json"), store / "shards.npy"
    if not table.is_file() or sha256_file(table) != complete.get("shards_sha256"):
        raise CacheCorruptError(f"{table}: not the table that complete.json names.")
    return read_npy(table, FILE_DTYPE, shape)


def is_folded(store: Path) -> bool:
    """Whether a store is complete and `fold` has nothing left to do."""
    return is_complete(store) and not (store / "commits").exists() and spare.is_current(store)


def fold(store: Path, spec: StoreSpec) -> None:
    """Turn the records of a store whose shards are all finished into one table, and declare it complete.

    On a complete store it only does what a crash between these steps left undone.
    """
    if not is_complete(store):
        files, finished = read_commits(store, spec)
        if not finished.all():
            raise CacheCorruptError(f"{store}: {(~finished).sum()} of {spec.n_shards} shards are not finished.")
        write_whole(store / "shards.npy", npy_bytes(files))
        complete = {"n_rows": spec.n_rows, "n_shards": spec.n_shards, "shards_sha256": sha256_file(store / "shards.npy")}
        if has_fp32_rows(store):
            complete["fp32_rows"] = read_fp32_rows(store, spec).tolist()
            if len(complete["fp32_rows"]) > MAX_FP32_ROWS:
                raise BadInputError(
                    f"{store}: {len(complete['fp32_rows']):,} rows were made in fp32, more than {MAX_FP32_ROWS:,}: bf16 is wrong "
                    "for this teacher. Extract it with --precision fp32 and another --name, and delete this store."
                )
        write_whole(store / "complete.json", seal(complete))
    if not spare.is_current(store):
        spare.write_spare(store)
    if (store / "commits").exists():
        guard.require_held(store)
        shutil.rmtree(store / "commits", ignore_errors=True)  # with complete.json there, nobody reads what may be left of it


def unfold(store: Path, spec: StoreSpec, sound: np.ndarray) -> None:
    """Declare unfinished what is not `sound` (bool [n_shards]); the next extraction makes those shards again, and folds.

    A complete store goes back to commit records of its sound shards, unless it is sound altogether; an unfinished one loses the
    records of the others, and those that cannot be read. No shard file is touched. Killed anywhere, the store is complete as
    before or unfinished as asked for: unfolding again does the rest.
    """
    if is_complete(store):
        if sound.all():
            return
        files = _read_table(store, (spec.n_shards, len(spec.array_names)))
        if (store / "commits").exists():  # a fold or unfold was killed; beside complete.json these records do not count
            remove_folder(store / "commits")
        fp32_rows = read_fp32_rows(store, spec)
        make_folder(store / "commits")
        for shard in range(spec.n_shards):
            of_shard = fp32_rows[np.isin(fp32_rows // spec.shard_rows, shard)]
            if sound[shard]:
                write_commit(store, shard, files[shard], of_shard)
            else:
                _keep_rows(store, shard, of_shard)
        # the spare loses complete.json first, so that nobody ever takes it from there for an unfinished store
        spare.write_spare(store, [name for name in spare.spare_names(store) if name not in spare.FOLDED])
        remove(store / "complete.json")
    else:
        make_folder(store / "commits")
        has_rows = has_fp32_rows(store)
        for path in _records(store):
            if not _keeps(path, spec, has_rows, sound):
                remove(path)
        if not spare.is_current(store):
            spare.write_spare(store)
    if (store / "shards.npy").exists():
        remove(store / "shards.npy")


def _keep_rows(store: Path, shard: int, fp32_rows: np.ndarray) -> None:
    """Note, beside the records, which rows of an unfinished shard are to be made in fp32 again."""
    if len(fp32_rows):
        path = record_path(store, shard).with_suffix(AGAIN)
        write_whole(path, seal({"shard": shard, "fp32_rows": fp32_rows.tolist()}))


def _keeps(record: Path, spec: StoreSpec, has_rows: bool, sound: np.ndarray) -> bool:
    """Whether a record stays. Of one that does not, what it says of rows made in fp32 is kept, if it can be read."""
    try:
        shard, _, fp32_rows = read_record(record, spec, has_rows)
    except CacheCorruptError:
        return False
    if not sound[shard]:
        _keep_rows(record.parent.parent, shard, fp32_rows)
    return bool(sound[shard])
