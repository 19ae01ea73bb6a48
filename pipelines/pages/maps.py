"""Tokens as maps on the grid of patches: colours, similarities, attention over the crop."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from PIL import Image

# n crops, N patches, D width

HEAT = colormaps["inferno"]
NOTHING = (0xD5, 0xDB, 0xDF)
"""The colour of hidden patches, and of those that are not stored."""


def colours_of_tokens(tokens: np.ndarray) -> tuple[np.ndarray, float]:
    """The first three principal components of patch tokens as red, green and blue; and their share of the variance, 0..1.

    tokens: float [n, N, D], of one layer, NaN for those not stored. The components are those of all n crops together, so that
    equal colours mean like tokens in all of them. Each is stretched between its 2nd and 98th percentile. Returns uint8 [n, N, 3].
    """
    from sklearn.decomposition import PCA

    colours = np.full((*tokens.shape[:2], 3), NOTHING, "uint8")
    is_stored = np.isfinite(tokens[..., 0])  # [n, N]
    flat = tokens[is_stored].astype("float64")
    if (flat == flat[0]).all():  # no variance to explain
        colours[is_stored] = 128
        return colours, 0.0
    n_components = min(3, *flat.shape)
    pca = PCA(n_components, svd_solver="full" if len(flat) <= 4096 else "randomized", random_state=0)
    components = np.zeros((len(flat), 3))
    components[:, :n_components] = pca.fit_transform(flat)
    low, high = np.percentile(components, [2, 98], axis=0)
    stretched = np.divide(components - low, high - low, out=np.full_like(components, 0.5), where=high > low).clip(0, 1)
    colours[is_stored] = (255 * stretched).round()
    return colours, float(pca.explained_variance_ratio_.sum())


def similarities(tokens: np.ndarray, patch: int) -> np.ndarray:
    """Cosine of every patch token [N, D] with that of `patch`; float64 [N], -1..1, NaN for those not stored."""
    tokens = tokens.astype("float64")
    tokens /= np.maximum(np.linalg.norm(tokens, axis=1, keepdims=True), 1e-12)
    return tokens @ tokens[patch]


def over_crop(pixels: np.ndarray, values: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Values [N] in 0..1 as heat over the crop in grey: uint8 [size, size, 3]. A patch's heat is one flat square."""
    size = len(pixels)
    grey = np.asarray(Image.fromarray(pixels).convert("L"), "float64")[..., None] / 255  # [size, size, 1]
    value = _on_pixels(values.reshape(grid), size)[..., None]
    heat = HEAT(0.12 + 0.88 * value[..., 0])[..., :3]
    strength = 0.35 + 0.5 * value
    return (255 * ((1 - strength) * grey * 0.9 + strength * heat)).round().astype("uint8")


def hide(pixels: np.ndarray, hidden: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The crop with the hidden patches (bool [N]) in the colour of NOTHING: uint8 [size, size, 3]."""
    covered = _on_pixels(hidden.reshape(grid), len(pixels))
    return np.where(covered[..., None], np.array(NOTHING, "uint8"), pixels)


def _on_pixels(values: np.ndarray, size: int) -> np.ndarray:
    """[rows, columns] -> [size, size], each pixel with the value of the patch it lies in."""
    rows, columns = (np.arange(size) * n // size for n in values.shape)
    return values[rows][:, columns]
