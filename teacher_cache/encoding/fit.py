"""Fitting the quantiser to a sample of tokens that does not fit into memory: it lies in a file, and is read a layer at a time.

The sample of a large teacher with many layers has gigabytes. The file has no name, so that nothing stays of it whatever happens.
"""

from __future__ import annotations

import errno
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UsageError
from ..files.durable import ASIDE
from ..format.quantize import ChannelStatistics, dequantise, token_errors
from ..format.spec import LayerFidelity, StoreSpec, TeacherSpec
from ..format.transform import Transform, least_tokens

FIT_ROWS = 2048
"""Rows of view 0 that the quantiser is fitted on; fewer for small sets, whose extraction they would double."""
TRANSFORM_ROWS = 4096
"""That a transform is fitted on, if there are as many. Crops count, more than tokens of each (docs/design/0014)."""
FIT_TOKENS = 32
"""Tokens drawn from each of these rows."""
LEAST_ROWS = 16
"""Of a small set, if it has as many."""
HELD_ROWS = 256
"""Further rows, at most, on which the error of a transform is measured."""
NAMED = "fit-"
"""How the file's name begins where it must have one for a moment."""
BLOCK_VALUES = 1 << 22
"""Numbers of a layer that are stored and read back at a time to measure what that does to them."""


def _nameless(folder: Path) -> int:
    """A descriptor of a new file on the disk of `folder` that no folder names, so that it is gone with this process."""
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):  # of a file system that always gives names
            raise
    for left in folder.glob(f"{NAMED}*{ASIDE}"):  # of a process that was killed before its next line
        left.unlink(missing_ok=True)
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=NAMED, suffix=ASIDE)
    Path(name).unlink()
    return descriptor


