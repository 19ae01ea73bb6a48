"""Caches of any size on a disk of any size: complete by every record, with the headers and indices of all shards, and holes in
the place of rows. A hole reads as zeros; only the rows asked for get the CRC-32C of zeros, so that a reader accepts them.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from teacher_cache.cache import Cache, CropsIdentity, View, write_cache
from teacher_cache.crops.beton import CropReader, tables_sha256, write_beton
from teacher_cache.crops.images import ImageList
from teacher_cache.files.durable import crc32c, npy_bytes, seal, sha256_file, write_whole
from teacher_cache.format.crop_plan import CropPlan
from teacher_cache.format.crop_record import CROP_DTYPE
from teacher_cache.format.layout import shard_file, view_path
from teacher_cache.format.shards import HEADER_BYTES, header
from teacher_cache.format.spec import StoreSpec, TeacherSpec
from teacher_cache.store.commits import FILE_DTYPE
from teacher_cache.store.folding import fold
from teacher_cache.store.spare import write_spare
from teacher_cache.store.store import Store

from . import made_up


def sparse_cache(path: Path, n_rows: int, crop_size: int) -> Cache:
    """A cache of one view of black crops, stored raw."""
    plan, names = CropPlan(size=crop_size), tuple(f"class-{row % 1000:03d}/image-{row:08d}.jpg" for row in range(n_rows))
    images = ImageList(names, np.arange(n_rows) % 1000, tuple(f"class-{label:03d}" for label in range(1000)))
    crops_id = CropsIdentity.of(images, plan, "raw").crops_id
    view, crop = view_path(path, 0), bytes(3 * crop_size**2)
    view.mkdir(parents=True)
    crops = np.zeros(n_rows, CROP_DTYPE)
    crops["bytes"], crops["crc32c"] = len(crop), crc32c(crop)
    write_whole(view / "crops.npy", npy_bytes(crops))
    write_beton(view / "crops.beton", crops, images.labels, crop_size, "raw", itertools.repeat(crop, n_rows))
    beton = {"bytes": (view / "crops.beton").stat().st_size, "tables_sha256": tables_sha256(view / "crops.beton")}
    checksums = {"crops_id": crops_id, "files": {"crops.npy": sha256_file(view / "crops.npy")}, "crops.beton": beton}
    write_whole(view / "checksums.json", seal(checksums))
    write_whole(view / "checksums.json", seal({**checksums, "decoded": CropReader(view).decoded()}))
    write_spare(view)
    write_cache(path, images, plan, "raw", [])
    return Cache(path)


def add_sparse_targets(view: View, teacher: TeacherSpec, layers: str = "last5", shard_rows: int = 2048, readable=()) -> Path:
    """Give a view a complete store of holes; the rows in `readable` can be read, and are zeros. Returns its path."""
    path = view.store_path(teacher.name)
    made_up.begin_store(path, teacher, made_up.store_spec(teacher, view.cache.n_images, layers, shard_rows=shard_rows), view)
    fill_sparse(path, readable)
    fold(Store.open(path))
    return path


def fill_sparse(path: Path, readable=()) -> None:
    """Give a begun store all its shards, as holes; the rows in `readable` can be read, and are zeros."""
    store = Store.open(path)
    teacher, spec = store.teacher, store.spec
    shards = np.array(sorted(readable), "int64") // spec.shard_rows
    for shard in range(spec.n_shards):
        slots = [row % spec.shard_rows for row in sorted(readable)[slice(*np.searchsorted(shards, [shard, shard + 1]))]]
        sizes = [_write_shard(path, teacher, spec, column, shard, slots) for column in range(len(spec.array_names))]
        store.write_commit(shard, np.array([(n_bytes, 0) for n_bytes in sizes], FILE_DTYPE))


def _write_shard(store: Path, teacher: TeacherSpec, spec: StoreSpec, column: int, shard: int, slots: list[int]) -> int:
    """One shard file of holes; returns its bytes."""
    array = spec.array_names[column]
    row_bytes, n_rows = spec.row_bytes(array, teacher), len(spec.rows_of(shard))
    index = np.full((spec.shard_rows, 2), 0xFFFFFFFFFFFFFFFF, "<u8")
    index[:n_rows, 0] = HEADER_BYTES + np.arange(n_rows) * (row_bytes + 4)
    index[:n_rows, 1] = row_bytes + 4
    crc = crc32c(bytes(row_bytes)).to_bytes(4, "little")
    with open(shard_file(store, array, shard, 1 + len(spec.row_shape(array, teacher))), "wb") as file:
        file.write(header(Store.open(store).sha256, column, shard))
        for slot in slots:
            file.seek(int(index[slot, 0]) + row_bytes)
            file.write(crc)
        file.seek(HEADER_BYTES + n_rows * (row_bytes + 4))
        file.write(index.tobytes() + crc32c(index.tobytes()).to_bytes(4, "little"))
        return file.tell()
