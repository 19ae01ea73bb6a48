"""What every backbone gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# B batch, n tokens of patches, C 1 with CLS else 0, D width


@dataclass(frozen=True)
class Encoded:
    """What the encoder made of a batch; with `has_cls`, row 0 of the token axis is CLS.

    n is n_keep, the visible patches in the order of `Mask.keep`, where hidden patches are dropped; it is N, all patches row by
    row, where mask tokens stand in their place.
    """

    tokens: Tensor  # [B, C+n, D], behind the final norm
    layers: tuple[Tensor, ...]  # each [B, C+n, D]: the output of every block of that width, before any norm
    has_cls: bool = True

    @property
    def patches(self) -> Tensor:
        """[B, n, D]: `tokens` without CLS."""
        return self.tokens[:, int(self.has_cls) :]
