"""The patches with the highest scores are visible; a score looks at noise and the teacher's attention, patch by patch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch, Mask, Needs

# B batch, N patches


@dataclass(frozen=True)
class ScoreMasker:
    """Keeps the `n_keep` patches with the highest score.

    score: (attention, noise) -> [B, N], all three tensors or all three numpy arrays; attention is None unless `needs` has it.
    """

    n_keep: int
    score: Callable[[Tensor | np.ndarray | None, Tensor | np.ndarray], Tensor | np.ndarray]
    needs: Needs = Needs()

    def __call__(self, batch: Batch, noise: Tensor) -> Mask:
        attention = batch.targets[0].attention if self.needs.attention else None
        scores = self.score(attention, noise.to(batch.images.device))
        # Stable, because equal scores must fall the same way on every device.
        order = torch.argsort(scores, dim=1, descending=True, stable=True)  # [B, N]
        return self.mask(order)

    def mask(self, order: Tensor) -> Mask:
        """The mask of the patches from the highest score to the lowest, int64 [B, N]."""
        return Mask(keep=order[:, : self.n_keep], drop=order[:, self.n_keep :])


def uniform(attention, noise):
    """Uniform without replacement (MAE models_mae.py:123-148: the first patches of a random shuffle)."""
    return -noise


def attention_race(attention, noise):
    """Drawn by the teacher's attention without replacement: the exponential race p / E, E ~ Exp(1).

    The same law as torch.multinomial(p, n, replacement=False), which MILAN and MaskAlign use, with the randomness
    from outside and without its host synchronisation. Patches without attention come last.
    """
    # In float64: float32 logarithms of two devices differ in the last bit, and a race could end the other way.
    if isinstance(noise, np.ndarray):
        return attention.astype("float64") / -np.log(noise.astype("float64"))
    return attention.double() / -noise.double().log()


def attention_top(attention, noise):
    """Always the patches with the most attention: the literal reading of "the most salient tokens" of MR-MAE."""
    return attention


SCORES = {"random": uniform, "attention": attention_race, "attention-top": attention_top}
"""Kind of a MaskConfig -> its score."""
