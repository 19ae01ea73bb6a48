"""The kNN probe of a run under way: labelled images that were read once, before training, and stay in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..modules.pixels import PIXEL_MEAN, PIXEL_STD, normalise
from .frozen.knn import KNN, KNNEvaluator

MOST_BYTES = 4 << 30
"""Of the pixels of a probe's images; more is not a small set."""
BATCH = 256
"""Images that are encoded at once."""


@dataclass(frozen=True)
class Kept:
    """Iterates (images float32 [B, 3, H, W], labels int64 [B]) of pixels in memory; can be iterated again."""

    pixels: np.ndarray
    """uint8 [n, H, W, 3]"""
    labels: np.ndarray
    """int64 [n]"""
    mean: tuple[float, ...] = PIXEL_MEAN
    std: tuple[float, ...] = PIXEL_STD

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.labels), BATCH):
            part = slice(start, start + BATCH)
            images = normalise(torch.from_numpy(self.pixels[part]), self.mean, self.std)
            yield images, torch.from_numpy(self.labels[part])


@dataclass(frozen=True)
class KNNProbe:
    """DINO's kNN accuracy of `val` by the votes of `train`, of every readout that the encoder has."""

    train: Kept
    val: Kept
    about: dict
    """What is told of the images: `train` and `val`, as in records (records.py)."""
    knn: KNN = KNN()
    device: str | torch.device = "cpu"

    def __call__(self, encoder: nn.Module) -> dict:
        """{name, protocol, main, values {"cls/20": share of 1}, ...}; the encoder, on `device`, is in eval mode for the while."""
        asked = KNNEvaluator(self.train, self.val, self.knn.n_neighbours, self.knn.temperature, self.device)
        values = {name.removeprefix("knn/"): value for name, value in asked.run(encoder)}
        readout = next(iter(values)).split("/")[0]
        main = f"{readout}/{min(int(self.knn.main), len(self.train.labels))}"  # neighbours, as KNN.score counts them
        return {"name": self.knn.name, "protocol": self.knn.protocol, "main": main, "values": values, **self.about}
