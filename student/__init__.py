"""Learn a vision transformer from masked images and a teacher's targets, handed in as batches from any source."""

from .backbone import Backbone, Encoded
from .batch import Batch, BatchSource, Needs, Targets, TeacherHead, TeacherShape
from .config import (
    AlignConfig,
    BackboneConfig,
    MaskConfig,
    MimicConfig,
    OptimConfig,
    ReconstructConfig,
    TrainConfig,
    with_overrides,
)
from .errors import ConfigError, NonFiniteLossError, RunError, StudentError
from .model import Student

__all__ = [
    "AlignConfig",
    "Backbone",
    "BackboneConfig",
    "Batch",
    "BatchSource",
    "ConfigError",
    "Encoded",
    "MaskConfig",
    "MimicConfig",
    "Needs",
    "NonFiniteLossError",
    "OptimConfig",
    "ReconstructConfig",
    "RunError",
    "Student",
    "StudentError",
    "Targets",
    "TeacherHead",
    "TeacherShape",
    "TrainConfig",
    "with_overrides",
]
