"""Whitened tokens <-> codes of a transform (`--dtype klt:BITS`): the format as values.

Layers are coded in groups, each from its last layer to its first. A token of a layer is

    z = values @ basis + mean            values [n * D]: those of the n layers of its group from the last one down to it

The values of the layers behind it predict it; its own are what is left, in the basis of its own covariance. Each is one of
2 ** bits levels, times the scale of the token in its layer:

    value = levels[2 ** bits - 2 + code] * scales[first byte]

A token of a layer is a run of whole bytes, equally many in every layer: the number of its scale, then the codes of its components
back to back, lowest bit first. No token has the number 0: it is the fill value, and a hole shows in every token.

From number ESCAPED on a token is coded by itself, because the basis does not fit it: not predicted, and all components that have
bits have equally many, of equal steps.

Storing is worked out where the teacher runs (encoding/klt_encode.py), reading in training where the student does. Here is what
needs no torch: the values, their checks, reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import CacheCorruptError, UsageError
from .dtypes import klt_bits

MOST_WIDE = 5120
"""Channels of the layers that are coded together."""
MOST_BITS = 10
"""Of a component."""
N_LEVELS = 2 ** (MOST_BITS + 1) - 2
"""Of 1 to MOST_BITS bits, one table behind the other."""
N_SCALES, ESCAPED = 256, 128
DISTORTION = (1.0, 0.36338, 0.117482, 0.0345478, 0.00950101, 0.00250467, 0.000644239, 0.000163478, 4.1185e-5, 1.0337e-5, 2.59e-6)
"""Mean squared error of a normal variable of variance 1 with the best levels of 0 to MOST_BITS bits (Max 1960)."""

# D width, n layers of a group from the last one down


def layers_together(dim: int) -> int:
    """Layers that are coded together, at most. UsageError for a teacher that is too wide."""
    if dim > MOST_WIDE:
        raise UsageError(f"dtype klt: a teacher of width {dim}; a transform takes up to {MOST_WIDE}. Give int8 or int4.")
    return MOST_WIDE // dim


def token_bytes(dtype: str, dim: int) -> int:
    """Bytes of a token of a layer: of the scale and of all codes. UsageError for a dtype that leaves none for codes."""
    n_bytes = round(100 * (klt_bits(dtype) or 0)) * dim // 800
    if n_bytes < 2:
        raise UsageError(f"dtype {dtype}: no byte is left for the codes of a token of width {dim}. Give more bits, or int8.")
    return n_bytes


def least_tokens(n_layers: int, dim: int) -> int:
    """Tokens that a fit takes at least: 20 a channel of the widest group."""
    return 20 * dim * min(n_layers, layers_together(dim))


@dataclass(frozen=True)
class LayerCode:
    """How one layer is coded."""

    mean: np.ndarray
    """float32 [D]"""
    basis: np.ndarray
    """float32 [n * D, D]: a row a value, of the layers behind it, the last first, then of its own; zeros for one without bits."""
    bits: np.ndarray
    """int64 [D], of each of its components, descending; 0: it has no code, and its value is 0."""
    unit: np.ndarray
    """float32 [D], not stored: one over the deviation of each component in tokens standardised by channel; 0 without bits."""

    @classmethod
    def of(cls, mean: np.ndarray, basis: np.ndarray, bits: np.ndarray, spread: np.ndarray) -> LayerCode:
        """From what is stored. spread: of the layer's channel statistics."""
        deviation = np.sqrt(((basis[-len(mean) :].astype("float64") / spread) ** 2).sum(1))
        unit = np.divide(1, deviation, out=np.zeros_like(deviation), where=(bits > 0) & (deviation > 0))
        return cls(mean, basis, bits.astype("int64"), unit.astype("float32"))

    @property
    def n_kept(self) -> int:
        """Components that have bits: the first ones."""
        return int((self.bits > 0).sum())

    @property
    def flat_bits(self) -> np.ndarray:
        """int64 [D], of each component of a token that is coded by itself."""
        return np.where(self.bits > 0, min(MOST_BITS, self.bits.sum() // max(1, self.n_kept)), 0)


@dataclass(frozen=True)
class Transform:
    """How the tokens of a store are coded."""

    layers: dict[int, LayerCode]
    """By block number."""
    levels: np.ndarray
    """float32 [N_LEVELS]: of b bits those from 2 ** b - 2 on, ascending."""
    scales: np.ndarray
    """float32 [N_SCALES], by number, ascending below ESCAPED and from there on; those of 0 and ESCAPED count for nothing."""

    def levels_of(self, bits: int) -> np.ndarray:
        """float32 [2 ** bits]"""
        return self.levels[2**bits - 2 : 2 ** (bits + 1) - 2]

    def require_sound(self, n_bytes: int, where) -> None:
        """Raise CacheCorruptError, naming the store `where`, unless tokens of so many bytes a layer can be coded so."""
        if not all((np.diff(self.levels_of(bits)) > 0).all() for bits in range(1, MOST_BITS + 1)):
            raise CacheCorruptError(f"{where}: the levels of its transform do not ascend.")
        if not all(part[0] > 0 and (np.diff(part) > 0).all() for part in (self.scales[1:ESCAPED], self.scales[ESCAPED + 1 :])):
            raise CacheCorruptError(f"{where}: the scales of its transform are not positive and ascending.")
        for layer, code in self.layers.items():
            if code.bits.min() < 0 or code.bits.max() > MOST_BITS or (np.diff(code.bits) > 0).any():
                raise CacheCorruptError(f"{where}: bits of layer {layer} must be 0 to {MOST_BITS} and descend.")
            if code.bits.sum() != 8 * (n_bytes - 1):
                raise CacheCorruptError(f"{where}: layer {layer} has codes of {code.bits.sum()} bits in {n_bytes - 1} bytes.")
            if not code.basis[-len(code.mean) :][: code.n_kept].any(1).all():
                raise CacheCorruptError(f"{where}: the basis of layer {layer} has a row of zeros for a component with bits.")


def starts_of(bits: np.ndarray) -> np.ndarray:
    """int64 [D]: the bit of a token's codes where each component's begins."""
    return np.cumsum(bits) - bits


def unpack(stored: np.ndarray, n_bits: np.ndarray) -> np.ndarray:
    """The codes of `n_bits` [D] in uint8 [..., bytes of a token]: int64 [..., D], 0 for a component without bits."""
    bits, starts = np.unpackbits(stored[..., 1:], axis=-1, bitorder="little"), starts_of(n_bits)
    codes = np.zeros((*stored.shape[:-1], len(n_bits)), "int64")
    for place in range(MOST_BITS):
        has = n_bits > place
        codes[..., has] |= bits[..., starts[has] + place].astype("int64") << place
    return codes


def values(stored: np.ndarray, code: LayerCode, transform: Transform) -> np.ndarray:
    """uint8 [..., bytes of a token] -> float32 [..., D]."""
    levels = np.append(transform.levels, np.float32(0))  # the last for components without bits

    def levels_of(bits: np.ndarray) -> np.ndarray:
        return levels[np.where(bits > 0, 2**bits - 2 + unpack(stored, bits), len(transform.levels))]

    escaped = stored[..., :1] >= ESCAPED
    read = levels_of(code.bits)
    if escaped.any():
        read = np.where(escaped, levels_of(code.flat_bits) * code.unit, read)
    return read * transform.scales[stored[..., :1]]


def decode(stored: Sequence[np.ndarray], layers: Sequence[int], transform: Transform) -> np.ndarray:
    """Whitened tokens of the last of `layers`, float32 [..., D].

    stored: uint8 [..., bytes of a token] of each of `layers`, which are those of StoreSpec.read_with.
    """
    parts = [values(codes, transform.layers[layer], transform) for codes, layer in zip(stored, layers, strict=True)]
    code, is_predicted = transform.layers[layers[-1]], stored[-1][..., :1] < ESCAPED
    parts[:-1] = [behind * is_predicted for behind in parts[:-1]]
    return np.concatenate(parts, -1) @ code.basis + code.mean
