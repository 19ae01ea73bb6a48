"""What a store says about itself, and all its files as it is begun: a zarr v3 group, its manifest, its small arrays.

zarr.json holds the Manifest as attributes["teacher_cache"]; store.json, sealed, the SHA-256 of every small file, and its presence
says that the store was begun (layout.py draws the folder). Reading is store.py's, shards are written by writer.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import BadInputError, CacheCorruptError
from ..files.durable import clear_aside, crc32c, is_sha256, publish, seal, sync_folder, write_whole
from ..format import layout
from ..format.layout import store_file_name
from ..format.quantize import ChannelStatistics
from ..format.spec import NOT_BEFORE_3, NOT_BEFORE_4, STORE_VERSIONS, LayerFidelity, MadeWith, StoreSpec, TeacherSpec
from ..format.transform import N_LEVELS, N_SCALES, Transform
from .spare import pack_members

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
    format_version: int = 4
    source: dict | None = None
    """Of a store that was recoded from another (recode.py): its `name`, `dtype` and the `sha256` of its zarr.json."""

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
        if (self.format_version >= 5) != self.store.is_transformed:
            raise ValueError(f"format version {self.format_version} of a store of dtype {self.store.dtype}")
        if self.source is not None and not (
            self.format_version >= 5 and isinstance(self.source, dict) and set(self.source) == {"name", "dtype", "sha256"}
            and all(isinstance(value, str) for value in self.source.values()) and is_sha256(self.source["sha256"])
        ):  # fmt: skip
            raise ValueError(f"source must give name, dtype and sha256 of a store, not {self.source!r}")
        if self.format_version < 5 and any(layer.cls is not None for layer in self.fidelity):
            raise ValueError(f"fidelity of CLS apart in version {self.format_version}, which has no words for it")
        of_then = {name: getattr(self.teacher, name) for name in NOT_BEFORE_4}
        if self.format_version < 4 and of_then != _of_teacher_before_4(self.teacher.has_cls):
            raise ValueError(f"{of_then} in version {self.format_version}, which has no words for it")

    def to_json(self) -> dict:
        value = dataclasses.asdict(self)
        version = value.pop("format_version")
        if version < 5:
            del value["source"]
            for layer in value["fidelity"]:
                del layer["cls"]
        unsaid = NOT_BEFORE_4 * (version < 4) + NOT_BEFORE_3 * (version < 3)
        value["teacher"] = {key: item for key, item in value["teacher"].items() if key not in unsaid}
        if version < 3:
            del value["made"]
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
            teacher, store, fidelity = value["teacher"], value["store"], value["fidelity"]
            if version < 5:
                value = _with_words(value, {"source": None})
                fidelity = [_with_words(layer, {"cls": None}) for layer in fidelity]
            if version < 4:
                teacher = _with_words(teacher, _of_teacher_before_4(teacher["has_cls"]))
            if version < 3:
                teacher, value = _with_words(teacher, dict.fromkeys(NOT_BEFORE_3)), _with_words(value, {"made": None})
            else:
                value = {**value, "made": MadeWith.from_json(value["made"])}
            if version < 2:
                store = _with_words(store, {"visible": 0})
            value["teacher"], value["store"] = TeacherSpec.from_json(teacher), StoreSpec.from_json(store)
            value["fidelity"] = tuple(LayerFidelity.from_json(layer) for layer in fidelity)
            return cls(**value)
        except BadInputError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise CacheCorruptError(f"manifest: {error!r}.") from error


def _of_teacher_before_4(has_cls: bool) -> dict:
    """What NOT_BEFORE_4 was of every teacher then."""
    return {"attention_source": "cls" if has_cls else None, "head": "layernorm"}


def _with_words(value: dict, then: dict) -> dict:
    """A part of an old manifest with the keys that its version has no words for; `then` is what they were."""
    if known := [name for name in then if name in value]:
        raise ValueError(f"{', '.join(known)}: its version has no such key")
    return {**value, **then}


def manifest_of(root_json: bytes, path: Path) -> Manifest:
    """The manifest in the bytes of a store's zarr.json. Errors name `path`."""
    try:
        return Manifest.from_json(json.loads(root_json)["attributes"]["teacher_cache"])
    except BadInputError as error:
        raise BadInputError(f"{path.parent}: {error}") from None
    except (KeyError, TypeError, ValueError, RecursionError, CacheCorruptError) as error:
        raise CacheCorruptError(f"{path}: {error}") from error


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


def row_array_json(spec: StoreSpec, teacher: TeacherSpec, array: str, codec: str) -> bytes:
    """A sharded array whose inner chunk is one row."""
    row, dtype = spec.row_shape(array, teacher), spec.row_dtype(array)
    sharding = {"chunk_shape": [1, *row], "codecs": _codecs(dtype, codec)}
    sharding |= {"index_codecs": _codecs("uint64"), "index_location": "end"}
    sharded = [{"name": "sharding_indexed", "configuration": sharding}]
    return _array_json((spec.n_rows, *row), (spec.shard_rows, *row), dtype, sharded)


def small_array_json(shape: tuple[int, ...]) -> bytes:
    """zarr.json of a float32 array of one chunk."""
    return _array_json(shape, shape, "float32", _codecs("float32"))