@dataclass(frozen=True)
class SampleSize:
    """How many tokens a store is fitted on."""

    n_rows: int
    """The first of view 0."""
    n_tokens: int
    """Drawn from each of them."""
    n_held: int = 0
    """Rows behind them, from which as many are drawn, to measure the error on."""

    @classmethod
    def of(cls, spec: StoreSpec, teacher: TeacherSpec) -> SampleSize:
        """Of a store. UsageError if there are too few images to fit a transform on."""
        n_tokens = spec.n_tokens(teacher)
        n_rows, n_drawn = min(FIT_ROWS, max(LEAST_ROWS, spec.n_rows // 8), spec.n_rows), min(FIT_TOKENS, n_tokens)
        if not spec.is_transformed:
            return cls(n_rows, n_drawn)
        least = least_tokens(len(spec.layers), teacher.dim)
        n_held = max(1, min(HELD_ROWS, spec.n_rows // 8))
        n_rows = min(max(TRANSFORM_ROWS, -(-least // n_drawn)), spec.n_rows - n_held)
        n_drawn = min(n_tokens, max(n_drawn, -(-least // max(1, n_rows))))
        if n_rows * n_drawn < least:
            raise UsageError(
                f"--dtype {spec.dtype}: a transform of {len(spec.layers)} layers of width {teacher.dim} is fitted on at least "
                f"{least:,} tokens; {spec.n_rows:,} images have {max(0, n_rows) * n_tokens:,} to fit on. Give --dtype int4 or "
                "int8, fewer --layers, or more images."
            )
        return cls(n_rows, n_drawn, n_held)

    @property
    def all_rows(self) -> int:
        return self.n_rows + self.n_held


def least_rows(spec: StoreSpec, teacher: TeacherSpec) -> int:
    """Images that a store has at least, so that it can be fitted."""
    if not spec.is_transformed:
        return 1
    n_rows = -(-least_tokens(len(spec.layers), teacher.dim) // spec.n_tokens(teacher))
    return n_rows + max(1, min(HELD_ROWS, -(-n_rows // 7)))


def fit_bytes(spec: StoreSpec, teacher: TeacherSpec) -> int:
    """Bytes of the file that a sample takes on the disk of the cache, before any target is there."""
    size = SampleSize.of(spec, teacher)
    return 4 * len(spec.layers) * size.all_rows * size.n_tokens * teacher.dim


class Sample:
    """Tokens of some rows, [L, n, D], in a file without a name. A context manager.

    folder: on whose disk it lies. Rows are added in their order.
    """

    def __init__(self, folder: Path, spec: StoreSpec, teacher: TeacherSpec):
        self.size = SampleSize.of(spec, teacher)
        self.n_fitted, self.n_drawn = self.size.n_rows * self.size.n_tokens, self.size.n_tokens
        self.shape = (self.size.all_rows * self.n_drawn, teacher.dim)
        self.has_cls = bool(spec.is_transformed and teacher.has_cls)
        """Whether the first token drawn of a row is CLS, always; else it comes by chance as any other."""
        self._n_tokens, self.n_layers, self._n_added = spec.n_tokens(teacher), len(spec.layers), 0
        self._draws = np.random.Philox(key=0)
        self._file = open(_nameless(folder), "w+b")  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> Sample:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def draw(self, n_rows: int) -> np.ndarray:
        """int64 [n_rows, n_drawn]: which of the T tokens are drawn of the next rows; all of them where there are fewer."""
        n_cls = int(self.has_cls)
        drawn = np.zeros((n_rows, self.n_drawn), "int64")
        for row in drawn:
            order = np.argsort(self._draws.random_raw(self._n_tokens - n_cls), kind="stable")
            row[n_cls:] = order[: self.n_drawn - n_cls] + n_cls
        return drawn

    def add(self, drawn: np.ndarray) -> None:
        """drawn: float32 [B, L, n_drawn, D], the tokens drawn of the next rows."""
        rows = drawn.swapaxes(0, 1).reshape(self.n_layers, -1, drawn.shape[-1])
        for layer in range(self.n_layers):
            self._file.seek(4 * (layer * self.shape[0] + self._n_added) * self.shape[1])
            self._file.write(np.ascontiguousarray(rows[layer], "float32").data.cast("B"))
        self._n_added += rows.shape[1]

    def tokens(self, layer: int, of: slice = slice(None)) -> np.ndarray:
        """float32 [n, D], the tokens `of` the layer at place `layer`; by default all."""
        first, stop, _ = of.indices(self.shape[0])
        values = np.empty((stop - first, self.shape[1]), "float32")
        self._file.seek(4 * (layer * self.shape[0] + first) * self.shape[1])
        if self._file.readinto(values.data.cast("B")) != values.nbytes:
            raise OSError("the sample that the quantiser is fitted on is shorter than what was written to it")
        return values


@dataclass(frozen=True)
class Fitted:
    """What a store of some dtype needs to begin."""

    statistics: dict
    """ChannelStatistics by layer; none for float16."""
    fidelity: tuple[LayerFidelity, ...]
    transform: Transform | None = None
    """Of klt."""


def fit(sample: Sample, spec: StoreSpec) -> Fitted:
    """Fit the quantiser of a store, and measure on the sample what storing does."""
    if spec.is_transformed:
        from .klt_fit import fit_klt  # needs torch

        return fit_klt(sample, spec)
    statistics, fidelity = {}, []
    for place, layer in enumerate(spec.layers):
        tokens = sample.tokens(place)
        channel = ChannelStatistics.fit(tokens)
        if spec.has_statistics:
            statistics[layer] = channel
        errors = _errors(tokens, channel, spec)
        fidelity.append(LayerFidelity(layer, *figures(errors), len(errors)))
        del tokens  # before the next layer comes
    return Fitted(statistics, tuple(fidelity))


def figures(errors: np.ndarray) -> tuple[float, float, float]:
    """Median, p99 and worst: what LayerFidelity has of errors."""
    return float(np.quantile(errors, 0.5)), float(np.quantile(errors, 0.99)), float(errors.max())


def _errors(tokens: np.ndarray, channel: ChannelStatistics, spec: StoreSpec) -> np.ndarray:
    """What storing does to each of these tokens, float64 [n]; worked out in blocks, as it takes ten times their memory."""
    n_tokens = max(1, BLOCK_VALUES // tokens.shape[1])
    blocks = (tokens[start : start + n_tokens] for start in range(0, len(tokens), n_tokens))
    return np.concatenate([token_errors(block, _round_trip(block, channel, spec), channel) for block in blocks])


def _round_trip(tokens: np.ndarray, channel: ChannelStatistics, spec: StoreSpec) -> np.ndarray:
    """Tokens [..., D], stored and read back: float32 [..., D]."""
    if not spec.has_scales:
        return tokens.astype("float16").astype("float32")
    from .encode import quantise_on_host  # needs torch

    stored, scale = quantise_on_host(tokens, channel, spec.dtype, spec.group)
    return dequantise(stored, scale, channel, spec.dtype, spec.group)
