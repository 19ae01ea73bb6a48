"""Which shards of a store are finished, and the size and checksum of each of their files.

The checksum of a shard file is CRC-32 (zlib's), not CRC-32C: every chunk in it ends with its own CRC-32C, and a CRC taken on
over data and their CRC of the same kind does not depend on the data. It would be the same for any two shards of equal sizes.

While work goes on there is one small sealed record a finished shard, `commits/000123.json`, written last by rename. When all
are there they are folded into `shards.npy`, and `complete.json` names its SHA-256. There is no other list of shards: a store has
`commits/`, or `complete.json`, or has lost one of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from . import guard, spare
from .durable import inside, make_folder, npy_bytes, read_npy, read_sealed, remove, remove_folder, seal, sha256_file, write_whole
from .errors import CacheCorruptError
from .spec import StoreSpec

T = TypeVar("T")
FILE_DTYPE = np.dtype([("bytes", "<u8"), ("crc32", "<u4")])
"""One shard file: its length and the CRC-32 of all its bytes."""


def record_path(store: Path, shard: int) -> Path:
    return store / "commits" / f"{shard:06d}.json"


def write_commit(store: Path, shard: int, files: np.ndarray) -> None:
    """Declare a shard finished. files: FILE_DTYPE [n_arrays], in the order of StoreSpec.array_names."""
    record = {"shard": shard, "files": [[int(file["bytes"]), int(file["crc32"])] for file in files]}
    write_whole(record_path(store, shard), seal(record))


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


def read_record(path: Path, spec: StoreSpec) -> tuple[int, np.ndarray]:
    """The shard that a commit record declares finished, and FILE_DTYPE [n_arrays] of its files.

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
    return shard, np.array([tuple(file) for file in files], FILE_DTYPE)


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
        for path in records:
            shard, of_shard = read_record(path, spec)
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
        make_folder(store / "commits")
        for shard in np.flatnonzero(sound).tolist():
            write_commit(store, shard, files[shard])
        # the spare loses complete.json first, so that nobody ever takes it from there for an unfinished store
        spare.write_spare(store, [name for name in spare.spare_names(store) if name not in spare.FOLDED])
        remove(store / "complete.json")
    else:
        make_folder(store / "commits")
        for path in _records(store):
            if not _is_sound(path, spec, sound):
                remove(path)
        if not spare.is_current(store):
            spare.write_spare(store)
    if (store / "shards.npy").exists():
        remove(store / "shards.npy")


def _is_sound(record: Path, spec: StoreSpec, sound: np.ndarray) -> bool:
    try:
        shard, _ = read_record(record, spec)
    except CacheCorruptError:
        return False
    return bool(sound[shard])
