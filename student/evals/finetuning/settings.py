"""What a fine-tuning is, and what the papers set: RECIPES by method and size, each with its source."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from ...errors import ConfigError
from ..schedule import rate_at


@dataclass(frozen=True)
class FineTune:
    """AdamW (.9, .999), half a cosine for each step, augmentation as MAE and BEiT have it; the defaults are MAE's of ViT-B."""

    base_rate: float = 5e-4
    """Learning rate for a batch of 256."""
    layer_decay: float = 0.65
    drop_path: float = 0.1
    epochs: int = 100
    warmup_epochs: float = 5
    batch_size: int = 1024
    """Over all processes."""
    weight_decay: float = 0.05
    min_rate: float = 1e-6
    magnitude: int = 9
    """Of RandAugment, in 0..10, with a deviation of .5; 0 is none."""
    smoothing: float = 0.1
    """Of the labels."""
    mixup: float = 0.8
    cutmix: float = 1.0
    """Alphas of the beta distributions, 0 is none; of both, each batch has one or the other."""
    erasing: float = 0.25
    """Probability of erasing a box of an image."""
    readout: str = "mean"
    """mean: of the patches, behind a norm of its own in the place of the final norm; cls: the CLS token behind the final norm."""

    def __post_init__(self):
        for name in ("base_rate", "layer_decay", "epochs", "batch_size"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}.")
        for name in ("drop_path", "smoothing", "erasing"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in 0..1, not {getattr(self, name)}.")
        for name in ("warmup_epochs", "weight_decay", "min_rate", "mixup", "cutmix", "magnitude"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be 0 or above, not {getattr(self, name)}.")
        if self.layer_decay > 1:
            raise ConfigError(f"layer_decay must be at most 1, not {self.layer_decay}.")
        if self.warmup_epochs >= self.epochs:
            raise ConfigError(f"warmup_epochs={self.warmup_epochs:g} do not fit into epochs={self.epochs}: give more epochs.")
        if self.readout not in ("mean", "cls"):
            raise ConfigError(f"readout must be mean or cls, not {self.readout!r}.")

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def rate_at(self, epoch: float, batch_size: int) -> float:
        """The learning rate at a moment, in epochs, for batches of so many images."""
        return rate_at(epoch, self.base_rate * batch_size / 256, self.epochs, self.warmup_epochs, self.min_rate)

    def with_overrides(self, changes: dict[str, str]) -> FineTune:
        """These settings with some changed, given as text. Raises ConfigError for unknown names and values that cannot be."""
        kinds, values = {field.name: type(getattr(self, field.name)) for field in dataclasses.fields(self)}, {}
        for name, text in changes.items():
            if name not in kinds:
                raise ConfigError(f"--set {name}: fine-tuning has no such setting. There are {', '.join(kinds)}.")
            kind = float if name == "warmup_epochs" else kinds[name]
            try:
                values[name] = kind(text)
            except ValueError as error:
                raise ConfigError(f"--set {name}={text}: give a value as {getattr(self, name)!r}.") from error
        return dataclasses.replace(self, **values)


@dataclass(frozen=True)
class Recipe:
    settings: FineTune
    source: str


_IBOT = {"base_rate": 1e-3, "warmup_epochs": 20, "readout": "cls"}
RECIPES: dict[str, Recipe] = {
    "mae-b": Recipe(FineTune(), "MAE, FINETUNE.md"),
    "mae-l": Recipe(FineTune(1e-3, 0.75, 0.2, 50), "MAE, FINETUNE.md"),
    "mr-mae-b": Recipe(FineTune(3e-4, 0.6, 0.2), "MR-MAE, section 4.1 (its 3e-4 read as a base rate, as MaskAlign's)"),
    "mr-mcmae": Recipe(FineTune(3e-4, 0.6, 0.2), "MR-MAE, section 4.1 (its 3e-4 read as a base rate, as MaskAlign's)"),
    "maskalign-b": Recipe(FineTune(3e-4, 0.55, 0.2), "MaskAlign, README (the paper has a layer decay of .6)"),
    "maskalign-l": Recipe(FineTune(3e-4, 0.75, 0.4, 50), "MaskAlign, README"),
    "milan-b": Recipe(FineTune(1e-4, 0.65, 0.1), "MILAN, appendix and FINETUNE.sh"),
    "milan-l": Recipe(FineTune(1e-4, 0.75, 0.2), "MILAN, appendix and FINETUNE.sh"),
    "cae-v2-ti": Recipe(
        FineTune(5e-4, 0.75, 0.0, 100, magnitude=10, smoothing=0.0, mixup=0.2, cutmix=0.0),
        "CAE v2, appendix (without its jitter)",
    ),
    "cae-v2-s": Recipe(FineTune(1.25e-4, 0.8, 0.1, 200), "CAE v2, appendix (without relative positions)"),
    "cae-v2-b": Recipe(FineTune(5e-5, 0.75, 0.1, 100), "CAE v2, appendix (without relative positions)"),
    "cae-v2-l": Recipe(FineTune(1e-4, 0.8, 0.2, 50), "CAE v2, appendix (without relative positions)"),
    "mimco-s": Recipe(FineTune(layer_decay=0.75, drop_path=0.1, epochs=300, **_IBOT), "MimCo, section 4.1, and iBOT's defaults"),
    "mimco-b": Recipe(FineTune(layer_decay=0.65, drop_path=0.1, epochs=100, **_IBOT), "MimCo, section 4.1, and iBOT's defaults"),
    "mimco-swin-t": Recipe(
        FineTune(layer_decay=0.75, drop_path=0.1, epochs=100, **{**_IBOT, "readout": "mean"}),
        "MimCo, section 4.1, and iBOT's defaults",
    ),
    "mimco-swin-b": Recipe(
        FineTune(layer_decay=0.75, drop_path=0.2, epochs=100, **{**_IBOT, "readout": "mean"}),
        "MimCo, section 4.1, and iBOT's defaults",
    ),
}
"""The beginning of a preset's name -> what its paper fine-tunes with."""


def recipe_of(preset: str) -> str | None:
    """The name in RECIPES that a preset's name begins with, the longest; None if there is none."""
    return max((name for name in RECIPES if preset.startswith(name)), key=len, default=None)
