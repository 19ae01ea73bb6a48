"""One teacher's targets for one view: a zarr v3 group, its manifest and its small arrays. Shards are written by writer.py.

clip-b16.zarr/
  zarr.json       attributes["teacher_cache"] is the Manifest
  store.json      sealed; SHA-256 of every small file; its presence says that the store was begun
  tokens/08 ...   row arrays (spec.StoreSpec.array_names), one shard file c.SHARD.0.0 each
  quant/08/centre, spread     head/gamma, beta, projection     probe
  commits/, then shards.npy and complete.json
  spare.tar       a second copy of every small file above (spare.py)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import BadInputError, CacheCorruptError, NotInCacheError
from ..files.durable import (
    MAX_JSON,
    clear_aside,
    crc32c,
    inside,
    is_sha256,
    listed_files,
    publish,
    read_plain,
    read_sealed,
    seal,
    sync_folder,
    write_whole,
)
from ..format.quantize import ChannelStatistics
from ..format.spec import NOT_BEFORE_3, STORE_VERSIONS, LayerFidelity, MadeWith, StoreSpec, TeacherSpec
from .spare import SPARE, pack_members

FILL = {"int8": -128, "uint8": 0, "int32": -1, "float16": "NaN", "float32": "NaN"}
"""Values that are never written (of uint8: that never fill a group), so that plain zarr readers can tell a hole."""
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
    made: MadeWith | None
    """None: not on record, as in stores before version 3."""
    format_version: int = STORE_VERSIONS[-1]

    def __post_init__(self) -> None:
        if type(self.view) is not int or not 0 <= self.view < 2**31:
            raise ValueError(f"view must be a number from 0, not {self.view!r}")
        for name in ("crops_id", "crops_sha256", "probe_sha256"):
            if not is_sha256(getattr(self, name)):
                raise ValueError(f"{name} must be 64 hex digits, not {getattr(self, name)!r}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be fp32 or bf16, not {self.precision!r}")
        if not isinstance(self.software, dict) or not all(isinstance(v, str) for pair in self.software.items() for v in pair):
            raise ValueError(f"software must give versions by name, not {self.software!r}")
        self.store.require_fit(self.teacher)
        is_new = self.format_version >= 3
        if not is_new and self.format_version != self.store.least_version:
            raise ValueError(f"format version {self.format_version} of a store of version {self.store.least_version}")
        since_3 = {"made": self.made, **{f"{name} of the teacher": getattr(self.teacher, name) for name in NOT_BEFORE_3}}
        for name, value in since_3.items():
            if is_new == (value is None):
                raise ValueError(f"{name} is {value!r} in version {self.format_version}")

    def to_json(self) -> dict:
        value = dataclasses.asdict(self)
        version = value.pop("format_version")
        if version < 3:
            del value["made"]
            value["teacher"] = {key: item for key, item in value["teacher"].items() if key not in NOT_BEFORE_3}
        if version < 2:
            del value["store"]["visible"]
        return {"format_version": version, **value}

    @classmethod
    def from_json(cls, value: dict) -> Manifest:
        try:
            version = value["format_version"]
            if type(version) is not int or version not in STORE_VERSIONS:
                raise BadInputError(
                    f"a store of format version {version}; this program reads versions {', '.join(map(str, STORE_VERSIONS))}. "
                    "Use the version of teacher-cache that wrote it."
                )
            value = _with_words(value, ("made",), None) if version < 3 else {**value, "made": MadeWith.from_json(value["made"])}
            teacher = _with_words(value["teacher"], NOT_BEFORE_3, None) if version < 3 else value["teacher"]
            store = _with_words(value["store"], ("visible",), 0) if version < 2 else value["store"]
            value["teacher"], value["store"] = TeacherSpec.from_json(teacher), StoreSpec.from_json(store)
            value["fidelity"] = tuple(LayerFidelity.from_json(layer) for layer in value["fidelity"])
            return cls(**value)
        except BadInputError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise CacheCorruptError(f"manifest: {error!r}.") from error


def _with_words(value: dict, names: tuple[str, ...], then) -> dict:
    """A part of an old manifest with the keys that its version has no words for; `then` is what they were."""
    if known := [name for name in names if name in value]:
        raise ValueError(f"{', '.join(known)}: its version has no such key")
    return {**value, **dict.fromkeys(names, then)}


def is_begun(store: Path) -> bool:
    """Whether a store is there. One without its store.json was never written like that: CacheCorruptError."""
    if (store / "store.json").exists():
        return True
    if store.exists():
        raise CacheCorruptError(
            f"{store} has lost its store.json. Run the same teacher-cache extract command with --repair, which restores it from "
            "spare.tar, or delete that folder to extract it again."
        )
    return False


def _small_files_of(store: Path) -> dict[str, str]:
    """Name -> SHA-256 of the files a store was begun with, from store.json."""
    return listed_files(read_sealed(store / "store.json"), store / "store.json")


def read_manifest(store: Path) -> Manifest:
    """The manifest of a begun store, from JSON alone.

    Raises NotInCacheError if the store was never begun, CacheCorruptError if its zarr.json is not the one it was begun with or
    one of its folders lies elsewhere.
    """
    if not is_begun(store):
        raise NotInCacheError(f"{store}: no such store.")
    manifest = manifest_of(_read_listed(store, _small_files_of(store), "zarr.json"), store / "zarr.json")
    for array in manifest.store.array_names:
        inside(store, array)
    return manifest


def manifest_of(root_json: bytes, path: Path) -> Manifest:
    """The manifest in the bytes of a store's zarr.json. Errors name `path`."""
    try:
        return Manifest.from_json(json.loads(root_json)["attributes"]["teacher_cache"])
    except BadInputError as error:
        raise BadInputError(f"{path.parent}: {error}") from None
    except (KeyError, TypeError, ValueError, RecursionError, CacheCorruptError) as error:
        raise CacheCorruptError(f"{path}: {error}") from error


