"""Whitened tokens <-> stored numbers.

int8: value = (q * scale) * spread + centre, with centre and spread fixed per layer and channel, and one float16 scale for each
token and group of at most 128 channels. With q in -127 .. 127 the error of a value is at most scale * spread / 2 plus the
float16 rounding of scale (2**-11 relative), so a token with one massive channel damages only its own group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GROUP = 128
"""Channels a scale."""
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
        centre = np.median(tokens, axis=0)
        spread = 1.4826 * np.median(np.abs(tokens - centre), axis=0)
        floor = max(SPREAD_FLOOR * float(np.median(spread)), LEAST_SPREAD)
        return cls(centre.astype("float32"), np.maximum(spread, floor).astype("float32"))

    def standardise(self, tokens: np.ndarray) -> np.ndarray:
        return (tokens.astype("float32") - self.centre) / self.spread


def quantise(tokens: np.ndarray, statistics: ChannelStatistics, group: int = GROUP) -> tuple[np.ndarray, np.ndarray]:
    """float [..., D] -> (int8 [..., D], float16 scale [..., G]). -128 is never produced: it is the stores' fill value."""
    standard = statistics.standardise(tokens)
    dim = standard.shape[-1]
    starts = np.arange(0, dim, group)
    scale = (np.maximum.reduceat(np.abs(standard), starts, axis=-1) / 127).astype("float16")
    step = np.repeat(scale.astype("float32"), group, axis=-1)[..., :dim]
    levels = np.divide(standard, step, out=np.zeros_like(standard), where=step > 0)
    return np.rint(levels).clip(-127, 127).astype("int8"), scale


def dequantise(q: np.ndarray, scale: np.ndarray, statistics: ChannelStatistics, group: int = GROUP) -> np.ndarray:
    """The inverse: int8 [..., D] and float16 [..., G] -> float32 [..., D]."""
    step = np.repeat(scale.astype("float32"), group, axis=-1)[..., : q.shape[-1]]
    return (q.astype("float32") * step) * statistics.spread + statistics.centre


def token_errors(true: np.ndarray, stored: np.ndarray, statistics: ChannelStatistics) -> np.ndarray:
    """Standardised relative L2 error of each token: float [n, D] twice -> float64 [n]."""
    difference = np.linalg.norm((stored.astype("float64") - true) / statistics.spread, axis=-1)
    size = np.linalg.norm(statistics.standardise(true).astype("float64"), axis=-1)
    return np.divide(difference, size, out=np.zeros_like(size), where=difference > 0)
