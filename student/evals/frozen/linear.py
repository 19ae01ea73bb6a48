"""MAE's linear probe (MAE main_linprobe.py) on features that are computed once: batch norm without affine, then a linear layer.

Several learning rates are tried at once, as a stack of classifiers on the same batches. Which one counts is chosen on a part of
the training images that is held out; then all of them learn from all training images, and are measured on the validation images.

Where it is not MAE's: features are those of one middle crop of each image, so no crops are drawn and nothing is flipped; the best
of a grid of base rates counts, where MAE gives one; a batch is as large as the training set at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError
from ...seeds import position_seed
from ..schedule import rate_at
from ..watch import Watch, unwatched
from .draws import split
from .lars import StackedLARS
from .protocol import Labelled, require_classes

# G rates, n rows, K classes, D width

RATES = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
"""Base rates, for 256 images. MAE and CAE v2 take .1, MILAN .05 (L .02), MaskAlign .025, all on ImageNet-1K. LARS moves weights
by a share of their size, so a set of a few thousand images, which makes few steps, wants rates a hundred times as high."""
BATCH_NORM_EPS, BATCH_NORM_MOMENTUM = 1e-6, 0.1
HELD_OUT = 0.1
"""Share of the training images that a rate is chosen by."""


class LinearStack:
    """G classifiers [K, D] behind one batch norm without affine, from equal initial weights (normal, truncated, std .01)."""

    def __init__(self, n: int, n_classes: int, width: int, seed: int, device: torch.device):
        generator = torch.Generator().manual_seed(position_seed("linear", seed, 0))
        first = torch.nn.init.trunc_normal_(torch.empty(n_classes, width), std=0.01, generator=generator)
        self.weight = first.expand(n, -1, -1).clone().to(device)  # [G, K, D]
        self.bias = torch.zeros(n, n_classes, device=device)
        self.mean, self.var = torch.zeros(width, device=device), torch.ones(width, device=device)

    def normed(self, features: Tensor, training: bool) -> Tensor:
        return F.batch_norm(features, self.mean, self.var, None, None, training, BATCH_NORM_MOMENTUM, BATCH_NORM_EPS)

    def gradients(self, features: Tensor, labels: Tensor) -> list[Tensor]:
        """Of the mean cross-entropy by weight and bias, for normed features [n, D]; worked out by hand, for all at once."""
        logits = torch.einsum("nd,gkd->gnk", features, self.weight) + self.bias[:, None]
        wrong = logits.softmax(-1)
        wrong[:, torch.arange(len(labels), device=labels.device), labels] -= 1
        wrong /= len(labels)
        return [torch.einsum("gnk,nd->gkd", wrong, features), wrong.sum(1)]

    def accuracy(self, data: Labelled, chunk: int = 4096) -> Tensor:
        """float64 [G], 0..1."""
        right = torch.zeros(len(self.weight), dtype=torch.float64)
        for features, labels in zip(data.features.split(chunk), data.labels.split(chunk), strict=True):
            logits = torch.einsum("nd,gkd->gnk", self.normed(features, False), self.weight) + self.bias[:, None]
            right += (logits.argmax(-1) == labels).sum(1).cpu()
        return right / len(data)


@dataclass(frozen=True)
class LinearProbe:
    rates: tuple[float, ...] = RATES
    epochs: int = 90
    warmup_epochs: float = 10
    batch_size: int = 16384
    name: ClassVar[str] = "linear"
    main: ClassVar[str] = "best"
    draws: ClassVar[bool] = True
    numbers: ClassVar[tuple[str, ...]] = ("rate",)

    def __post_init__(self):
        if not self.rates or min(self.rates) <= 0 or len(set(self.rates)) != len(self.rates):
            raise ConfigError(f"--rates: give base rates above 0, each once, as .05,.1,.2; not {self.rates}.")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ConfigError(f"{self.warmup_epochs:g} epochs of warm-up do not fit into {self.epochs}. Give more --epochs.")

    @property
    def protocol(self) -> str:
        rates = ", ".join(f"{rate:g}" for rate in self.rates)
        return (
            f"linear (MAE): batch norm, LARS, {self.epochs} epochs, warm-up {self.warmup_epochs:g}, batch {self.batch_size}, "
            f"middle crops, base rate best by {HELD_OUT:g} of train of {rates}"
        )

    def score(self, train: Labelled, val: Labelled, seed: int = 0, watch: Watch = unwatched) -> Iterator[tuple[str, float]]:
        """Yields "best", the accuracy of the rate that was chosen, "rate" (that one), and "at RATE" for all of them."""
        n_classes = require_classes(train, val)
        learn, choose = split(train.labels.cpu(), HELD_OUT, seed)
        chosen = self._fit(train.rows(learn), n_classes, seed, watch, "to choose").accuracy(train.rows(choose))
        accuracies = self._fit(train, n_classes, seed, watch, "to measure").accuracy(val).tolist()
        best = int(chosen.argmax())
        yield "best", accuracies[best]
        yield "rate", self.rates[best]
        for rate, accuracy in zip(self.rates, accuracies, strict=True):
            yield f"at {rate:g}", accuracy

    def _fit(self, data: Labelled, n_classes: int, seed: int, watch: Watch, what: str) -> LinearStack:
        device, width = data.features.device, data.features.shape[1]
        stack = LinearStack(len(self.rates), n_classes, width, seed, device)
        optimizer = StackedLARS([stack.weight, stack.bias])
        batch_size = min(self.batch_size, len(data))
        n_batches = len(data) // batch_size  # what is left over is in other batches of other epochs, as there
        peaks = torch.tensor(self.rates, device=device) * batch_size / 256
        with watch(f"linear, {what}", self.epochs, "epochs") as advance:
            for epoch in range(self.epochs):
                generator = torch.Generator().manual_seed(position_seed("linear order", seed, epoch))
                order = torch.randperm(len(data), generator=generator)
                for index in range(n_batches):
                    batch = data.rows(order[index * batch_size : (index + 1) * batch_size])
                    share = rate_at(epoch + index / n_batches, 1.0, self.epochs, self.warmup_epochs)
                    optimizer.step(stack.gradients(stack.normed(batch.features, True), batch.labels), peaks * share)
                advance(1)
        return stack
