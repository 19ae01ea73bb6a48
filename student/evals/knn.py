"""DINO's weighted nearest-neighbour classifier (DINO eval_knn.py): no training, no hyper-parameter to tune."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import extract_features

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
class KNNEvaluator:
    """Top-1 accuracy for several numbers of neighbours and all readouts that a model has."""

    train: Iterable[tuple[Tensor, Tensor]]
    """(images, labels) that vote."""
    test: Iterable[tuple[Tensor, Tensor]]
    """(images, labels) that are classified."""
    n_neighbours: tuple[int, ...] = (10, 20, 100, 200)
    """Larger ones than the training set count as its size."""
    temperature: float = 0.07
    device: str | torch.device = "cpu"

    def run(self, model: nn.Module | Callable[[Tensor], Tensor]) -> Iterator[tuple[str, float]]:
        """Yields ("knn/cls/20", accuracy in 0..1) and so on."""
        train_features, train_labels = extract_features(model, self.train, device=self.device)
        test_features, test_labels = extract_features(model, self.test, device=self.device)
        train_labels, test_labels = train_labels.to(self.device), test_labels.to(self.device)

        possible = sorted({min(n, len(train_labels)) for n in self.n_neighbours})
        for readout in train_features:
            voters, asked = train_features[readout].to(self.device), test_features[readout].to(self.device)
            for n in possible:
                accuracy = knn_accuracy(voters, train_labels, asked, test_labels, n, self.temperature)
                yield f"knn/{readout}/{n}", accuracy
