"""Everything a run is: frozen values, validated when built, `to_json` and `from_json`, no I/O.

A wrong value raises ConfigError wherever it came from: Python, a JSON file or a `--set` on the command line.
"""

from .backbones import BackboneConfig, MCMAEConfig, SwinConfig, ViTConfig
from .masks import MaskConfig
from .objectives import (
    AlignConfig,
    ContrastConfig,
    CosineConfig,
    MimicConfig,
    ObjectiveConfig,
    PredictorConfig,
    ReconstructConfig,
)
from .train import OptimConfig, TrainConfig, as_overrides, keeping, with_overrides

__all__ = [
    "AlignConfig",
    "BackboneConfig",
    "ContrastConfig",
    "CosineConfig",
    "MCMAEConfig",
    "MaskConfig",
    "MimicConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "PredictorConfig",
    "ReconstructConfig",
    "SwinConfig",
    "TrainConfig",
    "ViTConfig",
    "as_overrides",
    "keeping",
    "with_overrides",
]
