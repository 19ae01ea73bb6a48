"""What every objective is, and the checks of a teacher they share."""

from __future__ import annotations

from torch import Tensor, nn

from ...batch import Batch, Mask, Needs, TeacherShape
from ...config import BackboneConfig, ObjectiveConfig
from ...errors import ConfigError
from ..backbones import Encoded

Teachers = tuple[TeacherShape, ...]


class Objective(nn.Module):
    """A loss together with the heads and predictors it trains; says in `needs` what it reads of its teacher.

    Built by `Subclass(config, backbone, teachers)`. Sums over the tokens of one crop may only meet those of other crops as a
    plain mean, unless the class says otherwise (Contrast): then gradient accumulation equals the large batch.
    """

    needs: Needs
    teacher: int | None
    """Which of the run's teachers it reads, counted from 0; None: it reads none."""
    reads_final_norm = True
    """Whether it looks at `Encoded.tokens`; if none of a student's objectives does, what leads there is not trained."""
    no_decay: frozenset[str] = frozenset()
    """Names of own parameters with more than one axis that weight decay spares."""

    def forward(self, encoded: Encoded, batch: Batch, mask: Mask) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a float32 scalar without its weight, and further scalars worth logging."""
        raise NotImplementedError

    def after_batch(self) -> None:
        """What has to follow the backward pass of a micro-batch. Most have nothing to do."""

    def after_step(self, step: int, total_steps: int) -> None:
        """What has to follow an update of the weights; `step` of `total_steps` is done. Most have nothing to do."""


def require_teacher(config: ObjectiveConfig, backbone: BackboneConfig, teachers: Teachers) -> TeacherShape:
    """The teacher an objective reads, if it is there and looks at the student's patches; else ConfigError."""
    if config.teacher >= len(teachers):
        there = f"has {len(teachers)}: {', '.join(teacher.name for teacher in teachers)}" if teachers else "has none"
        raise ConfigError(
            f"The objective {config.name} learns from the tokens of teacher {config.teacher + 1}, and this run {there}. "
            f"Train from a cache that has it, or use the objective reconstruct alone."
        )
    teacher = teachers[config.teacher]
    if teacher.grid != backbone.grid:
        raise ConfigError(
            f"The objective {config.name} compares patch by patch: the student has {backbone.grid[0]} x {backbone.grid[1]} "
            f"patches ({backbone.image_size} pixels, {backbone.stride} a patch), the teacher {teacher.name} has "
            f"{teacher.grid[0]} x {teacher.grid[1]}. {teacher.how_to_meet(backbone)}"
        )
    return teacher


def require_teacher_with_head(config: ObjectiveConfig, backbone: BackboneConfig, teachers: Teachers) -> TeacherShape:
    """As `require_teacher`, and ConfigError for a teacher without the final norm that the objective compares with."""
    teacher = require_teacher(config, backbone, teachers)
    if not teacher.has_final_norm:
        raise ConfigError(
            f"The objective {config.name} learns from the output of the teacher's final norm, and {teacher.name} has none "
            "(`head` is none in its store). The objectives align, mimic and reconstruct.mimic learn from its block outputs as "
            f"they are stored; {config.name} needs a store that teacher-cache inspect does not mark `no final norm`."
        )
    return teacher
