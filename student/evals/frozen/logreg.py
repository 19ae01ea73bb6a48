"""DINOv2's logistic regression: L2-regularised, on normalised features, its strength chosen on a part of the training images."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ...errors import ConfigError
from ..watch import Watch, unwatched
from .draws import split
from .protocol import Labelled, require_classes

STRENGTHS = tuple(float(10**power) for power in torch.linspace(-6, 5, 45, dtype=torch.float64))
"""C, the inverse of the penalty: DINOv2's 45 values (eval/log_regression.py)."""
HELD_OUT = 0.1


@dataclass(frozen=True)
class LogisticRegression:
    strengths: tuple[float, ...] = STRENGTHS
    most_iterations: int = 1000
    name: ClassVar[str] = "logreg"
    main: ClassVar[str] = "best"
    draws: ClassVar[bool] = True
    numbers: ClassVar[tuple[str, ...]] = ("C", "iterations")

    def __post_init__(self):
        if not self.strengths or min(self.strengths) <= 0:
            raise ConfigError(f"--strengths: give values of C above 0, as .01,1,100; not {self.strengths}.")

    @property
    def protocol(self) -> str:
        low, high = min(self.strengths), max(self.strengths)
        return (
            f"logreg (DINOv2): L2-normalised features, L2 penalty, C best by {HELD_OUT:g} of train of {len(self.strengths)} from "
            f"{low:.3g} to {high:.3g}, {self.most_iterations} iterations of L-BFGS"
        )

    def score(self, train: Labelled, val: Labelled, seed: int = 0, watch: Watch = unwatched) -> Iterator[tuple[str, float]]:
        """Yields "best", the accuracy with the C that was chosen, "C", and "iterations" it took."""
        require_classes(train, val)
        learn, choose = split(train.labels.cpu(), HELD_OUT, seed)
        strength = self._chosen(train.rows(learn), train.rows(choose), watch)
        model = _fit(self._model().set_params(C=strength), *_arrays(train))
        yield "best", float(model.score(*_arrays(val)))
        yield "C", strength
        yield "iterations", float(max(model.n_iter_))

    def _chosen(self, learn: Labelled, choose: Labelled, watch: Watch) -> float:
        """The C of the best accuracy on `choose`; of equal ones the smallest."""
        (features, labels), (asked, their_labels) = _arrays(learn), _arrays(choose)
        model, best = self._model(), (-1.0, 0.0)
        with watch("logreg", len(self.strengths), "strengths") as advance:
            for strength in sorted(self.strengths):
                _fit(model.set_params(C=strength), features, labels)
                accuracy = model.score(asked, their_labels)
                best = max(best, (accuracy, -strength))
                advance(1)
        return -best[1]

    def _model(self):
        from sklearn.linear_model import LogisticRegression as Model

        return Model(max_iter=self.most_iterations, warm_start=True)


def _fit(model, features, labels):
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the iterations are a part of the protocol
        return model.fit(features, labels)


def _arrays(data: Labelled):
    return F.normalize(data.features.float(), dim=1).cpu().numpy(), data.labels.cpu().numpy()
