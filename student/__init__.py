"""Learn a vision transformer from masked images and a teacher's targets, handed in as batches from any source.

    config = TrainConfig(...)                        what to train; values only
    student = Student(config, (TeacherShape(...),))  its modules; `student.needs` says what a source must read
    Trainer(config, student, source, out_dir).fit()  the run, or the rest of it
    backbone, config = load_backbone(checkpoint)     what came out, in timm's own format

The names below are imported when first used: torch and timm take seconds, and a config needs neither.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what `__getattr__` gives, for type checkers
    from .batch import Batch as Batch
    from .batch import BatchSource as BatchSource
    from .batch import Needs as Needs
    from .batch import Targets as Targets
    from .batch import TeacherHead as TeacherHead
    from .batch import TeacherShape as TeacherShape
    from .config import AlignConfig as AlignConfig
    from .config import BackboneConfig as BackboneConfig
    from .config import ContrastConfig as ContrastConfig
    from .config import CosineConfig as CosineConfig
    from .config import MaskConfig as MaskConfig
    from .config import MCMAEConfig as MCMAEConfig
    from .config import MimicConfig as MimicConfig
    from .config import OptimConfig as OptimConfig
    from .config import PredictorConfig as PredictorConfig
    from .config import ReconstructConfig as ReconstructConfig
    from .config import SwinConfig as SwinConfig
    from .config import TrainConfig as TrainConfig
    from .config import ViTConfig as ViTConfig
    from .config import with_overrides as with_overrides
    from .errors import ConfigError as ConfigError
    from .errors import NonFiniteLossError as NonFiniteLossError
    from .errors import RunError as RunError
    from .errors import RunMismatchError as RunMismatchError
    from .errors import StudentError as StudentError
    from .files.checkpoint import latest_checkpoint as latest_checkpoint
    from .files.checkpoint import load_backbone as load_backbone
    from .files.logs import StepReport as StepReport
    from .modules.backbones import Encoded as Encoded
    from .modules.backbones import ViT as ViT
    from .modules.model import Student as Student
    from .run.trainer import Trainer as Trainer

_HOMES = {
    "modules.backbones": ["Encoded", "ViT"],
    "batch": ["Batch", "BatchSource", "Needs", "Targets", "TeacherHead", "TeacherShape"],
    "files.checkpoint": ["latest_checkpoint", "load_backbone"],
    "config": [
        "AlignConfig",
        "BackboneConfig",
        "ContrastConfig",
        "CosineConfig",
        "MCMAEConfig",
        "MaskConfig",
        "MimicConfig",
        "OptimConfig",
        "PredictorConfig",
        "ReconstructConfig",
        "SwinConfig",
        "TrainConfig",
        "ViTConfig",
        "with_overrides",
    ],
    "errors": ["ConfigError", "NonFiniteLossError", "RunError", "RunMismatchError", "StudentError"],
    "files.logs": ["StepReport"],
    "modules.model": ["Student"],
    "run.trainer": ["Trainer"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)  # noqa: PLE0605  (a list, if not a literal one)


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
