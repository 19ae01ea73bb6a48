"""Whitened tokens <-> codes of a transform (`--dtype klt:BITS`): the format as values.

Layers are coded in groups, each from its last layer to its first. With u = (z - centre) / spread of quantize.py, a token is

    u = mean + coefficients @ basis            coefficients [n * D] of the n layers of its group from the last one down to it

The coefficients of the layers behind it predict it; its own are what is left, in the basis of its own covariance. Each is one of
2 ** bits levels, times the scale of its component, times the gain of the token in its layer:

    coefficient = gains[first byte] * (scale * levels[2 ** bits - 2 + code])

A token of a layer is a run of whole bytes: the number of its gain, 1 to 255, then the codes of its components back to back,
lowest bit first, with zeros behind the last. No gain has the number 0: it is the fill value, and a hole shows in every token.

Storing is worked out where the teacher runs (extraction/klt_encode.py), reading in training where the student does. Here is what
needs no torch: the values, their checks, reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import CacheCorruptError, UsageError
from .dtypes import klt_bits
from .quantize import ChannelStatistics

MOST_WIDE = 5120
"""Channels of the layers that are coded together."""
MOST_BITS = 10
"""Of a component."""
N_LEVELS = 2 ** (MOST_BITS + 1) - 2
"""Of 1 to MOST_BITS bits, one table behind the other."""
N_GAINS = 256

# B batch, T tokens, D width, n layers of a group from the last one down


def layers_together(dim: int) -> int:
    """Layers that are coded together, at most. UsageError for a teacher that is too wide."""
    if dim > MOST_WIDE:
        raise UsageError(f"dtype klt: a teacher of width {dim}; a transform takes up to {MOST_WIDE}. Give int8 or int4.")
    return MOST_WIDE // dim


def even_bytes(dtype: str, n_layers: int, dim: int) -> tuple[int, ...]:
    """Bytes of a token in each layer if all have the same, later ones a byte more where it does not come out even."""
    n_bytes = int(klt_bits(dtype) * dim * n_layers / 8 + 1e-9)
    if n_bytes < 2 * n_layers:
        raise UsageError(f"dtype {dtype}: {n_bytes} bytes for {n_layers} layers of width {dim} are too few. Give more bits.")
    return tuple((n_bytes + place) // n_layers for place in range(n_layers))


def least_tokens(n_layers: int, dim: int) -> int:
    """Tokens that a fit takes at least: 20 a channel of the widest group."""
    return 20 * dim * min(n_layers, layers_together(dim))


@dataclass(frozen=True)
class LayerCode:
    """How one layer is coded."""

    mean: np.ndarray
    """float32 [D]"""
    basis: np.ndarray
    """float32 [n * D, D]: rows of the coefficients of the layers behind it, the last first, then of its own."""
    bits: np.ndarray
    """int64 [D], of each of its components, descending; 0: not kept, its coefficient is 0."""
    scale: np.ndarray
    """float32 [D], positive."""

    @property
    def n_kept(self) -> int:
        """Components that have bits: the first ones."""
        return int((self.bits > 0).sum())

    @property
    def starts(self) -> np.ndarray:
        """int64 [D]: the bit of a token's codes where each component's begins."""
        return np.cumsum(self.bits) - self.bits

    @property
    def n_bytes(self) -> int:
        """Of a token, its gain included."""
        return 1 + -(-int(self.bits.sum()) // 8)


@dataclass(frozen=True)
class Transform:
    """How the tokens of a store are coded."""

    layers: dict[int, LayerCode]
    """By block number."""
    levels: np.ndarray
    """float32 [N_LEVELS]: of b bits those from 2 ** b - 2 on, ascending."""
    gains: np.ndarray
    """float32 [N_GAINS], by number; that of 0 counts for nothing."""

    def require_sound(self, token_bytes: Sequence[int], where) -> None:
        """Raise CacheCorruptError, naming the store `where`, unless tokens of these bytes a layer can be coded so."""
        tables = (self.levels[2**bits - 2 : 2 ** (bits + 1) - 2] for bits in range(1, MOST_BITS + 1))
        if not all((np.diff(table) > 0).all() for table in tables):
            raise CacheCorruptError(f"{where}: the levels of its transform do not ascend.")
        if not (self.gains[1:] > 0).all():
            raise CacheCorruptError(f"{where}: the gains of its transform are not positive.")
        for (layer, code), n_bytes in zip(sorted(self.layers.items()), token_bytes, strict=True):
            if code.bits.min() < 0 or code.bits.max() > MOST_BITS or (np.diff(code.bits) > 0).any():
                raise CacheCorruptError(f"{where}: bits of layer {layer} must descend and be 0 to {MOST_BITS}.")
            if code.n_bytes != n_bytes:
                raise CacheCorruptError(
                    f"{where}: bits of layer {layer} make tokens of {code.n_bytes} bytes; the manifest says {n_bytes}."
                )
            if not (code.scale > 0).all():
                raise CacheCorruptError(f"{where}: scales of layer {layer} must be positive.")


def unpack(stored: np.ndarray, code: LayerCode) -> np.ndarray:
    """The codes in uint8 [..., bytes of a token]: int64 [..., D], 0 for a component without bits."""
    bits = np.unpackbits(stored[..., 1:], axis=-1, bitorder="little").astype("int64")
    codes = np.zeros((*stored.shape[:-1], len(code.bits)), "int64")
    for place in range(MOST_BITS):
        has = code.bits > place
        codes[..., has] |= bits[..., code.starts[has] + place] << place
    return codes


def coefficients(stored: np.ndarray, code: LayerCode, transform: Transform) -> np.ndarray:
    """uint8 [..., bytes of a token] -> float32 [..., D]."""
    levels = transform.levels[np.maximum(2**code.bits - 2 + unpack(stored, code), 0)]
    return transform.gains[stored[..., :1]] * (code.scale * np.where(code.bits > 0, levels, np.float32(0)))


def decode(
    stored: Sequence[np.ndarray], layers: Sequence[int], transform: Transform, statistics: ChannelStatistics
) -> np.ndarray:
    """Whitened tokens of the last of `layers`, float32 [..., D].

    stored: uint8 [..., bytes of a token] of each of `layers`, which are those of StoreSpec.read_with.
    """
    parts = [coefficients(values, transform.layers[layer], transform) for values, layer in zip(stored, layers, strict=True)]
    code = transform.layers[layers[-1]]
    standard = np.concatenate(parts, -1) @ code.basis + code.mean
    return standard * statistics.spread + statistics.centre
