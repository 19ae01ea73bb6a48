"""Which crops a residual branch is dropped for (stochastic depth): a function of (seed, step, row of the batch), as masks are.

The numbers of a step are drawn for all its crops at once and come into the forward pass as a tensor, so they depend neither on
micro-batches nor on processes or devices, and a compiled graph has no generator in it.
"""

from __future__ import annotations

import functools

import timm.layers
import torch
from torch import Tensor, nn

from ..seeds import position_seed

# B batch, S branches that may be dropped


class DropPath(nn.Module):
    """Drops a branch for some crops and scales it up for the others, by `factors` that `DropPaths.set` puts here.

    rate: probability of being dropped.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.factors: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ...] times its crop's factor: 0, or 1 / (1 - rate). Without factors it draws as timm does."""
        if not self.training:
            return x
        if self.factors is None:
            return timm.layers.drop_path(x, self.rate, True)
        return x * self.factors.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class DropPaths:
    """All branches of a module that may be dropped; timm's own drop path becomes ours there."""

    def __init__(self, module: nn.Module):
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, timm.layers.DropPath):
                    setattr(parent, name, DropPath(child.drop_prob) if child.drop_prob else nn.Identity())
        self.branches = [child for child in module.modules() if isinstance(child, DropPath)]
        self.rates = tuple(branch.rate for branch in self.branches)

    def set(self, factors: Tensor | None) -> None:
        """factors: float32 [B, S] on the device, of the crops of the next forward pass; None: drawn by torch's generator then."""
        for index, branch in enumerate(self.branches):
            branch.factors = None if factors is None else factors[:, index]


@functools.lru_cache(maxsize=2)  # a step may be cut into many micro-batches
def draw_drops(seed: int, step: int, n_rows: int, rates: tuple[float, ...], pinned: bool = False) -> Tensor:
    """The factors of one step: float32 [n_rows, S], 0 with probability `rates`[s], else 1 / (1 - rate); on the CPU, for the whole
    global batch. Not to be changed. pinned: in memory from which a GPU copies without making the host wait.
    """
    generator = torch.Generator().manual_seed(position_seed("drop path", seed, step))
    kept = 1 - torch.tensor(rates)
    factors = (torch.rand(n_rows, len(rates), generator=generator) < kept) / kept
    return factors.pin_memory() if pinned else factors
