"""Hidden rectangles, to an exact count: CAE."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch, Mask, Needs

# B batch, N patches


@dataclass(frozen=True)
class BlockMasker:
    """Hides rectangles, one after the other, until exactly `n_drop` patches are covered (CAE masking_generator.py:5-65).

    While R patches are left to hide, a rectangle is drawn: area uniform between `min_block` and R, log of height / width
    uniform in +-log(1 / .3), sides rounded and below the grid's, place uniform. It is taken if it covers at least one new patch
    and at most R. BEiT's generator, from which this comes, may stop early; here the count is exact.
    """

    n_drop: int
    min_block: int
    grid: tuple[int, int]
    needs: Needs = Needs()

    def __call__(self, batch: Batch, noise: Tensor) -> Mask:
        hidden = self.draw(_keys(noise.cpu().numpy()))  # bool [B, N]
        order = torch.from_numpy(np.argsort(hidden, axis=1, kind="stable")).to(batch.images.device)
        return Mask(keep=order[:, : -self.n_drop or None], drop=order[:, order.shape[1] - self.n_drop :])

    def draw(self, keys: np.ndarray) -> np.ndarray:
        """bool [B, N], True where hidden; keys: uint64 [B], of which the mask of a crop is a function.

        All crops of a batch are drawn at once, a rectangle each in turn: in a loop over crops this would be the slowest part
        of a step.
        """
        rows, columns = self.grid
        row, column = np.divmod(np.arange(rows * columns), columns)  # [N]
        hidden = np.zeros((len(keys), rows * columns), bool)
        left = np.full(len(keys), self.n_drop)  # patches still to hide
        attempt = 0
        while len(open_ := np.flatnonzero(left)):
            area, ratio, top, start = _uniforms(keys[open_], attempt)  # each [open]
            attempt += 1
            area = self.min_block + area * (left[open_] - self.min_block)
            ratio = 0.3 ** (2 * ratio - 1)
            height, width = np.rint(np.sqrt(area * ratio)).astype(int), np.rint(np.sqrt(area / ratio)).astype(int)
            top, start = (top * (rows - height + 1)).astype(int)[:, None], (start * (columns - width + 1)).astype(int)[:, None]
            inside = (
                (row >= top) & (row < top + height[:, None]) & (column >= start) & (column < start + width[:, None])
            )  # [open, N]
            n_new = (inside & ~hidden[open_]).sum(1)
            taken = (height < rows) & (width < columns) & (n_new > 0) & (n_new <= left[open_])
            hidden[open_[taken]] |= inside[taken]
            left[open_[taken]] -= n_new[taken]
        return hidden


def _keys(noise: np.ndarray) -> np.ndarray:
    """uint64 [B]: the bits of a row's first numbers, mixed. noise: float32 [B, N]."""
    keys = np.zeros(len(noise), "uint64")
    for bits in np.ascontiguousarray(noise[:, :4]).view("uint32").T:
        keys = _mixed(keys ^ bits.astype("uint64"))
    return keys


def _uniforms(keys: np.ndarray, attempt: int) -> np.ndarray:
    """float64 [4, B] in [0, 1): the numbers of one attempt, functions of key and attempt alone."""
    counters = np.uint64(4 * attempt) + np.arange(4, dtype="uint64")[:, None]
    with np.errstate(over="ignore"):
        mixed = _mixed(keys + (counters + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return (mixed >> np.uint64(11)) * 2.0**-53


def _mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64's output function (Steele et al. 2014): every bit of the result depends on every bit of the input."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
