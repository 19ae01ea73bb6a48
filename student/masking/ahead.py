"""Masks drawn by the source of the batches, before the teacher's tokens are read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .by_score import ScoreMasker
from .masker import draw_noise

# B batch, N patches


@dataclass(frozen=True)
class MasksAhead:
    """The masks of a run, drawn where its batches are made: those that its student would draw, before any token is read.

    So tokens of hidden patches need not be read, sent and dequantised where no loss looks at them.
    """

    masker: ScoreMasker
    seed: int
    n_patches: int

    def order(self, step: int, batch_size: int, number: int, n_micro_batches: int, attention: np.ndarray | None) -> np.ndarray:
        """int64 [B, N]: the patches of the crops of a micro-batch, the visible ones first; see ScoreMasker.mask.

        number: of the micro-batch among the `n_micro_batches` of step `step`, which has `batch_size` crops. attention: float32
        [B, N], if the masker needs it.
        """
        # By numpy: torch would start as many threads as there are processors, on which the loader decodes crops.
        noise = draw_noise(self.seed, step, batch_size, self.n_patches).chunk(n_micro_batches)[number].numpy()
        return np.argsort(-self.masker.score(attention, noise), axis=1, kind="stable")
