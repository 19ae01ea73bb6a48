"""One teacher's targets for one view: a zarr v3 group, its manifest and its small arrays. Shards are written by writer.py.

    clip-b16.zarr/
      zarr.json       attributes["teacher_cache"] is the Manifest
      store.json      sealed; SHA-256 of every small file; its presence says that the store was begun
      tokens/08 ...   row arrays (spec.StoreSpec.array_names), one shard file c.SHARD.0.0 each
      quant/08/centre, spread     head/gamma, beta, projection     probe
      commits/, then shards.npy and complete.json
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .durable import ASIDE, read_sealed, seal, sha256_file, sync_folder, write_whole
from .errors import BadInputError, CacheCorruptError, NotInCacheError
from .quantize import ChannelStatistics
from .spec import FORMAT_VERSION, LayerFidelity, StoreSpec, TeacherSpec

FILL = {"int8": -128, "float16": "NaN", "float32": "NaN"}
"""Values that are never written, so that plain zarr readers can tell a hole."""
COMPRESSION = {
    "none": [],
    "zstd": [{"name": "zstd", "configuration": {"level": 1, "checksum": False}}],
    "lz4": [{"name": "blosc", "configuration": {
        "typesize": 1, "cname": "lz4", "clevel": 5, "shuffle": "noshuffle", "blocksize": 0}}],
}  # fmt: skip
"""zarr v3 codecs of an inner chunk between `bytes` and `crc32c`."""


@dataclass(frozen=True)
class Manifest:
    """All there is to know about a store that does not change while it is filled."""

    teacher: TeacherSpec
    store: StoreSpec
    view: int
    crops_id: str
    crops_sha256: str
    """Of the view's crops.npy: names the very pixels."""
    precision: str
    """Of the teacher's forward pass: fp32 or bf16."""
    fidelity: tuple[LayerFidelity, ...]
    probe_sha256: str
    """Of the teacher's mean token per layer on the probe image (array `probe`)."""
    software: dict

    def to_json(self) -> dict:
        value = dataclasses.asdict(self)
        return {"format_version": FORMAT_VERSION, **value}

    @classmethod
    def from_json(cls, value: dict) -> Manifest:
        try:
            value = dict(value)
            version = value.pop("format_version")
            if version != FORMAT_VERSION:
                raise BadInputError(
                    f"a store of format version {version}; this program reads version {FORMAT_VERSION}. Use the version of "
                    "teacher-cache that wrote it."
                )
            value["teacher"] = TeacherSpec.from_json(value["teacher"])
            value["store"] = StoreSpec.from_json(value["store"])
            value["fidelity"] = tuple(LayerFidelity.from_json(layer) for layer in value["fidelity"])
            return cls(**value)
        except (KeyError, TypeError) as error:
            raise CacheCorruptError(f"manifest: {error!r}.") from error


def read_manifest(store: Path) -> Manifest:
    """The manifest of a begun store, from JSON alone.

    Raises NotInCacheError if the store was never begun, CacheCorruptError if its zarr.json is not the one it was begun with.
    """
    try:
        files = read_sealed(store / "store.json")["files"]
    except FileNotFoundError:
        raise NotInCacheError(f"{store}: no such store.") from None
    root = _read_listed(store, files, "zarr.json")
    try:
        return Manifest.from_json(json.loads(root)["attributes"]["teacher_cache"])
    except BadInputError as error:
        raise BadInputError(f"{store}: {error}") from None
    except (KeyError, TypeError, ValueError, CacheCorruptError) as error:
        raise CacheCorruptError(f"{store / 'zarr.json'}: {error}") from error


def _read_listed(store: Path, files: dict[str, str], name: str) -> bytes:
    """A small file of a store, or CacheCorruptError if it is not the one that store.json lists."""
    try:
        data = (store / name).read_bytes()
    except OSError as error:
        raise CacheCorruptError(f"{store / name}: cannot be read ({error.strerror}).") from error
    if hashlib.sha256(data).hexdigest() != files.get(name):
        raise CacheCorruptError(f"{store / name}: not the file this store was begun with.")
    return data


def check_array_json(store: Path, array: str) -> None:
    """Raise CacheCorruptError if a row array's zarr.json was changed: zarr would believe it."""
    _read_listed(store, read_sealed(store / "store.json")["files"], f"{array}/zarr.json")


