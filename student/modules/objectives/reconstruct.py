"""MAE's reconstruction loss; L_R of MR-MAE."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ...batch import Batch, Mask, Needs, take
from ...config import BackboneConfig, ReconstructConfig
from ..backbones import Encoded
from ..initial_weights import init_linear_and_norm
from ..predictor import Predictor
from ..targets import normalise_patches, patchify
from .objective import Objective, Teachers, require_teacher

# B batch, N patches, p side of a patch in pixels


class Reconstruct(Objective):
    """Mean squared error of the hidden patches' normalised pixels (MAE models_mae.py:198-214).

    The mean is over channels and hidden patches. A prediction of zeros costs about 1.

    With `mimic`, the decoder has a second head for the teacher's last block, whitened, at the same patches, and `mimic` times
    its mean squared error is added: both targets at the decoder, the "joint" row of MR-MAE's ablation, which
    does not say more than that.

    Public names: MAE's decoder_pred is `head`; all the rest is `decoder` (see Predictor).
    """

    def __init__(self, config: ReconstructConfig, backbone: BackboneConfig, teachers: Teachers):
        super().__init__()
        self.patch_size = backbone.stride
        self.decoder = Predictor(config.decoder, backbone.dim, backbone.grid)
        self.head = nn.Linear(config.decoder.dim, 3 * self.patch_size**2)

        self.mimic = config.mimic
        self.needs = Needs(layers=(-1,), hidden_tokens=True) if self.mimic else Needs()
        self.teacher = config.teacher if self.mimic else None
        if self.mimic:
            self.mimic_head = nn.Linear(config.decoder.dim, require_teacher(config, backbone, teachers).dim)
            init_linear_and_norm(self.mimic_head)
        init_linear_and_norm(self.head)

    def forward(self, encoded: Encoded, batch: Batch, mask: Mask) -> tuple[Tensor, dict[str, Tensor]]:
        decoded = self.decoder(encoded.tokens, mask)  # [B, C+N, width]
        hidden = take(decoded[:, int(encoded.has_cls) :], mask.drop)  # [B, n_drop, width]

        pixels = take(patchify(batch.images, self.patch_size), mask.drop)  # [B, n_drop, p * p * 3]
        pixel_loss = F.mse_loss(self.head(hidden).float(), normalise_patches(pixels))
        if not self.mimic:
            return pixel_loss, {}

        tokens = take(batch.targets[self.teacher].patches(-1), mask.drop)  # [B, n_drop, D of the teacher]
        mimic_loss = F.mse_loss(self.mimic_head(hidden).float(), tokens.float())
        return pixel_loss + self.mimic * mimic_loss, {"pixels": pixel_loss, "mimic": mimic_loss}
