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

from .durable import ASIDE, crc32c, read_sealed, seal, sync_folder, write_whole
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


def _dump(value: dict) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _group_json(attributes: dict | None = None) -> bytes:
    return _dump({"zarr_format": 3, "node_type": "group", "attributes": attributes or {}})


def _array_json(shape, chunk_shape, dtype: str, codecs: list) -> bytes:
    """zarr.json of an array, written by hand so that creating a store needs no zarr."""
    return _dump({
        "zarr_format": 3, "node_type": "array", "shape": list(shape), "data_type": dtype, "fill_value": FILL[dtype],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": codecs, "attributes": {}, "storage_transformers": [],
    })  # fmt: skip


def _codecs(dtype: str, codec: str = "none") -> list[dict]:
    """zarr's codecs of a chunk whose bytes end with their CRC-32C."""
    endian = {} if dtype == "int8" else {"configuration": {"endian": "little"}}
    return [{"name": "bytes", **endian}, *COMPRESSION[codec], {"name": "crc32c"}]


def _row_array_json(spec: StoreSpec, teacher: TeacherSpec, array: str, codec: str) -> bytes:
    """A sharded array whose inner chunk is one row."""
    row, dtype = spec.row_shape(array, teacher), spec.row_dtype(array)
    sharding = {"chunk_shape": [1, *row], "codecs": _codecs(dtype, codec)}
    sharding |= {"index_codecs": _codecs("uint64"), "index_location": "end"}
    sharded = [{"name": "sharding_indexed", "configuration": sharding}]
    return _array_json((spec.n_rows, *row), (spec.shard_rows, *row), dtype, sharded)


def _small_array(name: str, values: np.ndarray) -> dict[str, bytes]:
    """The files of a float32 array of one chunk."""
    data = np.ascontiguousarray(values, "<f4").tobytes()
    chunk = ".".join(["c", *["0"] * values.ndim])
    return {
        f"{name}/zarr.json": _array_json(values.shape, values.shape, "float32", _codecs("float32")),
        f"{name}/{chunk}": data + crc32c(data).to_bytes(4, "little"),
    }


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
    spec, teacher = manifest.store, manifest.teacher
    files = {"zarr.json": _group_json({"teacher_cache": manifest.to_json()})}
    for layer, channel in statistics.items():
        files |= _small_array(f"quant/{layer:02d}/centre", channel.centre)
        files |= _small_array(f"quant/{layer:02d}/spread", channel.spread)
    for name, values in head.items():
        files |= _small_array(f"head/{name}", values)
    files |= _small_array("probe", probe)
    for array, codec in spec.codecs:
        files[f"{array}/zarr.json"] = _row_array_json(spec, teacher, array, codec)
    groups = {parent.as_posix() for name in files for parent in Path(name).parents} - {".", *(str(Path(n).parent) for n in files)}
    files |= {f"{group}/zarr.json": _group_json() for group in sorted(groups)}

    aside = path.with_name(path.name + ASIDE)
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "commits").mkdir(parents=True)
    for name, data in files.items():
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(aside / name, data)
    write_whole(aside / "store.json", seal({"files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}}))
    for folder in [aside, *(entry for entry in aside.rglob("*") if entry.is_dir())]:
        sync_folder(folder)
    os.rename(aside, path)
    sync_folder(path.parent)


def read_small_array(store: Path, name: str) -> np.ndarray:
    """A small float32 array (`quant/08/centre`, `head/gamma`, `probe`), checked against store.json.

    Read without zarr: one chunk of little-endian float32, then its CRC-32C.
    """
    files = read_sealed(store / "store.json")["files"]
    shape = json.loads(_read_listed(store, files, f"{name}/zarr.json"))["shape"]
    chunk = _read_listed(store, files, f"{name}/" + ".".join(["c", *["0"] * len(shape)]))
    return np.frombuffer(chunk[:-4], "<f4").reshape(shape)


def extract_command(cache: Path, store_name: str, manifest: Manifest) -> str:
    """The command that makes or finishes this store; whatever it leaves out is taken from what is there."""
    weights, name = manifest.teacher.weights, manifest.teacher.name
    with_weights = "" if weights == "built-in" or weights.startswith("timm pretrained") else f" --weights {weights}"
    with_name = "" if store_file_name(name) == store_name else f" --name {store_name}"
    return f"teacher-cache extract --teacher {name}{with_weights}{with_name} {cache}"


def store_file_name(name: str) -> str:
    """A teacher's name as the name of its store: `timm:vit` -> `timm_vit`."""
    return name.replace(":", "_").replace("/", "_")


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