def manifest_sha256(store: Path) -> str:
    """SHA-256 of the store's zarr.json: what the header of each of its shards names (shards.header)."""
    return _small_files_of(store).get("zarr.json", "")


def _read_listed(store: Path, files: dict[str, str], name: str, most: int = MAX_JSON) -> bytes:
    """A small file of a store, of at most `most` bytes, or CacheCorruptError if it is not the one that store.json lists."""
    try:
        data = read_plain(inside(store, name), most)
    except FileNotFoundError:
        raise CacheCorruptError(f"{store / name}: cannot be read (it is missing).") from None
    if hashlib.sha256(data).hexdigest() != files.get(name):
        raise CacheCorruptError(f"{store / name}: not the file this store was begun with.")
    return data


def check_array_json(store: Path, array: str) -> None:
    """Raise CacheCorruptError if a row array's zarr.json is not what the manifest asks for: zarr would believe it."""
    manifest = read_manifest(store)
    expected = _row_array_json(manifest.store, manifest.teacher, array, dict(manifest.store.codecs)[array])
    _check_array_json(store, array, _read_listed(store, _small_files_of(store), f"{array}/zarr.json"), expected)


def is_same_json(found: bytes, expected: bytes) -> bool:
    """Whether two pieces of JSON are the same value, however it is spelled; `found` may be none at all."""
    try:
        return json.loads(found) == json.loads(expected)
    except (ValueError, RecursionError):
        return False


def _check_array_json(store: Path, array: str, found: bytes, expected: bytes) -> None:
    """Raise CacheCorruptError unless two array descriptions are the same value, however it is spelled."""
    if not is_same_json(found, expected):
        raise CacheCorruptError(f"{store / array / 'zarr.json'}: does not describe the array that the store's manifest does.")


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
    endian = {} if dtype in ("int8", "uint8") else {"configuration": {"endian": "little"}}
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


def small_files(
    manifest: Manifest, statistics: dict[int, ChannelStatistics], head: dict[str, np.ndarray], probe: np.ndarray
) -> dict[str, bytes]:
    """Every file of a store as it is begun but store.json, by name. Arguments as for `create_store`."""
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
    return files | {f"{group}/zarr.json": _group_json() for group in sorted(groups)}


