"""The race that was run when a store of visible tokens was made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch import Batch, Mask, Needs

# B batch, N patches


@dataclass(frozen=True)
class StoredRace:
    """Keeps the first `n_keep` of the patches whose tokens are stored: the race of `by_score.attention_race`, run when they were.

    So the mask of a crop is the same in every epoch that reads its view, and noise plays no part.
    """

    n_keep: int
    needs: Needs = Needs()

    def __call__(self, batch: Batch, noise: Tensor) -> Mask:
        keep = batch.targets[0].index[:, : self.n_keep]
        is_kept = torch.zeros(noise.shape, dtype=torch.int8, device=keep.device).scatter_(1, keep, 1)
        return Mask(keep, drop=torch.argsort(is_kept, dim=1, stable=True)[:, : noise.shape[1] - self.n_keep])
