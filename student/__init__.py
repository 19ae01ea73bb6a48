"""Learn a vision transformer from masked images and a teacher's targets, handed in as batches from any source.

    config = TrainConfig(...)                        what to train; values only
    student = Student(config, (TeacherShape(...),))  its modules; `student.needs` says what a source must read
    Trainer(config, student, source, out_dir).fit()  the run, or the rest of it
    backbone, config = load_backbone(checkpoint)     what came out, in timm's own format

The names below are imported when first used: torch and timm take seconds, and a config needs neither.
"""

import importlib

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


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
