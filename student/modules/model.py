"""The student as one module: a masker, a backbone and the objectives that train it."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn

from ..batch import Batch, Mask, Needs
from ..config import TrainConfig
from ..errors import ConfigError
from ..masking import MasksAhead, ScoreMasker, build_masker
from .backbones import build_backbone
from .drop_path import DropPaths, draw_drops
from .objectives import build_objective
from .objectives.objective import Teachers

# B batch, N patches


class Student(nn.Module):
    """What `config` describes, for teachers of these shapes; the initial weights are a function of `config.seed`.

    needs: what it wants read of each teacher, in order.  n_patches: N, the width of the noise `draw_mask` takes.
    Raises ConfigError if a teacher lacks what the objectives or the masker need.
    """

    def __init__(self, config: TrainConfig, teachers: Teachers = ()):
        super().__init__()
        self.masker = build_masker(config.mask, config.backbone, teachers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.backbone = build_backbone(config.backbone)
            self.objectives = nn.ModuleDict(
                {objective.name: build_objective(objective, config.backbone, teachers) for objective in config.objectives}
            )
        if not any(objective.reads_final_norm for objective in self.objectives.values()):
            for name in self.backbone.behind_blocks:
                getattr(self.backbone, name).requires_grad_(False)
        self._drop_paths = DropPaths(self)
        self.weights = {objective.name: objective.weight for objective in config.objectives}
        self.n_patches = config.backbone.n_patches

        wanted = [(0, self.masker.needs), *((objective.teacher, objective.needs) for objective in self.objectives.values())]
        self.needs: tuple[Needs, ...] = tuple(
            reduce(Needs.__or__, (needs for teacher, needs in wanted if teacher == number), Needs())
            for number in range(len(teachers))
        )
        _require_stored_tokens(self.objectives, teachers)

    def draw_mask(self, batch: Batch, noise: Tensor) -> Mask:
        """Which patches are visible in each crop; noise: float32 [B, N] in (0, 1), see `masking.draw_noise`."""
        return self.masker(batch, noise)

    def masks_ahead(self, config: TrainConfig) -> MasksAhead | None:
        """For a source that may draw the masks of a run itself; None where they depend on more than noise and attention."""
        if not isinstance(self.masker, ScoreMasker):
            return None
        return MasksAhead(self.masker, config.seed, self.n_patches)

    def draw_drops(self, seed: int, step: int, n_rows: int, pinned: bool = False) -> Tensor | None:
        """For `forward`, of all `n_rows` crops of a step: see `drop_path.draw_drops`. None if this student drops no branch."""
        rates = self._drop_paths.rates
        return draw_drops(seed, step, n_rows, rates, pinned) if rates else None

    def forward(self, batch: Batch, mask: Mask, drops: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss, a float32 scalar, and its parts by name, detached and without their weights.

        drops: of these crops, float32 [B, S] from `draw_drops`. None: branches are dropped as torch's generator says.
        """
        self._drop_paths.set(drops)
        encoded = self.backbone(batch.images, mask)

        total = 0.0
        parts = {}
        for name, objective in self.objectives.items():
            loss, details = objective(encoded, batch, mask)
            total = total + self.weights[name] * loss
            parts[name] = loss.detach()
            parts |= {f"{name}/{detail}": value.detach() for detail, value in details.items()}
        self._drop_paths.set(None)
        return total, parts

    def after_batch(self) -> None:
        """To be called after the backward pass of each micro-batch."""
        for objective in self.objectives.values():
            objective.after_batch()

    def after_step(self, step: int, total_steps: int) -> None:
        """To be called after each update of the weights; `step` of `total_steps` is done."""
        for objective in self.objectives.values():
            objective.after_step(step, total_steps)


def _require_stored_tokens(objectives: nn.ModuleDict, teachers: Teachers) -> None:
    """Raise ConfigError if an objective reads tokens of hidden patches, or by another mask, where visible ones are stored."""
    for name, objective in objectives.items():
        teacher = None if objective.teacher is None else teachers[objective.teacher]
        if teacher is None or teacher.n_visible is None:
            continue
        stored = f"the store of {teacher.name} keeps those of {teacher.n_visible} visible patches only"
        if objective.needs.hidden_tokens:
            raise ConfigError(
                f"The objective {name} learns from the tokens of hidden patches too, and {stored}. Use a store of all tokens "
                "(teacher-cache extract --tokens all), or an objective on visible patches: align, mimic."
            )
        if objective.teacher > 0:
            raise ConfigError(
                f"The objective {name} reads teacher {objective.teacher + 1}; {stored}, and the mask is drawn by the first. "
                "Use a store of all its tokens (teacher-cache extract --tokens all)."
            )
