"""Directions of the teacher's output tokens at every token: MILAN and CAE v2.

Both papers name the patches alone; both codes put CLS into the one mean as well (MILAN models_milan.py:327-336, CAE
engine_for_pretraining.py:43-66), and are followed here.
"""

from __future__ import annotations

from torch import Tensor, nn

from ...batch import Batch, Mask, Needs
from ...config import BackboneConfig, CosineConfig
from ...errors import ConfigError
from ..backbones import Encoded
from ..initial_weights import init_linear_and_norm
from ..predictor import Predictor
from ..targets import teacher_output, unit_length
from .objective import Objective, Teachers, require_teacher_with_head

# B batch, N patches, C 1 if student and teacher have CLS else 0, E width of the teacher's output


class Cosine(Objective):
    """scale * (1 - cos) between predicted tokens and the teacher's output: a mean over CLS, visible and hidden tokens.

    Scale 2 is MILAN: the squared distance of unit vectors. Scale 1 is CAE v2. A prediction of nothing costs `scale`. A factor of
    `tokens` multiplies its tokens' terms, the number of tokens divided by stays the same: (1, 1, 0) leaves the hidden ones out.
    The paper of CAE v2, a mean over visible plus a mean over hidden patches without CLS, is (0, (1+N) / n_keep, (1+N) / n_drop).

    Public names: MILAN's decoder_pred and CAE's decoder.head are `head`; all the rest is `predictor` (see Predictor).
    """

    needs = Needs(layers=(-1,), hidden_tokens=True)

    def __init__(self, config: CosineConfig, backbone: BackboneConfig, teachers: Teachers):
        super().__init__()
        teacher = require_teacher_with_head(config, backbone, teachers)
        self.teacher = config.teacher
        self.scale = config.scale
        self.factors = config.tokens
        self.with_cls = backbone.has_cls and teacher.has_cls
        if self.factors[0] > 0 and not self.with_cls:
            who = f"the teacher {teacher.name}" if backbone.has_cls else f"the backbone {backbone.kind}"
            raise ConfigError(
                f"{config.name}.tokens={self.factors} counts CLS, which {who} does not have. Set its factor, the first, to 0."
            )

        self.predictor = Predictor(config.predictor, backbone.dim, backbone.grid)
        self.head = nn.Linear(config.predictor.dim, teacher.projection_dim or teacher.dim)
        init_linear_and_norm(self.head)

    def forward(self, encoded: Encoded, batch: Batch, mask: Mask) -> tuple[Tensor, dict[str, Tensor]]:
        targets = batch.targets[self.teacher]
        predicted = self.head(self.predictor(encoded.tokens, mask))  # [B, 1+N, E]
        target = teacher_output(targets.layer(-1), targets.head)
        if not self.with_cls:
            predicted, target = predicted[:, int(encoded.has_cls) :], target[:, int(targets.has_cls) :]

        losses = self.scale * (1 - (unit_length(predicted) * unit_length(target)).sum(-1))  # [B, C+N]

        cls, patches = losses.tensor_split([int(self.with_cls)], dim=1)
        groups = {"cls": cls, "visible": patches.gather(1, mask.keep), "hidden": patches.gather(1, mask.drop)}
        total = sum(factor * group.sum() for factor, group in zip(self.factors, groups.values(), strict=True))
        return total / losses.numel(), {name: group.mean() for name, group in groups.items() if group.numel() > 0}
