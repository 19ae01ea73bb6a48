"""What evaluators of frozen features have in common: labelled features in, (name, value) out, and a protocol that says how."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ...errors import ConfigError
from ..watch import Watch

# n rows, D width


@dataclass(frozen=True)
class Labelled:
    """Features and their classes, on the device that is to compute."""

    features: Tensor  # float32 [n, D]
    labels: Tensor  # int64 [n]

    def rows(self, rows: Tensor) -> Labelled:
        rows = rows.to(self.labels.device)
        return Labelled(self.features[rows], self.labels[rows])

    def __len__(self) -> int:
        return len(self.labels)


class FrozenEvaluator(Protocol):
    """An evaluator of frozen features."""

    name: str
    main: str
    """Name of the value that a table ranks by."""
    draws: bool
    """Whether a seed changes its result."""
    numbers: tuple[str, ...]
    """Names of values that are no shares of 1."""

    @property
    def protocol(self) -> str:
        """Name, source and every setting: results of equal protocols on equal data can be compared."""
        ...

    def score(self, train: Labelled, val: Labelled, seed: int, watch: Watch) -> Iterator[tuple[str, float]]:
        """Yields (name, value); accuracies and shares in 0..1."""
        ...


def require_classes(train: Labelled, val: Labelled) -> int:
    """Number of classes, where labels count through them; ConfigError unless there are two or more in `train`."""
    n_classes = int(max(train.labels.max(), val.labels.max())) + 1
    if len(train.labels.unique()) < 2:
        raise ConfigError("The training images are all of one class: there is nothing to tell apart. Give two classes or more.")
    return n_classes
