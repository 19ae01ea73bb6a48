"""Which crops a teacher finds alike: nearest neighbours of a few, and all of a sample on a plane."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

# n rows of the sample, D width

COMPONENTS = 50
"""Principal components that t-SNE is given, as its authors do."""
PERPLEXITY = 30


@dataclass(frozen=True)
class Neighbours:
    """The nearest of each row of a sample, by cosine, itself left out."""

    index: np.ndarray
    """int64 [n, k], numbers in the sample, nearest first."""
    cosine: np.ndarray
    """float64 [n, k]."""


def nearest(features: np.ndarray, k: int) -> Neighbours:
    """The k nearest of each of `features` [n, D] (fewer if there are not so many), by cosine after centring."""
    from sklearn.neighbors import NearestNeighbors

    centred = features.astype("float64") - features.mean(0, dtype="float64")
    k = min(k, len(features) - 1)
    distance, index = NearestNeighbors(n_neighbors=k + 1, metric="cosine").fit(centred).kneighbors(centred)
    # equal crops can stand before a row itself: it is left out by its number
    order = np.argsort(index == np.arange(len(index))[:, None], axis=1, kind="stable")[:, :k]
    return Neighbours(np.take_along_axis(index, order, 1), 1 - np.take_along_axis(distance, order, 1))


def agreement(neighbours: Neighbours, labels: np.ndarray) -> float:
    """Share of rows whose nearest neighbour has their label. labels: int64 [n]."""
    return float((labels[neighbours.index[:, 0]] == labels).mean())


def on_a_plane(features: np.ndarray, seed: int) -> np.ndarray:
    """Places of `features` [n, D] on a plane, each coordinate in 0..1: float64 [n, 2]. PCA, then t-SNE, both seeded."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    features = features.astype("float64")
    n_components = min(COMPONENTS, *features.shape)
    places = PCA(n_components, random_state=seed).fit_transform(features)
    if len(features) > 3:
        with warnings.catch_warnings():  # of a lack of OpenMP in some builds
            warnings.simplefilter("ignore")
            perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
            places = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(places)
    places = np.pad(places[:, :2], ((0, 0), (0, max(0, 2 - places.shape[1]))))
    low, high = places.min(0), places.max(0)
    return np.divide(places - low, high - low, out=np.full_like(places, 0.5, "float64"), where=high > low)
