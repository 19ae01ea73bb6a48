"""MR-MAE's mimic loss: L_M of "Mimic before Reconstruct"."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ...batch import Batch, Mask, Needs
from ...config import BackboneConfig, MimicConfig
from ..backbones import Encoded
from ..initial_weights import init_linear_and_norm
from .objective import Objective, Teachers, require_teacher

# B batch, N patches, D width of the teacher


class Mimic(Objective):
    """Mean squared error between one Linear of the visible patch tokens and the teacher's last block, whitened.

    The paper divides by the number of tokens only; as in MAE's code for the same notation, the mean is over channels
    too. CLS takes no part. A prediction of zeros costs about 1. With two teachers each has an objective of its own, and so a
    Linear of its own ("joint" of the paper's ablation of teachers; it does not say more).
    """

    needs = Needs(layers=(-1,))

    def __init__(self, config: MimicConfig, backbone: BackboneConfig, teachers: Teachers):
        super().__init__()
        teacher = require_teacher(config, backbone, teachers)
        self.teacher = config.teacher
        self.head = nn.Linear(backbone.dim, teacher.dim)
        init_linear_and_norm(self)

    def forward(self, encoded: Encoded, batch: Batch, mask: Mask) -> tuple[Tensor, dict[str, Tensor]]:
        predicted = self.head(encoded.patches)  # [B, n_keep, D]
        target = batch.targets[self.teacher].visible(-1, mask.keep)  # [B, n_keep, D]

        return F.mse_loss(predicted.float(), target.float()), {}
