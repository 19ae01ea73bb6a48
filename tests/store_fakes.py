"""Stores with made-up content, small enough to look at every bit: 7 rows in shards of 3, unless a test wants others."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from teacher_cache.format.quantize import ChannelStatistics
from teacher_cache.format.spec import MadeWith, StoreSpec, TeacherSpec
from teacher_cache.store.folding import fold
from teacher_cache.store.manifest import Manifest, create_store
from teacher_cache.store.reader import StoreReader
from teacher_cache.store.store import Store
from teacher_cache.store.writer import ShardWriter

TEACHER = TeacherSpec(
    name="t", weights="random:0", weights_sha256="0" * 64, image_size=16, patch_size=8, grid=(2, 2), dim=6, depth=3, heads=1,
    has_cls=True, n_registers=0, mean=(0.5,) * 3, std=(0.5,) * 3, norm_eps=1e-5, projection_dim=4, resize="none",
    activation="gelu", positions="none", attention_source="cls", head="layernorm",
)  # fmt: skip
MADE = MadeWith(2, False, "cpu")
CODECS = ("none", "zstd", "lz4")


def spec_of(n_rows=7, shard_rows=3, layers=(1, 3), dtype="int8", codec="none", attention=True) -> StoreSpec:
    names = [f"tokens/{layer:02d}" for layer in layers] + ["scale"] * (dtype == "int8") + ["attention"] * attention
    group = 4 if dtype == "int8" else 0
    return StoreSpec(n_rows, shard_rows, layers, dtype, group, attention, tuple((name, codec) for name in names))


def values_of(spec: StoreSpec, seed=0) -> dict[str, np.ndarray]:
    """Random content of every row array; half of it compressible."""
    rng, arrays = np.random.default_rng(seed), {}
    for array in spec.array_names:
        shape, dtype = (spec.n_rows, *spec.row_shape(array, TEACHER)), spec.row_dtype(array)
        levels = rng.integers(-127, 128, shape) * (rng.random(shape) < 0.5)
        arrays[array] = levels.astype(dtype) if dtype == "int8" else (levels / 8).astype(dtype)
    return arrays


def begin(path: Path, spec: StoreSpec, view=0) -> None:
    """Create a store without rows."""
    statistics = ChannelStatistics(np.arange(6, dtype="float32"), np.arange(1, 7, dtype="float32"))
    head = {"gamma": np.full(6, 2, "float32"), "beta": np.ones(6, "float32"), "projection": np.eye(6, 4, dtype="float32")}
    manifest = Manifest(TEACHER, spec, view, "c" * 64, "d" * 64, "fp32", (), "e" * 64, {}, MADE)
    probe = np.arange(6 * len(spec.layers), dtype="float32").reshape(-1, 6)
    create_store(path, manifest, dict.fromkeys(spec.layers, statistics) if spec.group else {}, head, probe)


def fill(path: Path, spec: StoreSpec, arrays: dict[str, np.ndarray], shards=None, batch=2) -> None:
    for shard in range(spec.n_shards) if shards is None else shards:
        rows = spec.rows_of(shard)
        with ShardWriter(Store.open(path), shard) as out:
            for start in range(rows.start, rows.stop, batch):
                out.append({name: values[start : min(start + batch, rows.stop)] for name, values in arrays.items()})


def make_store(path: Path, spec: StoreSpec, seed=0, view=0) -> dict[str, np.ndarray]:
    """A complete store; returns what is in it."""
    arrays = values_of(spec, seed)
    begin(path, spec, view)
    fill(path, spec, arrays)
    fold(Store.open(path))
    return arrays


def write_again(path: Path, store: Path, codec: str | None = None) -> None:
    """Write a store from manifest, small arrays and stored rows of another; codec: of all arrays, by default theirs."""
    reader = StoreReader(path)
    spec = replace(reader.spec, codecs=tuple((array, codec or its) for array, its in reader.spec.codecs))
    create_store(store, replace(reader.manifest, store=spec), reader.statistics, reader.head, reader.store.small_array("probe"),
                 reader.transform)  # fmt: skip
    in_fp32 = reader.store.read_fp32_rows()
    for shard in range(spec.n_shards):
        rows = spec.rows_of(shard)
        with ShardWriter(Store.open(store), shard) as out:
            out.append({array: reader.read(array, rows) for array in spec.array_names}, in_fp32[np.isin(in_fp32, rows)])
    fold(Store.open(store))


def compress(store: Path, codec: str = "zstd") -> None:
    """Make a finished store one of those that were begun in a codec: nothing begins them any more."""
    write_again(store, aside := store.with_name(f"{store.name}.compressed"), codec)
    shutil.rmtree(store)
    aside.rename(store)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal dtype, shape and bytes."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def shard_of(path: Path, array: str, shard: int) -> Path:
    """The file of one shard."""
    return next((path / array).glob(f"c.{shard}.*"))
