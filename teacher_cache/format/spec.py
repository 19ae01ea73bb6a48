"""What a store says about itself: frozen values with `to_json` and `from_json`, checked when built, no I/O.

Everything a reader needs to interpret bytes on disk is here; facts about single shards are not (see commits.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import CacheCorruptError, UsageError
from .dtypes import DTYPES, dtype_of
from .transform import MOST_WIDE, token_bytes

CACHE_VERSIONS = (1, 2)
"""Of caches and their crops; 2 came with random crops of more than 256 pixels, and says nothing else otherwise than 1."""
STORE_VERSIONS = (1, 2, 3, 4, 5)
"""Of stores. 2 came with int4 and visible tokens; 3 with the teacher's activation and position rule, and what made the store; 4
with where the attention comes from and whether there is a final norm; 5 is that of stores coded by a transform, and of no other:
new ones of another dtype are of version 4 (new_version)."""

MAX_SIDE = 1 << 14
"""Of images and patches in pixels, of grids in patches."""
MAX_WIDTH = 1 << 16
"""Of teachers and projections, channels; of blocks, heads and registers, too."""
MAX_ROWS = 1 << 32
MAX_SHARD_ROWS = 1 << 20
MAX_SHARD_FILES = 1 << 24
"""Shards times row arrays: shards.npy then has at most 200 MB."""
MAX_FP32_ROWS = 1 << 20
"""Of a store: `complete.json` then has at most 15 MB."""
MAX_ROW_BYTES = 1 << 30
"""Of one row of one array. A reader takes memory for rows before it has seen them."""


def from_json(cls, value: dict):
    """Build the dataclass `cls` from a parsed JSON object; unknown or missing keys are corruption."""
    names = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(value, dict) or set(value) != names:
        given = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise CacheCorruptError(f"{cls.__name__}: expected the keys {sorted(names)}, found {given}.")
    tupled = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
    try:
        return cls(**tupled)
    except (TypeError, ValueError, OverflowError) as error:
        raise CacheCorruptError(f"{cls.__name__}: {error}") from error


def _require_count(name: str, value, most: int, least: int = 1) -> None:
    """Raise UsageError unless `value` is an integer from `least` to `most`. True is none."""
    if type(value) is not int or not least <= value <= most:
        raise UsageError(f"{name} must be an integer from {least} to {most}, not {value!r}")


def most_fp32_rows(n_rows: int) -> int:
    """How many of the rows of a shard a bf16 teacher may need fp32 for; with more, bf16 is the wrong precision for it."""
    return max(8, n_rows // 64)


def _are_numbers(values) -> bool:
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)


NOT_BEFORE_3 = ("activation", "positions")
"""What of a teacher stores of versions 1 and 2 do not say."""
NOT_BEFORE_4 = ("attention_source", "head")
"""What of a teacher stores of versions 1 to 3 do not say, because it followed from `has_cls`."""
ATTENTION_SOURCES = {"cls": "CLS", "pool": "pooling"}
"""`TeacherSpec.attention_source` -> which attention that is, for people: `CLS attention`, `pooling attention`."""
HEADS = ("layernorm", "none")
LIKEWISE = "; position table likewise"
"""How `resize` of these ends, where the rule for pixels was the one for positions."""


@dataclass(frozen=True)
class TeacherSpec:
    """A frozen teacher, described by data: enough to read its targets without ever loading it."""

    name: str
    """As given to `--teacher`: `clip-b16`, `demo`, `timm:vit_tiny_patch16_224`."""
    weights: str
    """Where the weights came from: a file's name, `FILE#KEY` for a part of one, `random:SEED` or `built-in`."""
    weights_sha256: str
    """Of the weights file; for random weights, and for a part that only `#KEY` tells, of names, shapes and bytes of all tensors
    in sorted order."""
    image_size: int
    """Side of the teacher's square input, pixels."""
    patch_size: int
    """Side of what one token stands for, pixels of the input."""
    grid: tuple[int, int]
    """(rows, columns) of patches; N = rows * columns."""
    dim: int
    """Width D of the residual stream."""
    depth: int
    """Blocks that can be asked for, numbered from 1; of a Swin those of the last stage."""
    heads: int
    """Of the last block."""
    has_cls: bool
    """C = 1: the CLS token is stored, first. Else C = 0."""
    n_registers: int
    """Further prefix tokens, which are dropped."""
    mean: tuple[float, float, float]
    """Of the input normalisation, for pixels in 0..1."""
    std: tuple[float, float, float]
    norm_eps: float
    """Of the whitening. It is that of the final norm; with `head` none that of the norms in the blocks."""
    projection_dim: int | None
    """Width E of the projection behind the final norm (CLIP), else None."""
    resize: str
    """How a crop of another size becomes `image_size`; in stores before version 3 also how the position table follows."""
    activation: str | None
    """Of the MLP of its blocks: `gelu`, `quick_gelu`, `gelu_tanh` ... None: not on record, as in stores before version 3."""
    positions: str | None
    """How its position table follows another grid, in words. None: not on record."""
    attention_source: str | None
    """What attends to the patches in the attention that is kept: `cls`, the CLS token in the last block; `pool`, the query of the
    attention-pooling head. Mean over heads, either way. None: the teacher gives no attention."""
    head: str
    """`layernorm`: a final LayerNorm follows the last block, and its gamma and beta are kept. `none`: none does (there is no
    norm, or one that whitened tokens do not lead to), and nothing of a head is kept."""

    def __post_init__(self) -> None:
        unknown = [name for name in NOT_BEFORE_3 if getattr(self, name) is None]
        for name in sorted({"name", "weights", "weights_sha256", "resize", *NOT_BEFORE_3}.difference(unknown)):
            if not isinstance(getattr(self, name), str):
                raise UsageError(f"{name} must be text, not {getattr(self, name)!r}")
        if not isinstance(self.grid, tuple) or len(self.grid) != 2:
            raise UsageError(f"grid must be (rows, columns), not {self.grid!r}")
        sides = {"image_size": self.image_size, "patch_size": self.patch_size, "grid rows": self.grid[0],
                 "grid columns": self.grid[1]}  # fmt: skip
        for name, side in sides.items():
            _require_count(name, side, MAX_SIDE)
        for name in ("dim", "depth", "heads"):
            _require_count(name, getattr(self, name), MAX_WIDTH)
        _require_count("n_registers", self.n_registers, MAX_WIDTH, least=0)
        if self.projection_dim is not None:
            _require_count("projection_dim", self.projection_dim, MAX_WIDTH)
        if not isinstance(self.has_cls, bool):
            raise UsageError(f"has_cls must be true or false, not {self.has_cls!r}")
        if len(self.mean) != 3 or len(self.std) != 3 or not _are_numbers(self.mean + self.std) or not min(self.std) > 0:
            raise UsageError(f"mean and std must have 3 channels and std be positive: {self.mean!r}, {self.std!r}")
        if not (_are_numbers([self.norm_eps]) and self.norm_eps > 0):
            raise UsageError(f"norm_eps must be positive, not {self.norm_eps!r}")
        if self.attention_source not in (None, *ATTENTION_SOURCES):
            raise UsageError(
                f"attention_source must be one of {', '.join(ATTENTION_SOURCES)}, or null, not {self.attention_source!r}"
            )
        if self.attention_source == "cls" and not self.has_cls:
            raise UsageError("attention_source is cls, and the teacher has no CLS token")
        if self.head not in HEADS:
            raise UsageError(f"head must be one of {', '.join(HEADS)}, not {self.head!r}")
        if self.head == "none" and self.projection_dim is not None:
            raise UsageError(
                f"projection_dim is {self.projection_dim}, and there is no final norm for the projection to stand behind"
            )

    @property
    def n_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def has_final_norm(self) -> bool:
        """Whether gamma and beta are kept: gamma * z + beta of the last block's whitened tokens is then the teacher's output."""
        return self.head == "layernorm"

    def in_version(self, version: int) -> TeacherSpec:
        """The teacher as stores of a format version know it: before 4, one without CLS token gave no attention."""
        return dataclasses.replace(self, attention_source=None) if version < 4 and not self.has_cls else self

    @property
    def n_tokens(self) -> int:
        """C + N, the length of the stored token axis."""
        return self.n_patches + int(self.has_cls)

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict) -> TeacherSpec:
        return from_json(cls, value)