def _array_json(shape, shard_shape, chunk_shape, dtype: str, codec: str) -> dict:
    """zarr.json of a sharded row array; written by hand so that creating a store needs no zarr."""
    endian = {} if dtype == "int8" else {"configuration": {"endian": "little"}}
    inner = [{"name": "bytes", **endian}, *COMPRESSION[codec], {"name": "crc32c"}]
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": chunk_shape, "codecs": inner, "index_codecs": index, "index_location": "end"}
    return {
        "zarr_format": 3, "node_type": "array", "shape": shape, "data_type": dtype, "fill_value": FILL[dtype],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}], "attributes": {}, "storage_transformers": [],
    }  # fmt: skip


def _dump(value: dict) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def create_store(
    path: Path,
    manifest: Manifest,
    statistics: dict[int, ChannelStatistics],
    head: dict[str, np.ndarray],
    probe: np.ndarray,
) -> None:
    """Begin a store: all its small files, in a folder aside that is renamed into place.

    statistics: per layer (int8 only). head: `gamma`, `beta` [D] and `projection` [D, E] where the teacher has one.
    probe: float32 [L, D], the teacher's mean whitened token per stored layer on the probe image.
    """
    import zarr

    spec, teacher = manifest.store, manifest.teacher
    aside = path.with_name(path.name + ASIDE)
    shutil.rmtree(aside, ignore_errors=True)
    root = zarr.create_group(aside, zarr_format=3)
    for layer, channel in statistics.items():
        for name in ("centre", "spread"):
            _small_array(root, f"quant/{layer:02d}/{name}", getattr(channel, name))
    for name, values in head.items():
        _small_array(root, f"head/{name}", values)
    _small_array(root, "probe", probe)
    root.create_group("tokens")
    for array, codec in spec.codecs:
        row = list(spec.row_shape(array, teacher))
        value = _array_json([spec.n_rows, *row], [spec.shard_rows, *row], [1, *row], spec.row_dtype(array), codec)
        (aside / array).mkdir(parents=True, exist_ok=True)
        (aside / array / "zarr.json").write_bytes(_dump(value))
    attributes = {"teacher_cache": manifest.to_json()}
    (aside / "zarr.json").write_bytes(_dump({"zarr_format": 3, "node_type": "group", "attributes": attributes}))
    (aside / "commits").mkdir()

    files = {
        file.relative_to(aside).as_posix(): sha256_file(file) for file in sorted(aside.rglob("*")) if file.is_file()
    }
    write_whole(aside / "store.json", seal({"files": files}))
    for folder in [aside, *(entry for entry in aside.rglob("*") if entry.is_dir())]:
        sync_folder(folder)
    os.rename(aside, path)
    sync_folder(path.parent)


def _small_array(root, name: str, values: np.ndarray) -> None:
    values = np.ascontiguousarray(values, "float32")
    from zarr.codecs import Crc32cCodec

    array = root.create_array(name, shape=values.shape, chunks=values.shape, dtype="float32", compressors=[Crc32cCodec()],
                              fill_value=np.nan, config={"write_empty_chunks": True})  # fmt: skip
    array[...] = values


def read_small_array(store: Path, name: str) -> np.ndarray:
    """A small float32 array (`quant/08/centre`, `head/gamma`, `probe`), checked against store.json.

    Read without zarr: one chunk of little-endian float32, then its CRC-32C.
    """
    files = read_sealed(store / "store.json")["files"]
    shape = json.loads(_read_listed(store, files, f"{name}/zarr.json"))["shape"]
    (chunk,) = (file for file in files if file.startswith(f"{name}/c/"))
    return np.frombuffer(_read_listed(store, files, chunk)[:-4], "<f4").reshape(shape)


def shared_sha256(store: Path) -> dict[str, str]:
    """SHA-256 of the files that all views of a teacher share: quantiser, head and probe."""
    files = read_sealed(store / "store.json")["files"]
    return {name: sha256 for name, sha256 in files.items() if name.split("/")[0] in ("quant", "head", "probe")}


def read_statistics(store: Path, spec: StoreSpec) -> dict[int, ChannelStatistics]:
    """Per stored layer; empty for float16."""
    if spec.dtype == "float16":
        return {}
    names = ("centre", "spread")
    return {i: ChannelStatistics(*(read_small_array(store, f"quant/{i:02d}/{name}") for name in names)) for i in spec.layers}


def read_head(store: Path, teacher: TeacherSpec) -> dict[str, np.ndarray]:
    """Final norm (`gamma`, `beta` [D]) and `projection` [D, E] where the teacher has one. float32."""
    names = ["gamma", "beta"] + ["projection"] * (teacher.projection_dim is not None)
    return {name: read_small_array(store, f"head/{name}") for name in names}
