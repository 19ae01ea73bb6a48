"""MimCo's two InfoNCE losses against a frozen teacher (its Algorithm 1).

Heads and queues are MoBY's, which the paper says it follows (SSL moby.py); a 1 x 1 convolution over a map of patches is a
Linear over patches. Names in MoBY's code: `projector.linear_hidden.{1,2}` -> `projector.hidden`, `projector.norm`,
`projector.linear_out` -> `projector.out`, the same for `predictor`, `projector_k` -> `key_projector`, `queue1`, `queue2` ->
`queue`, transposed. Here there is one such set for patches and one for the image.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...batch import Batch, Mask, Needs, take
from ...config import BackboneConfig, ContrastConfig
from ...devices.distributed import gathered, world_size
from ...errors import ConfigError
from ..backbones import Encoded
from ..batch_norm import BatchNorm
from ..targets import final_norm
from .objective import Objective, Teachers, require_teacher_with_head

# B batch, N patches, M hidden patches, C width of student and teacher, E width of queries and keys, K keys in a queue


class Head(nn.Module):
    """Linear, batch norm, ReLU, Linear on vectors [..., in] -> [..., out] (SSL moby.py:170-182)."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int):
        super().__init__()
        self.hidden = nn.Linear(in_dim, hidden_dim)
        self.norm = BatchNorm(hidden_dim)
        self.out = nn.Linear(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.hidden(x).flatten(0, -2)).relu()
        return self.out(hidden).unflatten(0, x.shape[:-1])


class Branch(nn.Module):
    """Queries of the student, keys of the teacher, and a queue of keys of earlier crops as negatives."""

    def __init__(self, dim: int, config: ContrastConfig):
        super().__init__()
        self.temperature = config.temperature
        self.projector = Head(dim, config.hidden_dim, config.out_dim)
        self.predictor = Head(config.out_dim, config.hidden_dim, config.out_dim)
        self.key_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(config.queue, config.out_dim), dim=1))  # [K, E]
        self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))  # row of the queue that is replaced next

    def queries(self, tokens: Tensor) -> Tensor:
        """float32 [..., E] of unit length, from student tokens [..., C]."""
        return F.normalize(self.predictor(self.projector(tokens)).float(), dim=-1)

    @torch.no_grad()
    def keys(self, tokens: Tensor) -> Tensor:
        """float32 [..., E], not normalised, from teacher tokens [..., C]."""
        return self.key_projector(tokens).float()

    def loss(self, queries: Tensor, keys: Tensor) -> Tensor:
        """InfoNCE, mean over all queries: each with its own key against the whole queue; both [..., E] of unit length."""
        with torch.autocast(queries.device.type, enabled=False):  # a temperature of .2 makes much of bfloat16's rounding
            positive = (queries * keys).sum(-1, keepdim=True)
            logits = torch.cat([positive, queries @ self.queue.T], dim=-1) / self.temperature  # [..., 1+K]
            return (logits.logsumexp(-1) - logits[..., 0]).mean()

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Put keys [n, E] of unit length in the place of the oldest."""
        rows = (self.oldest + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[rows] = keys
        self.oldest.copy_((self.oldest + len(keys)) % len(self.queue))

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Move the key projector towards the projector."""
        for key, query in zip(self.key_projector.parameters(), self.projector.parameters(), strict=True):
            key.lerp_(query, 1 - momentum)


class Contrast(Objective):
    """InfoNCE of hidden patches and of the whole image: student tokens as queries, the teacher's final norm as keys.

    The patch loss is a mean over the hidden patches of all crops; its queue takes one key a crop, the mean over all patches,
    at unit length again. The image loss starts from the mean over patches. Without knowledge each costs ln(1 + K).

    Statistics of batch norm are those of a micro-batch over all processes, which are neighbouring rows however many processes
    share them: only the number of micro-batches makes a difference, and is part of the run (micro_batches.takes_statistics).
    Queues and key projectors move on once a step.
    """

    needs = Needs(layers=(-1,), hidden_tokens=True)

    def __init__(self, config: ContrastConfig, backbone: BackboneConfig, teachers: Teachers):
        super().__init__()
        teacher = require_teacher_with_head(config, backbone, teachers)
        if teacher.dim != backbone.dim:
            raise ConfigError(
                f"{config.name}: the key projector is an average of the student's projector, so both must be equally wide; the "
                f"student is {backbone.dim} wide, the teacher {teacher.name} {teacher.dim}. Use a student of its size."
            )
        if backbone.hidden != "mask-token":
            raise ConfigError(f"{config.name} compares hidden patches: use backbone.hidden=mask-token (a ViT) or a Swin.")
        self.teacher = config.teacher
        self.momentum = config.momentum
        self.weights = {"patch": config.patch_weight, "image": config.image_weight}
        self.patch, self.image = Branch(backbone.dim, config), Branch(backbone.dim, config)
        self._latest: tuple[Tensor, Tensor] | None = None
        self._waiting: list[tuple[Tensor, Tensor]] = []
        """Keys of this step's crops, on their way into the queues."""

    def forward(self, encoded: Encoded, batch: Batch, mask: Mask) -> tuple[Tensor, dict[str, Tensor]]:
        targets = batch.targets[self.teacher]
        teacher = final_norm(targets.patches(-1), targets.head)  # [B, N, C]

        patch_keys = self.patch.keys(teacher)  # [B, N, E]
        hidden_keys = F.normalize(take(patch_keys, mask.drop), dim=-1)  # [B, M, E]
        queries = take(self.patch.queries(encoded.patches), mask.drop)
        image_keys = F.normalize(self.image.keys(teacher.mean(1)), dim=-1)  # [B, E]
        image_queries = self.image.queries(encoded.patches.mean(1))

        parts = {"patch": self.patch.loss(queries, hidden_keys), "image": self.image.loss(image_queries, image_keys)}
        self._latest = (F.normalize(patch_keys.mean(1), dim=-1), image_keys)
        return sum(self.weights[name] * part for name, part in parts.items()), parts

    def after_batch(self) -> None:
        self._waiting.append(self._latest)

    def after_step(self, step: int, total_steps: int) -> None:
        """Enqueue the keys of the whole step, and let the key projectors follow: momentum rises to 1 by half a cosine."""
        for branch, keys in zip((self.patch, self.image), zip(*self._waiting, strict=True), strict=True):
            in_order = gathered(torch.stack(keys)).unflatten(0, (world_size(), -1)).transpose(0, 1)  # as one process has them
            branch.enqueue(in_order.flatten(0, 2))
            branch.follow(1 - (1 - self.momentum) * (math.cos(math.pi * step / total_steps) + 1) / 2)
        self._waiting.clear()
