"""From commit records to one table and back: a store is folded when all its shards are finished, unfolded to make some again."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from ..errors import BadInputError, CacheCorruptError
from ..files import guard
from ..files.durable import make_folder, npy_bytes, remove, remove_folder, seal, sha256_file, write_whole
from ..format import layout
from ..format.spec import MAX_FP32_ROWS
from . import spare
from .commits import read_record
from .store import Store, is_complete


def is_folded(path: Path) -> bool:
    """Whether the store in this folder is complete and `fold` has nothing left to do."""
    return is_complete(path) and not (path / layout.COMMITS).exists() and spare.is_current(path)


def fold(store: Store) -> None:
    """Turn the records of a store whose shards are all finished into one table, and declare it complete.

    On a complete store it only does what a crash between these steps left undone.
    """
    path, spec = store.path, store.spec
    if not store.is_complete:
        store.require_unchanged()
        files, finished = store.read_commits()
        if not finished.all():
            raise CacheCorruptError(f"{path}: {(~finished).sum()} of {spec.n_shards} shards are not finished.")
        write_whole(path / layout.SHARDS_NPY, npy_bytes(files))
        complete = {"n_rows": spec.n_rows, "n_shards": spec.n_shards, "shards_sha256": sha256_file(path / layout.SHARDS_NPY)}
        if store.has_fp32_rows:
            complete["fp32_rows"] = store.read_fp32_rows().tolist()
            if len(complete["fp32_rows"]) > MAX_FP32_ROWS:
                raise BadInputError(
                    f"{path}: {len(complete['fp32_rows']):,} rows were made in fp32, more than {MAX_FP32_ROWS:,}: bf16 is wrong "
                    "for this teacher. Extract it with --precision fp32 and another --name, and delete this store."
                )
        write_whole(path / layout.COMPLETE_JSON, seal(complete))
    if not spare.is_current(path):
        spare.write_spare(path)
    if (path / layout.COMMITS).exists():
        guard.require_held(path)
        shutil.rmtree(path / layout.COMMITS, ignore_errors=True)  # with complete.json there, nobody reads what may be left of it


def unfold(store: Store, sound: np.ndarray) -> None:
    """Declare unfinished what is not `sound` (bool [n_shards]); the next extraction makes those shards again, and folds.

    A complete store goes back to commit records of its sound shards, unless it is sound altogether; an unfinished one loses the
    records of the others, and those that cannot be read. No shard file is touched. Killed anywhere, the store is complete as
    before or unfinished as asked for: unfolding again does the rest.
    """
    path, spec = store.path, store.spec
    if store.is_complete:
        if sound.all():
            return
        files, _ = store.read_commits()
        if (path / layout.COMMITS).exists():  # a fold or unfold was killed; beside complete.json these records do not count
            remove_folder(path / layout.COMMITS)
        fp32_rows = store.read_fp32_rows()
        make_folder(path / layout.COMMITS)
        for shard in range(spec.n_shards):
            of_shard = fp32_rows[np.isin(fp32_rows // spec.shard_rows, shard)]
            if sound[shard]:
                store.write_commit(shard, files[shard], of_shard)
            else:
                _keep_rows(path, shard, of_shard)
        # the spare loses complete.json first, so that nobody ever takes it from there for an unfinished store
        folded = (layout.COMPLETE_JSON, layout.SHARDS_NPY)
        spare.write_spare(path, [name for name in spare.spare_names(path) if name not in folded])
        remove(path / layout.COMPLETE_JSON)
    else:
        make_folder(path / layout.COMMITS)
        for record in store.records():
            if not _keeps(store, record, sound):
                remove(record)
        if not spare.is_current(path):
            spare.write_spare(path)
    if (path / layout.SHARDS_NPY).exists():
        remove(path / layout.SHARDS_NPY)


def _keep_rows(path: Path, shard: int, fp32_rows: np.ndarray) -> None:
    """Note, beside the records, which rows of an unfinished shard are to be made in fp32 again."""
    if len(fp32_rows):
        record = layout.record_path(path, shard).with_suffix(layout.FP32_SUFFIX)
        write_whole(record, seal({"shard": shard, "fp32_rows": fp32_rows.tolist()}))


def _keeps(store: Store, record: Path, sound: np.ndarray) -> bool:
    """Whether a record stays. Of one that does not, what it says of rows made in fp32 is kept, if it can be read."""
    try:
        shard, _, fp32_rows = read_record(record, store.spec, store.has_fp32_rows)
    except CacheCorruptError:
        return False
    if not sound[shard]:
        _keep_rows(store.path, shard, fp32_rows)
    return bool(sound[shard])
