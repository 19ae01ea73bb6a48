"""Square units of several patches, uniformly: SimMIM, MimCo."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch import Batch, Mask, Needs

# B batch, N patches


@dataclass(frozen=True)
class UnitMasker:
    """Keeps `n_keep` square units of `side` x `side` patches, uniformly (SimMIM data_simmim.py:21-45); MimCo.

    Of the noise, the number at a unit's first patch decides.
    """

    n_keep: int
    side: int
    grid: tuple[int, int]
    needs: Needs = Needs()

    def __call__(self, batch: Batch, noise: Tensor) -> Mask:
        noise = noise.to(batch.images.device).unflatten(1, self.grid)[:, :: self.side, :: self.side].flatten(1)  # [B, units]
        units = torch.argsort(noise, dim=1, stable=True)
        patches = self._patches_of_units(units.device)
        return Mask(*(patches[chosen].flatten(1) for chosen in (units[:, : self.n_keep], units[:, self.n_keep :])))

    def _patches_of_units(self, device: torch.device) -> Tensor:
        """int64 [units, side * side]: the patches of each unit."""
        rows, columns = self.grid
        patches = torch.arange(rows * columns, device=device).reshape(
            rows // self.side, self.side, columns // self.side, self.side
        )
        return patches.transpose(1, 2).reshape(-1, self.side**2)
