"""A bounded sample of a store, read once: everything else looks at what is gathered here.

Rows of a cache are in one random order, so blocks of consecutive rows are as fair a sample as single ones, and a disk reads
them many times faster.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from teacher_cache.store.reader import StoreReader
from teacher_cache.terminal.progress import progress

from .layers import AttentionFigures, AttentionStatistics, LayerFigures, LayerStatistics, expected_errors

BLOCK = 25
"""Consecutive rows; of a ViT-B/16 layer 15 MB as float32."""

# n rows of the sample, L layers, N patches, D width


@dataclass(frozen=True)
class Gathered:
    """What one pass over a sample found."""

    rows: np.ndarray
    """int64 [n], ascending."""
    features: np.ndarray
    """float32 [n, D]: CLS of the last stored layer, or the mean of its patches."""
    are_cls: bool
    layers: tuple[LayerFigures, ...]
    attention: AttentionFigures | None
    expected_errors: np.ndarray | None
    """float64 [L, n]: see layers.expected_errors; None where nothing was quantised."""


def draw_blocks(store: StoreReader, n_rows: int, seed: int) -> np.ndarray:
    """At most `n_rows` finished rows of a store, ascending, int64 [n]: blocks of BLOCK drawn at random."""
    present = np.flatnonzero(np.repeat(store.finished, store.spec.shard_rows)[: len(store)])
    if len(present) <= n_rows:
        return present
    block = min(BLOCK, n_rows)
    starts = np.random.default_rng(seed).permutation(len(present) // block)[: n_rows // block] * block
    return present[(np.sort(starts)[:, None] + np.arange(block)).ravel()]


def gather(store: StoreReader, rows: np.ndarray) -> Gathered:
    """Read `rows` of every array of a store, a block at a time, and keep what is asked of them."""
    has_cls, layers = store.teacher.has_cls, store.spec.layers
    statistics = {layer: LayerStatistics(store.teacher.dim, seed=layer) for layer in layers}
    attention = AttentionStatistics(store.teacher.n_patches) if store.spec.attention else None
    errors = np.zeros((len(layers), len(rows)))
    features = np.zeros((len(rows), store.teacher.dim), "float32")
    with progress("reading a sample", len(rows), "crops") as advance:
        for start in range(0, len(rows), BLOCK):
            block = slice(start, min(start + BLOCK, len(rows)))
            scale = store.read("scale", rows[block]) if store.spec.has_scales else None
            for i, layer in enumerate(layers):
                tokens = store.tokens(rows[block], layer)  # [b, T, D]
                statistics[layer].add(tokens[:, int(has_cls) :])
                if store.spec.has_scales:
                    standard = store.statistics[layer].standardise(tokens)
                    errors[i, block] = expected_errors(standard, scale[:, i], store.spec.group).max(1)
                if layer == layers[-1]:
                    features[block] = tokens[:, 0] if has_cls else tokens.mean(1)
            if attention is not None:
                attention.add(store.read("attention", rows[block]))
            advance(block.stop - block.start)
    return Gathered(
        rows=rows,
        features=features,
        are_cls=has_cls,
        layers=tuple(statistics[layer].figures(layer) for layer in layers),
        attention=attention.figures() if attention else None,
        expected_errors=errors if store.spec.has_scales else None,
    )