def _small_array(name: str, values: np.ndarray) -> dict[str, bytes]:
    """The files of a float32 array of one chunk."""
    data = np.ascontiguousarray(values, "<f4").tobytes()
    return {
        f"{name}/{layout.ZARR_JSON}": small_array_json(values.shape),
        layout.only_chunk(name, values.ndim): data + crc32c(data).to_bytes(4, "little"),
    }


def small_files(manifest: Manifest, arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
    """Every file of a store as it is begun but store.json, by name. arrays: those of `small_array_shapes`."""
    spec, teacher = manifest.store, manifest.teacher
    files = {layout.ZARR_JSON: _group_json({"teacher_cache": manifest.to_json()})}
    for name, values in arrays.items():
        files |= _small_array(name, values)
    for array, codec in spec.codecs:
        files[f"{array}/{layout.ZARR_JSON}"] = row_array_json(spec, teacher, array, codec)
    groups = {parent.as_posix() for name in files for parent in Path(name).parents} - {".", *(str(Path(n).parent) for n in files)}
    return files | {f"{group}/{layout.ZARR_JSON}": _group_json() for group in sorted(groups)}


def create_store(
    path: Path,
    manifest: Manifest,
    statistics: dict[int, ChannelStatistics],
    head: dict[str, np.ndarray],
    probe: np.ndarray,
    transform: Transform | None = None,
) -> None:
    """Begin a store: all its small files and their spare, in a folder aside that is renamed into place.

    statistics: per layer (not for float16). head: the arrays of `head_shapes`.
    probe: float32 [L, D], the teacher's mean whitened token per stored layer on the probe image. transform: of klt.
    """
    arrays = {
        layout.statistics_name(layer, which): getattr(channel, which)
        for layer, channel in statistics.items()
        for which in layout.STATISTICS
    }
    if transform is not None:
        arrays |= _transform_arrays(transform)
    arrays |= {layout.head_name(which): values for which, values in head.items()}
    files = small_files(manifest, {**arrays, layout.PROBE: probe})
    files[layout.STORE_JSON] = seal({"files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}})
    files[layout.SPARE] = pack_members(files)

    aside = clear_aside(path)
    (aside / layout.COMMITS).mkdir(parents=True)
    for name, data in files.items():
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(aside / name, data)
    for folder in [aside, *(entry for entry in aside.rglob("*") if entry.is_dir())]:
        sync_folder(folder)
    publish(aside, path)


def _transform_arrays(transform: Transform) -> dict[str, np.ndarray]:
    """The small arrays of a transform, by name."""
    arrays = {layout.LEVELS: transform.levels, layout.SCALES: transform.scales}
    for layer, code in transform.layers.items():
        arrays |= {layout.statistics_name(layer, which): getattr(code, which) for which in layout.TRANSFORM}
    return arrays


def head_shapes(teacher: TeacherSpec) -> dict[str, tuple[int, ...]]:
    """`gamma`, `beta` [D] where there is a final norm, and `projection` [D, E] where there is one; by name, float32 all."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("gamma", "beta") * teacher.has_final_norm, (teacher.dim,))
    return shapes if teacher.projection_dim is None else {**shapes, "projection": (teacher.dim, teacher.projection_dim)}


def small_array_shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every small array of a store."""
    teacher, spec = manifest.teacher, manifest.store
    shapes = {layout.PROBE: (len(spec.layers), teacher.dim)}
    shapes |= {layout.head_name(which): shape for which, shape in head_shapes(teacher).items()}
    for layer in spec.layers if spec.has_statistics else ():
        shapes |= {layout.statistics_name(layer, which): (teacher.dim,) for which in layout.STATISTICS}
    if spec.is_transformed:
        shapes |= {layout.LEVELS: (N_LEVELS,), layout.SCALES: (N_SCALES,)}
        for layer in spec.layers:
            shapes |= {layout.statistics_name(layer, which): (teacher.dim,) for which in layout.TRANSFORM}
            shapes[layout.statistics_name(layer, "basis")] = (len(spec.read_with(layer)) * teacher.dim, teacher.dim)
    return shapes


def come_by_themselves(weights: str) -> bool:
    """Whether TeacherSpec.weights are loaded with the teacher: built in, or by timm or open_clip (LoadedWeights.source)."""
    return weights == "built-in" or " pretrained: " in weights


def extract_command(cache: Path, store_name: str, manifest: Manifest) -> str:
    """The command that makes or finishes this store; whatever it leaves out is taken from what is there.

    A store knows the name of its weights file and not its folder: `PATH/OF/` stands for that. One that was recoded is made by
    that.
    """
    if manifest.source is not None:
        source, dtype = manifest.source["name"], manifest.store.dtype
        return f"teacher-cache recode --store {source} --dtype {dtype} --name {store_name} {shlex.quote(str(cache))}"
    weights, name = manifest.teacher.weights, manifest.teacher.name
    if "/" not in weights and not weights.startswith("random:"):
        weights = f"PATH/OF/{weights}" if not come_by_themselves(weights) else weights
    with_weights = "" if come_by_themselves(weights) else f" --weights {shlex.quote(weights)}"
    with_name = "" if store_file_name(name) == store_name else f" --name {store_name}"
    return f"teacher-cache extract --teacher {name}{with_weights}{with_name} {shlex.quote(str(cache))}"
