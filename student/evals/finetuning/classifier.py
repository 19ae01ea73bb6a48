"""An encoder with a classifier behind it, as MAE and iBOT fine-tune it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ...exports.layouts import PRE_TRAINING_ONLY
from ...seeds import position_seed
from ..subject import Subject
from .layers import parameter_groups, set_drop_path
from .settings import FineTune

HEAD_STD = 2e-5
"""Of the classifier's initial weights (MAE main_finetune.py)."""


class Classifier(nn.Module):
    """Logits [B, K] of images [B, 3, H, W], normalised as the subject wants them; a copy of its encoder, all of which learns.

    Read is the mean of the patches behind a new norm, for which the final norm goes (a Swin keeps its own: it was made for that),
    or the CLS token behind the final norm.
    """

    def __init__(self, subject: Subject, n_classes: int, settings: FineTune, seed: int = 0):
        super().__init__()
        self.encoder = copy.deepcopy(subject.network).cpu().requires_grad_(True)
        self.n_cls = int(subject.encoder.has_cls)
        self.readout = settings.readout if self.n_cls else "mean"
        body = self.body
        set_drop_path(body, settings.drop_path)
        for name, parameter in body.named_parameters():
            parameter.requires_grad_(not name.startswith(PRE_TRAINING_ONLY))
        width = next(module.normalized_shape[0] for module in reversed(list(body.modules())) if isinstance(module, nn.LayerNorm))
        self.fc_norm = nn.Identity()
        if self.readout == "mean" and self.n_cls:
            for name in ("norm", "fc_norm"):
                if isinstance(getattr(body, name, None), nn.LayerNorm):
                    width = getattr(body, name).normalized_shape[0]
                    setattr(body, name, nn.Identity())
            self.fc_norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, n_classes)
        generator = torch.Generator().manual_seed(position_seed("finetune head", seed, 0))
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD, generator=generator)
        nn.init.zeros_(self.head.bias)

    @property
    def body(self) -> nn.Module:
        """The network whose names count: ours, or timm's."""
        return getattr(self.encoder, "model", self.encoder)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.encoder.encode_all(images)
        pooled = tokens[:, 0] if self.readout == "cls" else tokens[:, self.n_cls :].mean(1)
        return self.head(self.fc_norm(pooled))

    def groups(self, settings: FineTune) -> list[dict]:
        """AdamW's, with layer decay."""
        new = [*self.fc_norm.parameters(), *self.head.parameters()]
        return parameter_groups(self.body, new, settings.layer_decay, settings.weight_decay)
