"""LARS as linear probing uses it (MAE util/lars.py), over a stack of classifiers that learn at different rates at once."""

from __future__ import annotations

import torch
from torch import Tensor

# G classifiers side by side

MOMENTUM, TRUST = 0.9, 0.001


class StackedLARS:
    """LARS over parameters [G, ...] of G classifiers that do not see each other; each has its own trust ratios.

    A parameter with one axis beside G (a bias) gets neither the trust ratio nor weight decay. The learning rate is applied behind
    the momentum, as there.
    """

    def __init__(self, parameters: list[Tensor], weight_decay: float = 0.0, momentum: float = MOMENTUM, trust: float = TRUST):
        self.parameters, self.weight_decay, self.momentum, self.trust = parameters, weight_decay, momentum, trust
        self._velocity = [torch.zeros_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def step(self, gradients: list[Tensor], rates: Tensor) -> None:
        """Update in place. gradients: one for each parameter; rates: float [G], the learning rates of this step."""
        for parameter, gradient, velocity in zip(self.parameters, gradients, self._velocity, strict=True):
            if parameter.ndim > 2:
                gradient = gradient + self.weight_decay * parameter
                sizes = [values.flatten(1).norm(dim=1) for values in (parameter, gradient)]
                ratio = torch.where((sizes[0] > 0) & (sizes[1] > 0), self.trust * sizes[0] / sizes[1], 1.0)
                gradient = gradient * ratio.view(-1, *[1] * (parameter.ndim - 1))
            velocity.mul_(self.momentum).add_(gradient)
            parameter.sub_(rates.view(-1, *[1] * (parameter.ndim - 1)) * velocity)
