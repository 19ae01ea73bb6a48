"""What stores keep of a teacher's output, worked out in numpy, plainly: the tests hold the packages to it, bit for bit."""

from __future__ import annotations

import numpy as np

from teacher_cache.format.quantize import ChannelStatistics
from teacher_cache.format.race import arrivals, places_of
from teacher_cache.format.transform import LayerCode, Transform


def quantise(tokens: np.ndarray, statistics: ChannelStatistics, dtype: str, group: int) -> tuple[np.ndarray, np.ndarray]:
    """float [..., D] -> what is stored of it, and float16 scale [..., G].

    Stored is int8 [..., D], in which -128 never occurs, or for int4 uint8 [..., ceil(D / 2)], in which 0 never fills the bytes of
    a group: these are the stores' fill values.
    """
    standard = statistics.standardise(tokens)
    starts = np.arange(0, standard.shape[-1], group)
    highest, lowest = (reduce.reduceat(standard, starts, axis=-1) for reduce in (np.maximum, np.minimum))
    largest = np.maximum(np.abs(highest), np.abs(lowest))
    if dtype == "int8":
        scale = (largest / 127).astype("float16")
        return _levels(standard, scale, group, -127, 127).astype("int8"), scale
    scale = (np.where(highest >= -lowest, -largest, largest) / 8).astype("float16")
    levels = _levels(standard, scale, group, -8, 7)
    alone = np.maximum.reduceat(levels, starts, axis=-1) == -8  # nothing but -8: +7 of a larger scale says the same
    scale = np.where(alone, scale * np.float16(-8 / 7), scale)
    levels = np.where(_per_channel(alone, group, levels.shape[-1]), 7, levels)
    return pack(levels.astype("int8")), scale


def pack(levels: np.ndarray) -> np.ndarray:
    """int8 [..., D] in -8 .. 7 -> uint8 [..., ceil(D / 2)]."""
    nibbles = (levels + 8).astype("uint8")
    if nibbles.shape[-1] % 2:
        nibbles = np.concatenate([nibbles, np.full((*nibbles.shape[:-1], 1), 15, "uint8")], axis=-1)
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4


def _levels(standard: np.ndarray, scale: np.ndarray, group: int, least: int, most: int) -> np.ndarray:
    """float32 [..., D]: whole multiples of the scale of each value's group; 0 where that is 0."""
    step = _per_channel(scale.astype("float32"), group, standard.shape[-1])
    levels = np.divide(standard, step, out=np.zeros_like(standard), where=step != 0)
    return np.rint(levels).clip(least, most)


def _per_channel(of_groups: np.ndarray, group: int, dim: int) -> np.ndarray:
    """[..., G] -> [..., D]"""
    return np.repeat(of_groups, group, axis=-1)[..., :dim]


def klt_components(tokens: np.ndarray, code: LayerCode, statistics: ChannelStatistics, behind: np.ndarray) -> np.ndarray:
    """float [n, D] -> float64 [n, K]: a layer's own components, of variance about 1, before they are coded.

    behind: float [n, D * layers], the values that are read of the layers behind it.
    """
    dim = len(code.mean)
    rows = code.basis[-dim:][: code.n_kept].astype("float64") / statistics.spread
    left = (tokens - behind.astype("float64") @ code.basis[:-dim] - code.mean) / statistics.spread
    return left @ (rows / (rows**2).sum(1, keepdims=True)).T


def klt_encode(components: np.ndarray, code: LayerCode, transform: Transform) -> np.ndarray:
    """float [n, K] -> uint8 [n, bytes of a token], of tokens that the basis fits."""
    edges = transform.scales[1:127] * transform.scales[2:128]
    number = 1 + np.searchsorted(edges, (components**2).mean(1))
    stored = [number[:, None].astype("uint8")]
    bits, starts = np.zeros((len(components), int(code.bits.sum())), "uint8"), np.cumsum(code.bits) - code.bits
    for k, n_bits in enumerate(code.bits[: code.n_kept]):
        levels = transform.levels[2**n_bits - 2 : 2 ** (n_bits + 1) - 2]
        codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, components[:, k] / transform.scales[number])
        for place in range(n_bits):
            bits[:, starts[k] + place] = codes >> place & 1
    return np.concatenate([*stored, np.packbits(bits, axis=1, bitorder="little")], 1)


def race(attention: np.ndarray, rows: np.ndarray, view: int, n_first: int) -> np.ndarray:
    """The first patches of each row's race, in their order: int32 [B, n_first]. Patches without attention come last.

    attention: float32 [B, N]. rows: [B], their numbers.
    """
    speed = attention.astype("float64") / arrivals(attention.shape[1], rows, view)
    return np.argsort(-speed, axis=1, kind="stable")[:, :n_first].astype("int32")


def take_visible(tokens: np.ndarray, index: np.ndarray, n_cls: int) -> np.ndarray:
    """CLS, if there is one (`n_cls`), and the patches `index` [B, K] of tokens [B, L, C+N, D]: [B, L, C+K, D]."""
    return np.take_along_axis(tokens, places_of(index, n_cls)[:, None, :, None], axis=2)
