"""Fitting a transform (format/transform.py) to a sample of tokens: float64 sums in the order of the sample, then algebra.

The sums are those of all layers of a group together. Each layer in turn, the last one first, gets the basis of the covariance of
what the layers behind it do not predict, and takes what it tells of the others out of theirs: by as much of it as its codes keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from torch import special

from ..format.quantize import ChannelStatistics, token_errors
from ..format.spec import ARRAY_NAME, LayerFidelity, StoreSpec
from ..format.transform import DISTORTION, ESCAPED, MOST_BITS, N_SCALES, LayerCode, Transform, decode, token_bytes
from .fit import Fitted, Sample, figures
from .klt_encode import TransformEncoder

BLOCK_VALUES = 1 << 24
"""Numbers of several layers that are worked on at a time."""
SCALES_AN_OCTAVE = 8
ROUNDS, LEAST_STEP = 8, 1e-7
"""Of Newton's method for the levels, which ends before that where none moves by more."""
LEAST_VARIANCE = 1e-12
"""Of a component, next to the largest."""

# n layers of a group, the last one first; D width; W = n * D


def fit_klt(sample: Sample, spec: StoreSpec) -> Fitted:
    """The transform of a store, fitted on the first rows of the sample, and its error on those behind them."""
    statistics = {
        layer: ChannelStatistics.fit(sample.tokens(place, slice(sample.n_fitted))) for place, layer in enumerate(spec.layers)
    }
    transform = fit_transform(sample, spec, statistics)
    encode = TransformEncoder(spec, transform, statistics, torch.device("cpu"))
    errors: dict[int, list[np.ndarray]] = {layer: [] for layer in spec.layers}
    n_rows = max(1, BLOCK_VALUES // (sample.n_drawn * sample.shape[1] * sample.n_layers))
    for start in range(sample.n_fitted, sample.shape[0], n_rows * sample.n_drawn):
        of = slice(start, min(start + n_rows * sample.n_drawn, sample.shape[0]))
        true = np.stack([sample.tokens(place, of) for place in range(sample.n_layers)])  # [L, n, D]
        for layer, tokens, read in zip(spec.layers, true, round_trip(true, encode, transform), strict=True):
            errors[layer].append(token_errors(tokens, read, statistics[layer]).reshape(-1, sample.n_drawn))
    fidelity = tuple(_fidelity(layer, np.concatenate(errors[layer]), sample.has_cls) for layer in spec.layers)
    return Fitted(statistics, fidelity, transform)


def round_trip(tokens: np.ndarray, encode: TransformEncoder, transform: Transform) -> np.ndarray:
    """Tokens of the layers of a store, float32 [L, n, D], coded and read back, [L, n, D]."""
    stored = {array: codes[0].numpy() for array, codes in encode(torch.from_numpy(tokens)[None]).items()}
    needed = [encode.spec.read_with(layer) for layer in encode.spec.layers]
    return np.stack([decode([stored[ARRAY_NAME.format(layer)] for layer in layers], layers, transform) for layers in needed])


def _fidelity(layer: int, errors: np.ndarray, has_cls: bool) -> LayerFidelity:
    """Of errors [rows, tokens], the first of a row being that of CLS if there is one."""
    patches = errors[:, int(has_cls) :]
    return LayerFidelity(layer, *figures(patches), patches.size, figures(errors[:, 0]) if has_cls else None)


def fit_transform(sample: Sample, spec: StoreSpec, statistics: dict[int, ChannelStatistics]) -> Transform:
    """The transform for the tokens that a sample is fitted on. Every layer has equally many bits."""
    n_bits = 8 * (token_bytes(spec.dtype, sample.shape[1]) - 1)
    codes: dict[int, LayerCode] = {}
    for group in spec.groups:
        mean, covariance = _moments(sample, spec, group, statistics)
        codes |= zip(group, _codes(mean, covariance, [statistics[layer] for layer in group], n_bits), strict=True)
    scales = 2.0 ** ((np.arange(N_SCALES) % ESCAPED - ESCAPED // 2) / SCALES_AN_OCTAVE)
    scales[[0, ESCAPED]] = 0
    return Transform(codes, lloyd_max().astype("float32"), scales.astype("float32"))


@cache
def lloyd_max() -> np.ndarray:
    """The best levels for a normal variable of variance 1 (Max 1960): float64 [N_LEVELS], as Transform has them."""
    return np.concatenate([_levels(2**bits) for bits in range(1, MOST_BITS + 1)])


def _levels(n: int) -> np.ndarray:
    """Each of n levels the mean of what is nearest to it: float64 [n]. Newton's method, from those best for very many."""
    table = np.sqrt(3) * special.ndtri(torch.arange(0.5, n, dtype=torch.float64) / n).numpy()
    for _ in range(ROUNDS):
        edges = np.concatenate([[-np.inf], (table[1:] + table[:-1]) / 2, [np.inf]])
        share = np.diff(special.ndtr(torch.from_numpy(edges)).numpy())
        density = np.exp(-(edges**2) / 2) / np.sqrt(2 * np.pi)
        mean = -np.diff(density) / share
        above = density[1:-1] * (edges[1:-1] - mean[:-1]) / share[:-1] / 2  # how the mean of all but the last moves with an edge
        below = density[1:-1] * (mean[1:] - edges[1:-1]) / share[1:] / 2
        own = 1 - np.append(above, 0) - np.append(0, below)
        step = np.linalg.solve(np.diag(own) - np.diag(above, 1) - np.diag(below, -1), mean - table)
        if np.abs(step).max() < LEAST_STEP:
            break
        table = table + step
        table = (table - table[::-1]) / 2
    return table


def _moments(sample: Sample, spec: StoreSpec, group: tuple[int, ...], statistics) -> tuple[np.ndarray, np.ndarray]:
    """Mean [W] and covariance [W, W] of the standardised tokens of a group, each weighted by one over its mean square, so that
    all tokens count alike whatever their size."""
    width = len(group) * len(statistics[group[0]].centre)
    weights, total, second = 0.0, np.zeros(width), np.zeros((width, width))
    step = max(1, BLOCK_VALUES // width)
    for start in range(0, sample.n_fitted, step):
        rows = slice(start, min(start + step, sample.n_fitted))
        of_layers = [statistics[layer].standardise(sample.tokens(spec.layers.index(layer), rows)) for layer in group]
        standard = np.concatenate(of_layers, 1).astype("float64")
        weight = 1 / np.maximum((standard**2).mean(1), 1e-12)
        weights += weight.sum()
        total += weight @ standard
        standard *= np.sqrt(weight)[:, None]
        second += standard.T @ standard
    mean = total / weights
    return mean, second / weights - np.outer(mean, mean)


def _codes(mean: np.ndarray, covariance: np.ndarray, statistics: list[ChannelStatistics], n_bits: int
           ) -> Iterator[LayerCode]:  # fmt: skip
    """The codes of a group, the last layer first. statistics: of its layers in this order."""
    left, dim, told_before, distortion = covariance.copy(), len(mean) // len(statistics), [], np.array(DISTORTION)
    for place, of_layer in enumerate(statistics):
        own = slice(place * dim, (place + 1) * dim)
        variances, basis = np.linalg.eigh(left[own, own])
        variances, basis = variances[::-1], basis[:, ::-1]
        basis = basis * np.sign(basis[np.abs(basis).argmax(0), np.arange(dim)])
        variances = np.maximum(variances, LEAST_VARIANCE * max(variances[0], LEAST_VARIANCE))
        bits = _bits(variances, distortion, n_bits)
        has_bits, deviations = bits > 0, np.sqrt(variances)

        # what a component tells of all layers, and what its codes take out of what is left of them
        told = left[:, own] @ basis / deviations * has_bits  # [W, D]
        left -= (told * (1 - distortion[bits])) @ told.T

        rows = np.concatenate([*(told[own].T for told in told_before), (basis * deviations * has_bits).T]) * of_layer.spread
        told_before.append(told)
        offset = mean[own] * of_layer.spread + of_layer.centre
        yield LayerCode.of(offset.astype("float32"), rows.astype("float32"), bits, of_layer.spread)


def _bits(variances: np.ndarray, distortion: np.ndarray, n_bits: int) -> np.ndarray:
    """Bits of each component, int64 [D], descending as the variances are: one more wherever it takes away most of the error."""
    gains = variances * -np.diff(distortion)[:, None]  # [MOST_BITS, D], descending along both
    order = np.argsort(-gains.ravel(), kind="stable")[:n_bits]
    return np.bincount(order % len(variances), minlength=len(variances))
