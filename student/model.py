"""The student as one module: a masker, a backbone and the objectives that train it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .backbone import Backbone
from .batch import Batch, Needs, TeacherShape
from .config import TrainConfig
from .masking import build_masker
from .objectives import build_objective

# B batch, N patches


class Student(nn.Module):
    """What `config` describes, for a teacher of this shape; the initial weights are a function of `config.seed`.

    needs: what it wants read of the teacher.  n_patches: N, the width of the noise `forward` takes.
    Raises ConfigError if the teacher lacks what the objectives or the masker need.
    """

    def __init__(self, config: TrainConfig, teacher: TeacherShape | None = None):
        super().__init__()
        self.masker = build_masker(config.mask, config.backbone, teacher)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.backbone = Backbone(config.backbone)
            self.objectives = nn.ModuleDict(
                {objective.kind: build_objective(objective, config.backbone, teacher) for objective in config.objectives}
            )
        self.weights = {objective.kind: objective.weight for objective in config.objectives}
        self.n_patches = config.backbone.n_patches

        self.needs: Needs = self.masker.needs
        for objective in self.objectives.values():
            self.needs = self.needs | objective.needs

    def forward(self, batch: Batch, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss, a float32 scalar, and its parts by name, detached and without their weights.

        noise: float32 [B, N] in (0, 1), the randomness of the mask (`masking.draw_noise`).
        """
        mask = self.masker(batch, noise)
        encoded = self.backbone(batch.images, mask)

        total = 0.0
        parts = {}
        for kind, objective in self.objectives.items():
            loss, details = objective(encoded, batch, mask)
            total = total + self.weights[kind] * loss
            parts[kind] = loss.detach()
            parts |= {f"{kind}/{name}": value.detach() for name, value in details.items()}
        return total, parts
