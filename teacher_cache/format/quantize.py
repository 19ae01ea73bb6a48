"""Whitened tokens <-> stored numbers.

    value = (q * scale) * spread + centre

with centre and spread fixed per layer and channel, and one float16 scale for each token and group of neighbouring channels, so
that a token with one massive channel damages only its own group.

int8: groups of at most 128, q in -127 .. 127, scale >= 0. The error of a value is at most scale * spread / 2 plus the float16
rounding of scale (2**-11 relative).

int4: groups of at most 16, q in -8 .. 7. The value of largest magnitude becomes -8, so that all 16 levels are used, and scale has
the opposite sign of that value. Two to a byte as q + 8, the even channel in the low half; behind an odd last channel the high
half is 15.

Storing is worked out where the teacher runs (encoding/encode.py). Here is what needs no torch: fitting, reading, measuring.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GROUPS = {"int8": 128, "int4": 16}
"""Channels a scale, at most, of each quantised dtype."""
BLOCK_CHANNELS = 64
"""Channels whose statistics are worked out at a time: medians take a few copies of them."""
SPREAD_FLOOR = 0.1
"""Of the median spread: dead and sparse channels have MAD 0, and without a floor every value of theirs is NaN."""
LEAST_SPREAD = 1e-3
"""Absolute floor, for features that are constant altogether. Whitened values are at most sqrt(D), so scales stay finite."""


@dataclass(frozen=True)
class ChannelStatistics:
    """Robust location and spread of each channel of one layer. float32 [D] each."""

    centre: np.ndarray
    spread: np.ndarray

    @classmethod
    def fit(cls, tokens: np.ndarray) -> ChannelStatistics:
        """tokens: float [n, D]. centre = median, spread = max(1.4826 MAD, a tenth of the median spread)."""
        blocks = [slice(start, start + BLOCK_CHANNELS) for start in range(0, tokens.shape[1], BLOCK_CHANNELS)]
        centre, spread = (np.concatenate(values) for values in zip(*(_robust(tokens[:, block]) for block in blocks), strict=True))
        floor = max(SPREAD_FLOOR * float(np.median(spread)), LEAST_SPREAD)
        return cls(centre.astype("float32"), np.maximum(spread, floor).astype("float32"))

    def standardise(self, tokens: np.ndarray) -> np.ndarray:
        return (tokens.astype("float32") - self.centre) / self.spread


def _robust(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median and 1.4826 MAD of each channel of float [n, d]."""
    centre = np.median(tokens, axis=0)
    return centre, 1.4826 * np.median(np.abs(tokens - centre), axis=0)


def dequantise(stored: np.ndarray, scale: np.ndarray, statistics: ChannelStatistics, dtype: str, group: int) -> np.ndarray:
    """What is stored, int8 [..., D] or uint8 [..., ceil(D / 2)], and float16 scale [..., G] -> float32 [..., D]."""
    dim = len(statistics.centre)
    levels = stored if dtype == "int8" else unpack(stored, dim)
    step = _per_channel(scale.astype("float32"), group, dim)
    return (levels.astype("float32") * step) * statistics.spread + statistics.centre


def unpack(packed: np.ndarray, dim: int) -> np.ndarray:
    """uint8 [..., ceil(D / 2)] -> int8 [..., D] in -8 .. 7."""
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    return nibbles[..., :dim].astype("int8") - 8


def _per_channel(of_groups: np.ndarray, group: int, dim: int) -> np.ndarray:
    """[..., G] -> [..., D]"""
    return np.repeat(of_groups, group, axis=-1)[..., :dim]


def token_errors(true: np.ndarray, stored: np.ndarray, statistics: ChannelStatistics) -> np.ndarray:
    """Standardised relative L2 error of each token: float [n, D] twice -> float64 [n]."""
    difference = np.linalg.norm((stored.astype("float64") - true) / statistics.spread, axis=-1)
    size = np.linalg.norm(statistics.standardise(true).astype("float64"), axis=-1)
    return np.divide(difference, size, out=np.zeros_like(size), where=difference > 0)
