"""What a student can learn. An objective is a file here, a config class with its `kind`, and a line in OBJECTIVES."""

from __future__ import annotations

from ..batch import TeacherShape
from ..config import AlignConfig, BackboneConfig, MimicConfig, ObjectiveConfig, ReconstructConfig
from .align import Align
from .mimic import Mimic
from .objective import Objective
from .reconstruct import Reconstruct

OBJECTIVES = {
    MimicConfig: Mimic,
    AlignConfig: Align,
    ReconstructConfig: Reconstruct,
}


def build_objective(config: ObjectiveConfig, backbone: BackboneConfig, teacher: TeacherShape | None) -> Objective:
    """The objective a config describes; ConfigError if the teacher lacks what it needs."""
    return OBJECTIVES[type(config)](config, backbone, teacher)


__all__ = ["OBJECTIVES", "Align", "Mimic", "Objective", "Reconstruct", "build_objective"]