def comparable(a: dict, b: dict) -> tuple[dict, dict]:
    """Two teachers (TeacherSpec.to_json) as far as both are on record: what one does not say differs from nothing."""
    unknown = [name for name in NOT_BEFORE_3 if a[name] is None or b[name] is None]
    a, b = ({key: value for key, value in teacher.items() if key not in unknown} for teacher in (a, b))
    if "positions" in unknown:
        a, b = ({**teacher, "resize": teacher["resize"].removesuffix(LIKEWISE)} for teacher in (a, b))
    return a, b


CODECS = ("none", "zstd", "lz4")
"""Of the rows of an array. A store is begun with `none`; the others are of stores that were begun before."""
ARRAY_NAME = "tokens/{:02d}"
NOT_BY_TOKEN = ("attention", "index")
"""Row arrays that have no axis of tokens; the others have it last but one."""


def array_names(layers: tuple[int, ...], dtype: str, attention: bool, visible: int) -> list[str]:
    """The row arrays of a store that keeps this: see StoreSpec.array_names."""
    tokens = [ARRAY_NAME.format(layer) for layer in layers]
    return tokens + ["scale"] * (dtype in ("int8", "int4")) + ["attention"] * attention + ["index"] * (visible > 0)


@dataclass(frozen=True)
class StoreSpec:
    """What a store keeps and how: everything needed to find and interpret a row."""

    n_rows: int
    shard_rows: int
    """Rows a shard; a shard is the unit of work, of commit and of resume."""
    layers: tuple[int, ...]
    """Stored block numbers, ascending, from 1."""
    dtype: str
    """`float16`: whitened values as they are. `int8`, `int4`: see quantize.py. `klt:BITS`: see transform.py."""
    group: int
    """Channels that share a scale (int8, int4); layers that are coded together, at most (klt); 0 for float16."""
    attention: bool
    """Whether the teacher's attention to the patches (`TeacherSpec.attention_source`) is kept."""
    codecs: tuple[tuple[str, str], ...]
    """(array, `zstd` | `lz4` | `none`) for every row array, in the order of their bytes in a commit record."""
    visible: int = 0
    """K, patch tokens kept of each crop: the first of an attention race (race.py), in its order, beside CLS. 0: all N."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "codecs", tuple(tuple(pair) for pair in self.codecs))
        _require_count("n_rows", self.n_rows, MAX_ROWS)
        _require_count("shard_rows", self.shard_rows, MAX_SHARD_ROWS)
        if not isinstance(self.dtype, str) or dtype_of(self.dtype) != self.dtype:
            raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if not self.layers or not all(type(layer) is int for layer in self.layers) or self.layers[0] < 1:
            raise UsageError(f"layers must be block numbers from 1, not {self.layers!r}")
        if list(self.layers) != sorted(set(self.layers)):
            raise UsageError(f"layers must be ascending, not {self.layers!r}")
        _require_count("group", self.group, *((0, 0) if self.dtype == "float16" else (MAX_WIDTH,)))
        if not isinstance(self.attention, bool):
            raise UsageError(f"attention must be true or false, not {self.attention!r}")
        _require_count("visible", self.visible, MAX_SIDE**2, least=0)
        if self.visible and not self.attention:
            raise UsageError("visible tokens are chosen by attention, which has to be kept too")
        if [name for name, _ in self.codecs] != self.array_names or not {c for _, c in self.codecs} <= set(CODECS):
            raise UsageError(f"codecs must name one codec for each of {self.array_names}, not {self.codecs!r}")
        if self.n_shards * len(self.codecs) > MAX_SHARD_FILES:
            raise UsageError(
                f"{self.n_rows:,} rows in shards of {self.shard_rows:,} make {self.n_shards * len(self.codecs):,} files; at most "
                f"{MAX_SHARD_FILES:,} are allowed. Give more --shard-rows."
            )

    def require_fit(self, teacher: TeacherSpec) -> None:
        """Raise UsageError unless a store like this can hold what `teacher` says."""
        if self.layers[-1] > teacher.depth:
            raise UsageError(f"layers {self.layers} of a teacher with {teacher.depth} blocks")
        if self.attention and teacher.attention_source is None:
            raise UsageError("attention of a teacher that gives none")
        if self.visible > teacher.n_patches:
            raise UsageError(f"{self.visible} visible patches of a teacher with {teacher.n_patches}")
        if self.is_transformed and teacher.dim * min(self.group, len(self.layers)) > MOST_WIDE:
            raise UsageError(f"a transform of {self.group} layers of width {teacher.dim}; at most {MOST_WIDE} are allowed")
        largest = max(self.row_bytes(array, teacher) for array in self.array_names)
        if largest > MAX_ROW_BYTES:
            raise UsageError(f"rows of {largest:,} bytes; at most {MAX_ROW_BYTES:,} are allowed")

    @property
    def array_names(self) -> list[str]:
        """The row arrays: tokens of each layer, then scale (int8, int4), then attention, then index (visible tokens)."""
        return array_names(self.layers, self.dtype, self.attention, self.visible)

    def arrays_read(self, layers: Iterable[int], attention: bool) -> list[str]:
        """The row arrays that give these stored layers, with what belongs to them, and the attention if it is wanted."""
        read = sorted({needed for layer in layers for needed in self.read_with(layer)})
        tokens = [ARRAY_NAME.format(layer) for layer in read]
        scale = ["scale"] * (self.has_scales and bool(tokens))
        return tokens + scale + ["attention"] * attention + ["index"] * (self.visible > 0)

    def read_with(self, layer: int) -> tuple[int, ...]:
        """The stored layers whose codes give this one, itself last; of klt also those behind it that are coded together with it,
        the last of them first."""
        if not self.is_transformed:
            return (layer,)
        behind = len(self.layers) - 1 - self.layers.index(layer)
        return tuple(reversed(self.layers[-1 - behind : len(self.layers) - behind // self.group * self.group]))

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """The layers that are coded together, the last one of each group first; of klt."""
        return list({self.read_with(layer)[0]: self.read_with(layer) for layer in reversed(self.layers)}.values())

    @property
    def is_transformed(self) -> bool:
        """Whether tokens are coded by a transform (klt)."""
        return self.dtype.startswith("klt:")

    @property
    def has_scales(self) -> bool:
        """Whether tokens come with an array of scales."""
        return self.dtype in ("int8", "int4")

    @property
    def has_statistics(self) -> bool:
        """Whether the store has channel statistics."""
        return self.dtype != "float16"

    @property
    def least_version(self) -> int:
        """The oldest format version of stores that can say this. Until 3 came, every store had it."""
        return 2 if self.visible or self.dtype == "int4" else 1

    @property
    def n_shards(self) -> int:
        return -(-self.n_rows // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        return range(shard * self.shard_rows, min(self.n_rows, (shard + 1) * self.shard_rows))

    def n_groups(self, teacher: TeacherSpec) -> int:
        """G, scales a token and layer."""
        return -(-teacher.dim // self.group) if self.has_scales else 0

    def n_tokens(self, teacher: TeacherSpec) -> int:
        """T, stored tokens of a crop and layer: C + N, or C + K of visible tokens."""
        return self.visible + int(teacher.has_cls) if self.visible else teacher.n_tokens

    def row_shape(self, array: str, teacher: TeacherSpec, n_tokens: int | None = None) -> tuple[int, ...]:
        """Shape of one row of `array`: tokens [T, D] (int4: [T, ceil(D / 2)]; klt: [T, bytes of a token]), scale [L, T, G],
        attention [N], index [K].

        n_tokens: T, where only some of the stored tokens are meant.
        """
        n_tokens = self.n_tokens(teacher) if n_tokens is None else n_tokens
        if array == "attention":
            return (teacher.n_patches,)
        if array == "index":
            return (self.visible,)
        if array == "scale":
            return (len(self.layers), n_tokens, self.n_groups(teacher))
        if self.is_transformed:
            return (n_tokens, token_bytes(self.dtype, teacher.dim))
        return (n_tokens, -(-teacher.dim // 2) if self.dtype == "int4" else teacher.dim)

    def row_dtype(self, array: str) -> str:
        """numpy name of the array's little-endian dtype."""
        of_tokens = self.dtype if self.dtype in ("int8", "float16") else "uint8"
        return {"attention": "float32", "scale": "float16", "index": "int32"}.get(array, of_tokens)

    def row_bytes(self, array: str, teacher: TeacherSpec, n_tokens: int | None = None) -> int:
        """Bytes of one uncompressed row, or of `n_tokens` of its tokens."""
        itemsize = {"float32": 4, "int32": 4, "float16": 2, "int8": 1, "uint8": 1}[self.row_dtype(array)]
        return math.prod(self.row_shape(array, teacher, n_tokens)) * itemsize

    def token_layout(self, array: str, teacher: TeacherSpec) -> tuple[int, int, int]:
        """How a row of tokens/NN or scale lies in memory: parts (scale has one a layer), tokens a part, bytes a token."""
        n_parts = len(self.layers) if array == "scale" else 1
        return n_parts, self.n_tokens(teacher), self.row_bytes(array, teacher, 1) // n_parts

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict) -> StoreSpec:
        return from_json(cls, value)


