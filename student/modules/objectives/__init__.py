"""What a student can learn. An objective is a file here, a config class with its `kind`, and a line in OBJECTIVES."""

from __future__ import annotations

from ...config import AlignConfig, BackboneConfig, ContrastConfig, CosineConfig, MimicConfig, ObjectiveConfig, ReconstructConfig
from ...errors import ConfigError
from .align import Align
from .contrast import Contrast
from .cosine import Cosine
from .mimic import Mimic
from .objective import Objective, Teachers
from .reconstruct import Reconstruct

OBJECTIVES = {
    MimicConfig: Mimic,
    AlignConfig: Align,
    ReconstructConfig: Reconstruct,
    CosineConfig: Cosine,
    ContrastConfig: Contrast,
}

WITHOUT_MASK_TOKENS = (Mimic, Align, Reconstruct, Cosine)
"""Objectives for encoders that hidden patches never enter."""


def build_objective(config: ObjectiveConfig, backbone: BackboneConfig, teachers: Teachers) -> Objective:
    """The objective a config describes; ConfigError if its teacher is missing or lacks what it needs, or the backbone does."""
    objective = OBJECTIVES[type(config)]
    if backbone.hidden == "mask-token" and objective in WITHOUT_MASK_TOKENS:
        raise ConfigError(
            f"The objective {config.name} is for encoders that see visible patches only; this {backbone.kind} sees a mask token "
            f"in place of each hidden one. Use a backbone that drops them (vit with hidden=dropped, or mcmae), or the objective "
            f"contrast."
        )
    return objective(config, backbone, teachers)


__all__ = ["OBJECTIVES", "Align", "Contrast", "Cosine", "Mimic", "Objective", "Reconstruct", "build_objective"]
