"""How far the CLS attention of two encoders falls on the same patches."""

from __future__ import annotations

import torch
from torch import Tensor

# B batch, N patches

SHARE = 0.25
"""Of the patches: those that are attended to most, which `top_overlap` compares; by chance a share of so many is common."""


def overlap(ours: Tensor, theirs: Tensor) -> Tensor:
    """float [B], 0..1: the sum over patches of the smaller of both maps, each scaled to a sum of 1; 1 where they are equal."""
    ours, theirs = (maps.float() / maps.float().sum(1, keepdim=True) for maps in (ours, theirs))
    return torch.minimum(ours, theirs).sum(1)


def top_overlap(ours: Tensor, theirs: Tensor, share: float = SHARE) -> Tensor:
    """float [B], 0..1: of the `share` of patches that one attends to most, the part that is among the other's too."""
    n = max(1, round(share * ours.shape[1]))
    tops = [torch.zeros_like(maps, dtype=torch.bool).scatter(1, maps.topk(n, dim=1).indices, True) for maps in (ours, theirs)]
    return (tops[0] & tops[1]).sum(1) / n


def rank_correlation(ours: Tensor, theirs: Tensor) -> Tensor:
    """float [B], -1..1: Spearman's, of the patches ordered by either map (equal values in the order of the patches)."""
    ranks = [maps.argsort(dim=1, stable=True).argsort(dim=1).double() for maps in (ours, theirs)]
    centred = [rank - rank.mean(1, keepdim=True) for rank in ranks]
    product = (centred[0] * centred[1]).sum(1)
    return product / (centred[0].square().sum(1) * centred[1].square().sum(1)).sqrt()