def new_version(spec: StoreSpec) -> int:
    """The format version of a new store."""
    return 5 if spec.is_transformed else 4


@dataclass(frozen=True)
class LayerFidelity:
    """What storing did to one layer, measured on the tokens the quantiser was fitted on; of klt on rows it was not fitted on.

    Error of a token: ||stored - true|| / ||true||, both standardised by channel (centre and spread of quantize.py), where no
    outlier channel can flatter the figure.
    """

    layer: int
    median: float
    p99: float
    worst: float
    n_tokens: int
    cls: tuple[float, float, float] | None = None
    """Median, p99 and worst of CLS tokens, where the figures above are of patches alone (klt); None: they are of both, or there
    is no CLS."""

    def __post_init__(self) -> None:
        _require_count("layer", self.layer, MAX_WIDTH)
        _require_count("n_tokens", self.n_tokens, 2**62, least=0)
        if self.cls is not None and not (isinstance(self.cls, tuple) and len(self.cls) == 3 and _are_numbers(self.cls)):
            raise UsageError(f"cls of layer {self.layer} must be three numbers or null, not {self.cls!r}")
        if not _are_numbers([self.median, self.p99, self.worst]):
            raise UsageError(f"errors of layer {self.layer} must be numbers, not {self.median!r}, {self.p99!r}, {self.worst!r}")

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict) -> LayerFidelity:
        return from_json(cls, value)


@dataclass(frozen=True)
class MadeWith:
    """How the teacher was run when a store was begun (record.py). Not identity."""

    batch_size: int
    compile: bool
    """Whether its blocks went through torch.compile."""
    device: str
    """A GPU's product name; `cpu` and the instructions that were used."""

    def __post_init__(self) -> None:
        _require_count("batch_size", self.batch_size, 2**31 - 1)
        if not isinstance(self.compile, bool):
            raise UsageError(f"compile must be true or false, not {self.compile!r}")
        if not isinstance(self.device, str):
            raise UsageError(f"device must be text, not {self.device!r}")

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict) -> MadeWith:
        return from_json(cls, value)
