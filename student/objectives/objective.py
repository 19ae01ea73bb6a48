"""What every objective is, and the checks of a teacher they share."""

from __future__ import annotations

from torch import Tensor, nn

from ..backbone import Encoded
from ..batch import Batch, Needs, TeacherShape
from ..config import BackboneConfig
from ..errors import ConfigError
from ..masking import Mask


class Objective(nn.Module):
    """A loss together with the heads and predictors it trains; says in `needs` what it reads of the teacher."""

    needs: Needs
    no_decay: frozenset[str] = frozenset()
    """Names of own parameters with more than one axis that weight decay spares."""

    def forward(self, encoded: Encoded, batch: Batch, mask: Mask) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a float32 scalar without its weight, and further scalars worth logging."""
        raise NotImplementedError


def require_teacher(kind: str, backbone: BackboneConfig, teacher: TeacherShape | None) -> TeacherShape:
    """The teacher, if there is one and it looks at the student's patches; else ConfigError."""
    if teacher is None:
        raise ConfigError(
            f"The objective {kind} learns from a teacher's tokens, and this run has no teacher. "
            f"Train from a cache, or use the objective reconstruct alone."
        )
    if teacher.grid != backbone.grid:
        raise ConfigError(
            f"The objective {kind} compares patch by patch: the student has {backbone.grid} patches "
            f"({backbone.image_size} pixels in patches of {backbone.patch_size}), the teacher "
            f"{teacher.name} has {teacher.grid}. Choose backbone.image_size and backbone.patch_size "
            f"to match, or another teacher."
        )
    return teacher
