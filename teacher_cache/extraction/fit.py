"""Fitting the quantiser to a sample of tokens that does not fit into memory: it lies in a file, and is read a layer at a time.

The sample of a large teacher with many layers has gigabytes. The file has no name, so that nothing stays of it whatever happens.
"""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import numpy as np

from ..files.durable import ASIDE
from ..format.quantize import ChannelStatistics, dequantise, token_errors
from ..format.spec import LayerFidelity, StoreSpec, TeacherSpec

FIT_ROWS = 2048
"""Rows of view 0 that the quantiser is fitted on; fewer for small sets, whose extraction they would double."""
FIT_TOKENS = 32
"""Tokens drawn from each of these rows."""
LEAST_ROWS = 16
"""Of a small set, if it has as many."""
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


def n_fit_rows(n_rows: int) -> int:
    """Rows that are sampled, the first of view 0."""
    return min(FIT_ROWS, max(LEAST_ROWS, n_rows // 8), n_rows)


def fit_bytes(spec: StoreSpec, teacher: TeacherSpec) -> int:
    """Bytes of the file that a sample takes on the disk of the cache, before any target is there."""
    return 4 * len(spec.layers) * n_fit_rows(spec.n_rows) * min(FIT_TOKENS, spec.n_tokens(teacher)) * teacher.dim


class Sample:
    """Tokens of some rows, [L, n, D], in a file without a name. A context manager.

    folder: on whose disk it lies. Rows are added in their order.
    """

    def __init__(self, folder: Path, spec: StoreSpec, teacher: TeacherSpec):
        self._n_tokens = spec.n_tokens(teacher)
        self.n_drawn = min(FIT_TOKENS, self._n_tokens)
        self.shape = (n_fit_rows(spec.n_rows) * self.n_drawn, teacher.dim)
        self.n_layers, self._n_added = len(spec.layers), 0
        self._draws = np.random.Philox(key=0)
        self._file = open(_nameless(folder), "w+b")  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> Sample:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def draw(self, n_rows: int) -> np.ndarray:
        """int64 [n_rows, FIT_TOKENS]: which of the T tokens are drawn of the next rows; all of them where there are fewer."""
        drawn = [np.argsort(self._draws.random_raw(self._n_tokens), kind="stable")[:FIT_TOKENS] for _ in range(n_rows)]
        return np.array(drawn, "int64").reshape(n_rows, -1)

    def add(self, drawn: np.ndarray) -> None:
        """drawn: float32 [B, L, FIT_TOKENS, D], the tokens drawn of the next rows."""
        rows = drawn.swapaxes(0, 1).reshape(self.n_layers, -1, drawn.shape[-1])
        for layer in range(self.n_layers):
            self._file.seek(4 * (layer * self.shape[0] + self._n_added) * self.shape[1])
            self._file.write(np.ascontiguousarray(rows[layer], "float32").data.cast("B"))
        self._n_added += rows.shape[1]

    def tokens(self, layer: int) -> np.ndarray:
        """float32 [n, D] of the layer at place `layer`."""
        values = np.empty(self.shape, "float32")
        self._file.seek(layer * values.nbytes)
        if self._file.readinto(values.data.cast("B")) != values.nbytes:
            raise OSError("the sample that the quantiser is fitted on is shorter than what was written to it")
        return values


def fit(sample: Sample, spec: StoreSpec):
    """Channel statistics by layer (none for float16), and fidelity of each layer."""
    statistics, fidelity = {}, []
    for place, layer in enumerate(spec.layers):
        tokens = sample.tokens(place)
        channel = ChannelStatistics.fit(tokens)
        if spec.is_quantised:
            statistics[layer] = channel
        errors = _errors(tokens, channel, spec)
        median, p99 = (float(np.quantile(errors, q)) for q in (0.5, 0.99))
        fidelity.append(LayerFidelity(layer, median, p99, float(errors.max()), len(errors)))
        del tokens  # before the next layer comes
    return statistics, tuple(fidelity)


def _errors(tokens: np.ndarray, channel: ChannelStatistics, spec: StoreSpec) -> np.ndarray:
    """What storing does to each of these tokens, float64 [n]; worked out in blocks, as it takes ten times their memory."""
    n_tokens = max(1, BLOCK_VALUES // tokens.shape[1])
    blocks = (tokens[start : start + n_tokens] for start in range(0, len(tokens), n_tokens))
    return np.concatenate([token_errors(block, _round_trip(block, channel, spec), channel) for block in blocks])


def _round_trip(tokens: np.ndarray, channel: ChannelStatistics, spec: StoreSpec) -> np.ndarray:
    """Tokens [..., D], stored and read back: float32 [..., D]."""
    if not spec.is_quantised:
        return tokens.astype("float16").astype("float32")
    from .encode import quantise_on_host  # needs torch

    stored, scale = quantise_on_host(tokens, channel, spec.dtype, spec.group)
    return dequantise(stored, scale, channel, spec.dtype, spec.group)
