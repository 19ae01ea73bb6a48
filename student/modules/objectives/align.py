"""MaskAlign: visible tokens of all student blocks, mixed, match the teacher's last blocks (its section on dynamic alignment).

Where paper and released code differ, this follows the code, which made the published checkpoints: mix first and adapt
then (models_pretrain.py:302-311), CLS in the loss (:323-326), and a factor of 2 (:357).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...batch import Batch, Mask, Needs
from ...config import AlignConfig, BackboneConfig
from ...errors import ConfigError
from ..backbones import Encoded
from ..initial_weights import init_linear_and_norm
from .objective import Objective, Teachers, require_teacher

# B batch, n tokens (CLS if student and teacher have one, then the visible patches), K levels, S student blocks, D width


class Align(Objective):
    """2 * smooth L1 (beta 1) between K adapted mixtures of student blocks and the teacher's last K blocks, whitened.

    Mean over crops, tokens, channels and levels. A prediction of zeros costs about 0.849 on Gaussian targets. "layer-wise", the
    mixtures are the student's own last K blocks, one each; with K = 1 that is feature distillation on visible tokens.

    Public names, for T teacher blocks: rows T-K.. of distill_weights are `mixing`, distill_heads.(T-K+I) is adaptors.I.
    """

    reads_final_norm = False  # MaskAlign models_pretrain.py:264-271: computed, but in no loss
    no_decay = frozenset({"mixing"})  # MaskAlign main_pretrain.py:206

    def __init__(self, config: AlignConfig, backbone: BackboneConfig, teachers: Teachers):
        super().__init__()
        teacher = require_teacher(config, backbone, teachers)
        if config.levels > teacher.depth:
            raise ConfigError(
                f"{config.kind}.levels={config.levels} asks for more blocks than the teacher {teacher.name} has: {teacher.depth}."
            )
        self.layer_wise = config.mixing == "layer-wise"
        if self.layer_wise and config.levels > backbone.depth:
            raise ConfigError(
                f"{config.kind}.levels={config.levels} with mixing=layer-wise asks for more blocks than the backbone has: "
                f"{backbone.depth}."
            )
        self.teacher = config.teacher
        self.with_cls = backbone.has_cls and teacher.has_cls
        self.levels = tuple(range(-config.levels, 0))
        self.needs = Needs(layers=self.levels)

        # The released code has a row and a head for every teacher block, but only the last K ever get a gradient.
        if not self.layer_wise:
            self.mixing = nn.Parameter(_initial_mixing(backbone.depth, teacher.depth)[-config.levels :])  # [K, S]
        self.adaptors = nn.ModuleList(nn.Linear(backbone.dim, teacher.dim) for _ in self.levels)
        init_linear_and_norm(self)

    def forward(self, encoded: Encoded, batch: Batch, mask: Mask) -> tuple[Tensor, dict[str, Tensor]]:
        targets = batch.targets[self.teacher]
        first = int(encoded.has_cls and not self.with_cls)
        students = self._students([tokens[:, first:] for tokens in encoded.layers])  # K times [B, n, D]

        parts = {}
        for adaptor, tokens, level in zip(self.adaptors, students, self.levels, strict=True):
            # Float32 before cat, which autocast to bfloat16 refuses for the float16 of a cache.
            target = targets.visible(level, mask.keep).float()  # [B, n_keep, D of the teacher]
            if self.with_cls:
                target = torch.cat([targets.layer(level)[:, :1].float(), target], dim=1)
            parts[f"layer{level}"] = 2 * F.smooth_l1_loss(adaptor(tokens).float(), target, beta=1.0)

        return torch.stack(tuple(parts.values())).mean(), parts

    def _students(self, blocks: list[Tensor]) -> Sequence[Tensor]:
        """What each level's adaptor is given, of all S blocks' tokens."""
        if self.layer_wise:
            return blocks[-len(self.levels) :]

        # In float32 whatever the autocast: steps of the mixing weights are smaller than bfloat16 resolves near 1.
        with torch.autocast(blocks[0].device.type, enabled=False):
            return torch.einsum("ks,sbnd->kbnd", self.mixing, torch.stack(blocks).float()).unbind()


def _initial_mixing(student_depth: int, teacher_depth: int) -> Tensor:
    """[teacher blocks, student blocks]: block to block plus 0.01 where the depths agree, else the mean of all blocks.

    `linear` and `sum` of the released code (models_pretrain.py:102-106).
    """
    if student_depth == teacher_depth:
        return torch.eye(student_depth) + 0.01
    return torch.full((teacher_depth, student_depth), 1 / student_depth)
