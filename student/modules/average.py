"""An exponential moving average of a student's weights, kept beside them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WeightAverage:
    """average <- decay * average + (1 - decay) * weights after every step, of all trainable parameters; float32."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self._weights = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.tensors: dict[str, Tensor] = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(list(self.tensors.values()), list(self._weights.values()), 1 - self.decay)

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take these values, one for each name, from a checkpoint."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
