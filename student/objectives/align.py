"""MaskAlign: visible tokens of all student blocks, mixed, match the teacher's last blocks (P003:79-91).

Where paper and released code differ, this follows the code, which made the published checkpoints: mix first and adapt
then (models_pretrain.py:302-311), CLS in the loss (:323-326), and a factor of 2 (:357).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Encoded
from ..batch import Batch, Needs, TeacherShape
from ..config import AlignConfig, BackboneConfig
from ..errors import ConfigError
from ..initial_weights import init_linear_and_norm
from ..masking import Mask, take
from .objective import Objective, require_teacher

# B batch, n tokens (CLS if the teacher has one, then the visible patches), K levels, S student blocks


class Align(Objective):
    """2 * smooth L1 (beta 1) between K adapted mixtures of student blocks and the teacher's last K blocks, whitened.

    Mean over crops, tokens, channels and levels. A prediction of zeros costs about 0.849 on Gaussian targets.
    """

    no_decay = frozenset({"mixing"})  # MaskAlign main_pretrain.py:206

    def __init__(self, config: AlignConfig, backbone: BackboneConfig, teacher: TeacherShape | None):
        super().__init__()
        teacher = require_teacher(config.kind, backbone, teacher)
        if config.levels > teacher.depth:
            raise ConfigError(
                f"{config.kind}.levels={config.levels} asks for more blocks than the teacher {teacher.name} has: {teacher.depth}."
            )
        self.levels = tuple(range(-config.levels, 0))
        self.needs = Needs(layers=self.levels)

        # The released code has a row and a head for every teacher block, but only the last K ever get a gradient.
        self.mixing = nn.Parameter(_initial_mixing(backbone.depth, teacher.depth)[-config.levels :])  # [K, S]
        self.adaptors = nn.ModuleList(nn.Linear(backbone.dim, teacher.dim) for _ in self.levels)
        init_linear_and_norm(self)

    def forward(self, encoded: Encoded, batch: Batch, mask: Mask) -> tuple[Tensor, dict[str, Tensor]]:
        blocks = torch.stack(encoded.layers)  # [S, B, 1+n_keep, D]
        if not batch.targets.has_cls:
            blocks = blocks[:, :, 1:]

        # In float32 whatever the autocast: steps of the mixing weights are smaller than bfloat16 resolves near 1.
        with torch.autocast(blocks.device.type, enabled=False):
            mixed = torch.einsum("ks,sbnd->kbnd", self.mixing, blocks.float())  # [K, B, n, D]

        parts = {}
        for adaptor, tokens, level in zip(self.adaptors, mixed, self.levels, strict=True):
            target = _visible(batch.targets.layer(level), batch.targets.has_cls, mask)  # [B, n, D of the teacher]
            parts[f"layer{level}"] = 2 * F.smooth_l1_loss(adaptor(tokens).float(), target.float(), beta=1.0)

        return torch.stack(tuple(parts.values())).mean(), parts


def _initial_mixing(student_depth: int, teacher_depth: int) -> Tensor:
    """[teacher blocks, student blocks]: block to block plus 0.01 where the depths agree, else the mean of all blocks.

    `linear` and `sum` of the released code (models_pretrain.py:102-106).
    """
    if student_depth == teacher_depth:
        return torch.eye(student_depth) + 0.01
    return torch.full((teacher_depth, student_depth), 1 / student_depth)


def _visible(tokens: Tensor, has_cls: bool, mask: Mask) -> Tensor:
    """CLS, if there, and the visible patches of teacher tokens [B, C+N, D]."""
    if not has_cls:
        return take(tokens, mask.keep)
    return torch.cat([tokens[:, :1], take(tokens[:, 1:], mask.keep)], dim=1)
