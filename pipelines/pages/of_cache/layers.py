"""Figures of single layers, and of attention, added up over a sample of crops. Memory does not grow with the sample.

Whitened tokens all have the norm sqrt(D), so norms are those of standardised ones (centre and spread of each channel over the
sample): there a token that differs from all others stands out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# b crops of a block, N patches, D width, G groups of channels

PATCHES_A_CROP = 16
"""Patches of each crop that covariances are made of: 32,000 tokens of 2,000 crops."""
KEPT = 8192
"""Of these, so many are kept for norms, which can only be taken when the spread of the channels is known."""
OUTLIER = 6.0
"""A channel is one whose root mean square is so many times the median channel's (Dettmers et al. 2022 use 6 as well)."""
LARGE = 2.0
"""A token is large whose norm is so many times the median token's (Darcet et al. 2024 found such in trained ViTs)."""


@dataclass(frozen=True)
class LayerFigures:
    """What a sample says of one layer's patch tokens."""

    layer: int
    norm_median: float
    """Of standardised tokens, over sqrt(D)."""
    norm_p99: float
    norm_worst: float
    n_large: float
    """Share of tokens with LARGE times the median norm."""
    channels: tuple[tuple[int, float], ...]
    """(channel, its rms over the median channel's), the three largest."""
    n_outliers: int
    """Channels beyond OUTLIER."""
    effective_rank: float
    """exp of the entropy of the eigenvalues of the covariance (Roy & Vetterli 2007): 1 to D."""
    likeness: float
    """Mean cosine of two different patches of one crop: 1 would mean that all patches say the same."""


class LayerStatistics:
    """Adds up one layer; `add` blocks, then ask for `figures`."""

    def __init__(self, dim: int, seed: int):
        self._draws = np.random.default_rng(seed)
        self._n = self._n_crops = 0
        self._sum, self._products = np.zeros(dim), np.zeros((dim, dim))
        self._likeness = 0.0
        self._some: list[np.ndarray] = []

    def add(self, tokens: np.ndarray) -> None:
        """tokens: float32 [b, N, D], patches alone; of a store of visible tokens N is K."""
        n_crops, n_patches, _ = tokens.shape
        unit = tokens / np.maximum(np.linalg.norm(tokens, axis=2, keepdims=True), 1e-12)
        together = (unit.sum(1, dtype="float64") ** 2).sum(1)  # [b], of all pairs of patches
        self._likeness += float(((together - n_patches) / max(1, n_patches * (n_patches - 1))).sum())
        self._n_crops += n_crops

        chosen = self._draws.permuted(np.tile(np.arange(n_patches), (n_crops, 1)), axis=1)[:, :PATCHES_A_CROP]  # [b, 16]
        some = np.take_along_axis(tokens, chosen[..., None], axis=1).reshape(-1, tokens.shape[2])
        self._sum += some.sum(0, dtype="float64")
        exact = some.astype("float64")
        self._products += exact.T @ exact
        self._n += len(some)
        n_kept = sum(map(len, self._some))
        self._some.append(some[: KEPT - n_kept])  # the first, because rows of a cache are in random order

    def figures(self, layer: int) -> LayerFigures:
        mean, second = self._sum / self._n, self._products / self._n
        rms = np.sqrt(np.maximum(np.diag(second), 0))
        relative = rms / max(float(np.median(rms)), 1e-12)
        largest = np.argsort(relative)[::-1][:3]
        spread = np.sqrt(np.maximum(np.diag(second) - mean**2, 0))
        spread = np.maximum(spread, max(0.1 * float(np.median(spread)), 1e-6))  # as the quantiser: some channels are constant
        norms = np.concatenate([np.sqrt(np.mean(((some - mean) / spread) ** 2, axis=1)) for some in self._some])
        median = float(np.median(norms))
        return LayerFigures(
            layer=layer,
            norm_median=median,
            norm_p99=float(np.percentile(norms, 99)),
            norm_worst=float(norms.max()),
            n_large=float((norms > LARGE * median).mean()),
            channels=tuple((int(channel), float(relative[channel])) for channel in largest),
            n_outliers=int((relative > OUTLIER).sum()),
            effective_rank=effective_rank(second - np.outer(mean, mean)),
            likeness=self._likeness / self._n_crops,
        )


def effective_rank(covariance: np.ndarray) -> float:
    """exp of the entropy of the eigenvalues, taken as shares: D for equal ones, 1 if one direction holds everything."""
    values = np.maximum(np.linalg.eigvalsh(covariance), 0)
    if values.sum() <= 0:
        return 0.0
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


@dataclass(frozen=True)
class AttentionFigures:
    """How a teacher's attention is spread over the patches."""

    entropies: np.ndarray
    """float64 [n], of each crop, over log N: 0 one patch has all, 1 all have the same."""
    to_patches: float
    """Mean sum over the patches; the rest goes to CLS and registers."""
    top_tenth: float
    """Mean share of it that the most attended tenth of the patches has."""
    mean_map: np.ndarray
    """float64 [N], mean over crops of each patch's share."""


class AttentionStatistics:
    """Adds up attention; `add` blocks, then ask for `figures`."""

    def __init__(self, n_patches: int):
        self._n_patches, self._n_top = n_patches, max(1, round(n_patches / 10))
        self._entropies: list[np.ndarray] = []
        self._sum, self._map, self._top, self._n = 0.0, np.zeros(n_patches), 0.0, 0

    def add(self, attention: np.ndarray) -> None:
        """attention: float32 [b, N]."""
        total = attention.sum(1, dtype="float64")
        shares = attention / np.maximum(total, 1e-12)[:, None]
        logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
        self._entropies.append(-(shares * logs).sum(1) / max(np.log(self._n_patches), 1e-12))
        self._top += float(np.sort(shares, axis=1)[:, -self._n_top :].sum())
        self._sum, self._map, self._n = self._sum + float(total.sum()), self._map + shares.sum(0), self._n + len(attention)

    def figures(self) -> AttentionFigures:
        return AttentionFigures(np.concatenate(self._entropies), self._sum / self._n, self._top / self._n, self._map / self._n)


def expected_errors(standard: np.ndarray, scale: np.ndarray, group: int) -> np.ndarray:
    """The error that rounding leads one to expect of each token, relative as in spec.LayerFidelity; float64 [b, T].

    A value that is rounded to steps of `scale` is off by scale / sqrt(12) on average. standard: standardised tokens as they are
    stored, [b, T, D]; scale [b, T, G]. The tokens before storing are not known, so this is an estimate; it is too large where a
    large channel drowns the others of its group altogether (int4).
    """
    sizes = np.diff(np.append(np.arange(0, standard.shape[-1], group), standard.shape[-1]))  # [G], channels a scale
    rounding = np.sqrt((scale.astype("float64") ** 2 * sizes).sum(-1) / 12)
    size = np.linalg.norm(standard, axis=-1)
    return np.divide(rounding, size, out=np.zeros_like(rounding), where=size > 0)
