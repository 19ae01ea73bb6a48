"""A store, opened once: where it is, what it was begun with, and which of its shards are finished.

What a store was begun with never changes while it is there; its shards become more, by this process or by others. So the manifest
travels with the Store, and the commits are read when they are first asked for, and again by `read_commits`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..errors import CacheCorruptError, NotInCacheError, UsageError
from ..files.durable import MAX_JSON, inside, listed_files, read_plain, read_sealed, seal, write_whole
from ..format import layout
from ..format.quantize import ChannelStatistics
from ..format.spec import MAX_FP32_ROWS, StoreSpec, TeacherSpec
from ..format.transform import LayerCode, Transform, token_bytes
from .commits import FILE_DTYPE, NO_ROWS, Commits, read_record, read_table, require_rows
from .manifest import Manifest, head_shapes, manifest_of, small_array_json, small_array_shapes

T = TypeVar("T")


def is_begun(path: Path) -> bool:
    """Whether a store is there. One without its store.json was never written like that: CacheCorruptError."""
    if (path / layout.STORE_JSON).exists():
        return True
    if path.exists():
        raise CacheCorruptError(
            f"{path} has lost its store.json. Run the same teacher-cache extract command with --repair, which restores it from "
            "spare.tar, or delete that folder to extract it again."
        )
    return False


def is_complete(path: Path) -> bool:
    """Whether the store in this folder was declared complete, whatever else may be wrong with it."""
    return (path / layout.COMPLETE_JSON).exists()


def begun_files(path: Path) -> dict[str, str]:
    """Name -> SHA-256 of the small files a store was begun with, from its store.json."""
    return listed_files(read_sealed(path / layout.STORE_JSON), path / layout.STORE_JSON)


def shared_files(files: dict[str, str]) -> dict[str, str]:
    """Of the small files of a store those that all views of a teacher share: quantiser, head and probe."""
    return {name: sha256 for name, sha256 in files.items() if name.split("/")[0] in (layout.QUANT, layout.HEAD, layout.PROBE)}


def is_same_json(found: bytes, expected: bytes) -> bool:
    """Whether two pieces of JSON are the same value, however it is spelled; `found` may be none at all."""
    try:
        return json.loads(found) == json.loads(expected)
    except (ValueError, RecursionError):
        return False


class Store:
    """One teacher's targets of one view. `Store.open` reads it from JSON alone.

    path: its folder. files: name -> SHA-256 of the small files it was begun with, as store.json lists them; each is compared with
    that when it is read. manifest: what it was begun with.
    """

    def __init__(self, path: Path, files: dict[str, str], manifest: Manifest):
        self.path, self.files, self.manifest = path, files, manifest

    @classmethod
    def open(cls, path: Path) -> Store:
        """The store in the folder `path`.

        Raises NotInCacheError if it was never begun, CacheCorruptError if its zarr.json is not the one it was begun with or one
        of its folders lies elsewhere.
        """
        if not is_begun(path):
            raise NotInCacheError(f"{path}: no such store.")
        files = begun_files(path)
        manifest = manifest_of(_read_listed(path, files, layout.ZARR_JSON), path / layout.ZARR_JSON)
        for array in manifest.store.array_names:
            inside(path, array)
        return cls(path, files, manifest)

    def require_unchanged(self) -> None:
        """Raise as `open` does if the store is not there any more or damaged, CacheCorruptError if another took its place."""
        if Store.open(self.path).files != self.files:
            raise CacheCorruptError(f"{self.path}: another store has taken its place since. Run the same command again.")

    @property
    def spec(self) -> StoreSpec:
        return self.manifest.store

    @property
    def teacher(self) -> TeacherSpec:
        return self.manifest.teacher

    @property
    def sha256(self) -> str:
        """Of the store's zarr.json: what the header of each of its shards names (shards.header)."""
        return self.files[layout.ZARR_JSON]

    @property
    def shared_sha256(self) -> dict[str, str]:
        """SHA-256 of the files that all views of a teacher share: quantiser, head and probe."""
        return shared_files(self.files)

    # --- small arrays

    def small_array(self, name: str) -> np.ndarray:
        """A small float32 array (`quant/08/centre`, `head/gamma`, `probe`), checked against store.json and the manifest.

        Read without zarr: one chunk of little-endian float32, then its CRC-32C.
        """
        shape = small_array_shapes(self.manifest)[name]
        n_bytes = 4 * math.prod(shape) + 4
        chunk = _read_listed(self.path, self.files, layout.only_chunk(name, len(shape)), n_bytes)
        if not is_same_json(_read_listed(self.path, self.files, f"{name}/{layout.ZARR_JSON}"), small_array_json(shape)):
            path = self.path / name / layout.ZARR_JSON
            raise CacheCorruptError(f"{path}: does not describe the array that the store's manifest does.")
        if len(chunk) != n_bytes:
            raise CacheCorruptError(f"{self.path / name}: has {len(chunk)} bytes; the manifest asks for {shape} of float32.")
        values = np.frombuffer(chunk[:-4], "<f4").reshape(shape)
        if not np.isfinite(values).all():
            raise CacheCorruptError(f"{self.path / name}: holds numbers that are not finite.")
        return values

    def statistics(self) -> dict[int, ChannelStatistics]:
        """Per stored layer; empty for float16."""
        names = {layer: [layout.statistics_name(layer, which) for which in layout.STATISTICS] for layer in self.spec.layers}
        return {i: ChannelStatistics(*map(self.small_array, names[i])) for i in self.spec.layers if self.spec.has_statistics}

    def transform(self) -> Transform | None:
        """How tokens are coded (klt); None of another dtype. CacheCorruptError for one that cannot be."""
        if not self.spec.is_transformed:
            return None
        layers = {}
        for layer in self.spec.layers:
            mean, basis, bits = (self.small_array(layout.statistics_name(layer, which)) for which in layout.TRANSFORM)
            if (bits != np.rint(bits)).any():
                raise CacheCorruptError(f"{self.path}: bits of layer {layer} are not whole numbers.")
            spread = self.small_array(layout.statistics_name(layer, "spread"))
            layers[layer] = LayerCode.of(mean, basis, bits, spread)
        transform = Transform(layers, self.small_array(layout.LEVELS), self.small_array(layout.SCALES))
        transform.require_sound(token_bytes(self.spec.dtype, self.teacher.dim), self.path)
        return transform

    def head(self) -> dict[str, np.ndarray]:
        """Final norm (`gamma`, `beta` [D]) and `projection` [D, E], each where the teacher has one. float32."""
        return {name: self.small_array(layout.head_name(name)) for name in head_shapes(self.teacher)}

    # --- which shards are finished

    @property
    def is_complete(self) -> bool:
        """As it is now."""
        return is_complete(self.path)

    @property
    def has_fp32_rows(self) -> bool:
        """Whether the version of the store has words for rows made in fp32."""
        return self.manifest.format_version >= 3

    @cached_property
    def commits(self) -> Commits:
        """The finished shards as they were when first asked for; see `read_commits`."""
        return self.read_commits()

    def read_commits(self) -> Commits:
        """The finished shards as they are now. Raises CacheCorruptError for a damaged or foreign record."""
        shape = (self.spec.n_shards, len(self.spec.array_names))

        def read(records: list[Path]) -> Commits:
            found = Commits(np.zeros(shape, FILE_DTYPE), np.zeros(self.spec.n_shards, bool))
            for path in records:
                shard, of_shard, _ = read_record(path, self.spec, self.has_fp32_rows)
                found.files[shard], found.finished[shard] = of_shard, True
            return found

        self.commits = self._unless_complete(read) or Commits(read_table(self.path, shape), np.ones(self.spec.n_shards, bool))
        return self.commits

    def missing_shards(self) -> list[int]:
        """Shards that have still to be made, ascending, as they are now."""
        return np.flatnonzero(~self.read_commits().finished).tolist()

    def n_finished(self) -> int:
        """Number of finished shards as they are now, from names alone (fast at any size)."""
        n_records = self._unless_complete(len)
        return self.spec.n_shards if n_records is None else n_records

    def records(self) -> list[Path]:
        """The commit records of a store that is not complete. CacheCorruptError if it has lost complete.json or its records."""
        if not (self.path / layout.COMMITS).is_dir():
            raise CacheCorruptError(
                f"{self.path} has neither complete.json nor commits/: it was complete and has lost the list of its shards. Run "
                "the same teacher-cache extract command with --repair, which restores it from spare.tar."
            )
        return sorted(inside(self.path, layout.COMMITS).glob(layout.RECORDS))

    def _unless_complete(self, read: Callable[[list[Path]], T]) -> T | None:
        """What `read` makes of the commit records; None if the store is complete, or another process completed it meanwhile."""
        try:
            found = None if self.is_complete else read(self.records())
        except CacheCorruptError:
            if self.is_complete:
                return None
            raise
        return None if self.is_complete else found

    def write_commit(self, shard: int, files: np.ndarray, fp32_rows: Sequence[int] = ()) -> None:
        """Declare a shard finished. files: FILE_DTYPE [n_arrays], in the order of StoreSpec.array_names.

        fp32_rows: of the shard, ascending, that were made in fp32 because bf16 gave none; a store before version 3 can have none.
        """
        self.require_unchanged()
        record = {"shard": shard, "files": [[int(file["bytes"]), int(file["crc32"])] for file in files]}
        if self.has_fp32_rows:
            record["fp32_rows"] = [int(row) for row in fp32_rows]
        elif len(fp32_rows):
            raise UsageError(f"{self.path}: a store of an older version than 3 has no place for rows made in fp32.")
        write_whole(layout.record_path(self.path, shard), seal(record))

    # --- rows made in fp32

    def read_fp32_rows(self) -> np.ndarray:
        """int64 [n], ascending: rows of finished shards that a bf16 teacher gave in fp32. Of a store before version 3, none.

        Raises CacheCorruptError for a damaged or foreign record.
        """
        if not self.has_fp32_rows:
            return NO_ROWS

        def read(records: list[Path]) -> np.ndarray:
            return np.concatenate([NO_ROWS, *(read_record(path, self.spec, True)[2] for path in records)])

        found = self._unless_complete(read)
        if found is not None:
            return found
        path = self.path / layout.COMPLETE_JSON
        return require_rows(path, read_sealed(path).get("fp32_rows"), range(self.spec.n_rows), MAX_FP32_ROWS)

    def read_fp32_rows_to_make(self) -> np.ndarray:
        """int64 [n], ascending: rows of shards that `unfold` declared unfinished, which have to be made in fp32 once more."""
        rows = [NO_ROWS]
        for path in sorted(inside(self.path, layout.COMMITS).glob(f"*{layout.FP32_SUFFIX}")):
            try:
                of_file = read_sealed(path).get("fp32_rows")
                rows.append(require_rows(path, of_file, range(self.spec.n_rows), self.spec.shard_rows))
            except CacheCorruptError as error:
                raise CacheCorruptError(f"{error} Delete that file; the rows it names will be found again.") from error
        return np.concatenate(rows)


def _read_listed(path: Path, files: dict[str, str], name: str, most: int = MAX_JSON) -> bytes:
    """A small file of the store in `path`, of at most `most` bytes, or CacheCorruptError if it is not the one `files` lists."""
    try:
        data = read_plain(inside(path, name), most)
    except FileNotFoundError:
        raise CacheCorruptError(f"{path / name}: cannot be read (it is missing).") from None
    if hashlib.sha256(data).hexdigest() != files.get(name):
        raise CacheCorruptError(f"{path / name}: not the file this store was begun with.")
    return data
