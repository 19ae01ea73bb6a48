"""DINO's weighted nearest-neighbour classifier (DINO eval_knn.py): no training, no hyper-parameter to tune."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..features import extract_features
from ..watch import Watch, unwatched
from .protocol import Labelled

# n features, D width


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    n_neighbours: int,
    temperature: float = 0.07,
    chunk_size: int = 1024,
) -> float:
    """Share of test features, 0..1, whose class gets the most votes of its nearest training features.

    Features float [n, D] are compared by cosine; each of the `n_neighbours` nearest (at most the training set) votes
    for its class with weight exp(cosine / temperature).
    """
    train_features = F.normalize(train_features.float(), dim=1)
    test_features = F.normalize(test_features.float(), dim=1)
    n_neighbours = min(n_neighbours, len(train_features))
    n_classes = int(max(train_labels.max(), test_labels.max())) + 1

    n_right = 0
    for features, labels in zip(test_features.split(chunk_size), test_labels.split(chunk_size), strict=True):
        cosine, nearest = (features @ train_features.T).topk(n_neighbours, dim=1)  # [chunk, n_neighbours]
        votes = torch.zeros(len(features), n_classes, device=features.device)
        votes.scatter_add_(1, train_labels[nearest], (cosine / temperature).exp())
        n_right += int((votes.argmax(dim=1) == labels).sum())
    return n_right / len(test_labels)


@dataclass(frozen=True)
class KNN:
    """Top-1 accuracy for several numbers of neighbours; larger ones than the training set count as its size."""

    n_neighbours: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07
    name: ClassVar[str] = "knn"
    draws: ClassVar[bool] = False
    numbers: ClassVar[tuple[str, ...]] = ()

    @property
    def protocol(self) -> str:
        return (
            f"knn (DINO): {', '.join(map(str, self.n_neighbours))} neighbours by cosine, votes exp(cosine / {self.temperature:g})"
        )

    @property
    def main(self) -> str:
        return str(20 if 20 in self.n_neighbours else self.n_neighbours[0])

    def score(self, train: Labelled, val: Labelled, seed: int = 0, watch: Watch = unwatched) -> Iterator[tuple[str, float]]:
        """Yields ("20", accuracy in 0..1) and so on, by number of neighbours; nothing is drawn."""
        for n in sorted({min(n, len(train)) for n in self.n_neighbours}):
            yield str(n), knn_accuracy(train.features, train.labels, val.features, val.labels, n, self.temperature)


@dataclass(frozen=True)
class KNNEvaluator:
    """The same for all readouts that a model has, from images."""

    train: Iterable[tuple[Tensor, Tensor]]
    """(images, labels) that vote."""
    test: Iterable[tuple[Tensor, Tensor]]
    """(images, labels) that are classified."""
    n_neighbours: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07
    device: str | torch.device = "cpu"

    def run(self, model: nn.Module | Callable[[Tensor], Tensor]) -> Iterator[tuple[str, float]]:
        """Yields ("knn/cls/20", accuracy in 0..1) and so on."""
        (train, train_labels), (test, test_labels) = (
            extract_features(model, images, device=self.device) for images in (self.train, self.test)
        )
        for readout in train:
            sides = ((train[readout], train_labels), (test[readout], test_labels))
            voters, asked = (Labelled(features.to(self.device), labels.to(self.device)) for features, labels in sides)
            for n, accuracy in KNN(self.n_neighbours, self.temperature).score(voters, asked):
                yield f"knn/{readout}/{n}", accuracy
