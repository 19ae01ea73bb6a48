"""Batch norm over the crops of all processes, on any device (torch's SyncBatchNorm refuses CPU tensors)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..devices.distributed import summed, world_size


class BatchNorm(nn.Module):
    """Batch norm of vectors [n, D] by the statistics of this very batch, over all processes; float32, eps 1e-5.

    It keeps no running statistics: it stands in heads that are only ever used in training and thrown away.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        n = len(x) * world_size()
        centred = x - summed(x.sum(0)) / n
        variance = summed(centred.square().sum(0)) / n  # biased
        return centred * (variance + 1e-5).rsqrt() * self.weight + self.bias
