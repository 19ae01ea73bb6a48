"""MAE's reconstruction loss; L_R of MR-MAE (P000:53)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Encoded
from ..batch import Batch, Needs, TeacherShape
from ..config import BackboneConfig, ReconstructConfig
from ..initial_weights import init_linear_and_norm
from ..masking import Mask, take
from ..predictor import Decoder
from ..targets import normalise_patches, patchify
from .objective import Objective

# B batch, N patches, p side of a patch in pixels


class Reconstruct(Objective):
    """Mean squared error of the hidden patches' normalised pixels (MAE models_mae.py:198-214).

    The mean is over channels and hidden patches. A prediction of zeros costs about 1.
    """

    needs = Needs()

    def __init__(self, config: ReconstructConfig, backbone: BackboneConfig, teacher: TeacherShape | None):
        super().__init__()
        self.patch_size = backbone.patch_size
        self.decoder = Decoder(backbone.dim, backbone.grid, config.dim, config.depth, config.heads, config.mlp_ratio)
        self.head = nn.Linear(config.dim, 3 * backbone.patch_size**2)
        init_linear_and_norm(self.head)

    def forward(self, encoded: Encoded, batch: Batch, mask: Mask) -> tuple[Tensor, dict[str, Tensor]]:
        decoded = self.decoder(encoded.tokens, mask)  # [B, 1+N, width]
        predicted = self.head(take(decoded[:, 1:], mask.drop))  # [B, n_drop, p * p * 3]

        hidden = take(patchify(batch.images, self.patch_size), mask.drop)
        return F.mse_loss(predicted.float(), normalise_patches(hidden)), {}