def create_store(
    path: Path,
    manifest: Manifest,
    statistics: dict[int, ChannelStatistics],
    head: dict[str, np.ndarray],
    probe: np.ndarray,
) -> None:
    """Begin a store: all its small files and their spare, in a folder aside that is renamed into place.

    statistics: per layer (not for float16). head: `gamma`, `beta` [D] and `projection` [D, E] where the teacher has one.
    probe: float32 [L, D], the teacher's mean whitened token per stored layer on the probe image.
    """
    files = small_files(manifest, statistics, head, probe)
    files["store.json"] = seal({"files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}})
    files[SPARE] = pack_members(files)

    aside = clear_aside(path)
    (aside / "commits").mkdir(parents=True)
    for name, data in files.items():
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(aside / name, data)
    for folder in [aside, *(entry for entry in aside.rglob("*") if entry.is_dir())]:
        sync_folder(folder)
    publish(aside, path)


def small_array_shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every small array of a store."""
    teacher, spec = manifest.teacher, manifest.store
    shapes = {"probe": (len(spec.layers), teacher.dim), "head/gamma": (teacher.dim,), "head/beta": (teacher.dim,)}
    if teacher.projection_dim is not None:
        shapes["head/projection"] = (teacher.dim, teacher.projection_dim)
    for layer in spec.layers if spec.is_quantised else ():
        shapes |= {f"quant/{layer:02d}/{name}": (teacher.dim,) for name in ("centre", "spread")}
    return shapes


def read_small_array(store: Path, name: str) -> np.ndarray:
    """A small float32 array (`quant/08/centre`, `head/gamma`, `probe`), checked against store.json and the manifest.

    Read without zarr: one chunk of little-endian float32, then its CRC-32C.
    """
    shape = small_array_shapes(read_manifest(store))[name]
    files, n_bytes = _small_files_of(store), 4 * math.prod(shape) + 4
    chunk = _read_listed(store, files, f"{name}/" + ".".join(["c", *["0"] * len(shape)]), n_bytes)
    expected = _array_json(shape, shape, "float32", _codecs("float32"))
    _check_array_json(store, name, _read_listed(store, files, f"{name}/zarr.json"), expected)
    if len(chunk) != n_bytes:
        raise CacheCorruptError(f"{store / name}: has {len(chunk)} bytes; the manifest asks for {shape} of float32.")
    values = np.frombuffer(chunk[:-4], "<f4").reshape(shape)
    if not np.isfinite(values).all():
        raise CacheCorruptError(f"{store / name}: holds numbers that are not finite.")
    return values


def shared_sha256(store: Path) -> dict[str, str]:
    """SHA-256 of the files that all views of a teacher share: quantiser, head and probe."""
    return {name: sum_ for name, sum_ in _small_files_of(store).items() if name.split("/")[0] in ("quant", "head", "probe")}


def read_statistics(store: Path, spec: StoreSpec) -> dict[int, ChannelStatistics]:
    """Per stored layer; empty for float16."""
    if not spec.is_quantised:
        return {}
    names = ("centre", "spread")
    return {i: ChannelStatistics(*(read_small_array(store, f"quant/{i:02d}/{name}") for name in names)) for i in spec.layers}


def read_head(store: Path, teacher: TeacherSpec) -> dict[str, np.ndarray]:
    """Final norm (`gamma`, `beta` [D]) and `projection` [D, E] where the teacher has one. float32."""
    names = ["gamma", "beta"] + ["projection"] * (teacher.projection_dim is not None)
    return {name: read_small_array(store, f"head/{name}") for name in names}


def come_by_themselves(weights: str) -> bool:
    """Whether TeacherSpec.weights are loaded with the teacher: built in, or by timm or open_clip (LoadedWeights.source)."""
    return weights == "built-in" or " pretrained: " in weights


def extract_command(cache: Path, store_name: str, manifest: Manifest) -> str:
    """The command that makes or finishes this store; whatever it leaves out is taken from what is there.

    A store knows the name of its weights file and not its folder: `PATH/OF/` stands for that.
    """
    weights, name = manifest.teacher.weights, manifest.teacher.name
    if "/" not in weights and not weights.startswith("random:"):
        weights = f"PATH/OF/{weights}" if not come_by_themselves(weights) else weights
    with_weights = "" if come_by_themselves(weights) else f" --weights {shlex.quote(weights)}"
    with_name = "" if store_file_name(name) == store_name else f" --name {store_name}"
    return f"teacher-cache extract --teacher {name}{with_weights}{with_name} {shlex.quote(str(cache))}"


def store_file_name(name: str) -> str:
    """A teacher's name as the name of its store: `timm:vit` -> `timm_vit`."""
    return name.replace(":", "_").replace("/", "_")
