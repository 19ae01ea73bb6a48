"""RankMe (Garrido et al. 2023): the effective rank of features, which falls where a representation has collapsed. No labels."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-7
"""RankMe's, added to each share."""


def singular_values(features: Tensor) -> Tensor:
    """float64 [min(n, D)], descending, of features float [n, D], not centred.

    By the eigenvalues of the D x D product, so that n may be large.
    """
    features = features.double()
    n, width = features.shape
    product = features.T @ features if n >= width else features @ features.T
    return torch.linalg.eigvalsh(product).clamp(min=0).sqrt().flip(0)


def rankme(values: Tensor) -> float:
    """exp of the entropy of the shares of singular values: 1 where features lie on a line, min(n, D) where they fill all axes."""
    shares = values / values.sum() + EPS
    return float((-(shares * shares.log()).sum()).exp())
