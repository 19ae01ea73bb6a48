"""A run: the sections of the configuration put together, and how it is optimised."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..errors import ConfigError
from .backbones import BackboneConfig, ViTConfig
from .masks import MaskConfig
from .objectives import ObjectiveConfig, ReconstructConfig
from .section import Section, completed, from_json, later_values, leaf_hints, parse, require, to_json


@dataclass(frozen=True)
class OptimConfig(Section):
    """AdamW with a linear warm-up and half a cosine down to `min_lr`, both per step."""

    base_lr: float = 1.5e-4
    """Peak learning rate: for 256 crops a step if `lr_per_256`, else as it stands."""
    lr_per_256: bool = True
    """Whether `base_lr` is multiplied by batch_size / 256."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    warmup_epochs: float = 20.0
    warmup_start: float = 0.0
    """Learning rate of the first step of the warm-up, absolute."""
    min_lr: float = 0.0
    """Learning rate at the end, absolute."""
    clip_grad: float | None = None
    """Largest norm of the whole gradient; None: not clipped."""
    schedule: Literal["mae", "simmim", "beit"] = "mae"
    """Whose law between these rates: see run/rates.py. MAE's, SimMIM's, or BEiT's, which CAE took over."""
    ema: float | None = None
    """Decay a step of an exponential moving average of the weights, kept beside them; None: none is kept."""

    def validate(self):
        require(self.base_lr > 0, f"optim.base_lr must be positive, not {self.base_lr}.")
        require(all(0 <= beta < 1 for beta in self.betas), f"optim.betas must be in 0..1, not {self.betas}.")
        for name in ("weight_decay", "warmup_epochs", "warmup_start", "min_lr"):
            require(getattr(self, name) >= 0, f"optim.{name} must not be negative: {getattr(self, name)}.")
        require(self.clip_grad is None or self.clip_grad > 0, f"optim.clip_grad must be positive or none, not {self.clip_grad}.")
        require(self.ema is None or 0 < self.ema < 1, f"optim.ema must be in 0..1 or none, not {self.ema}.")

    def peak_lr(self, batch_size: int) -> float:
        """The learning rate at the end of the warm-up."""
        return self.base_lr * batch_size / 256 if self.lr_per_256 else self.base_lr


@dataclass(frozen=True)
class TrainConfig(Section):
    """One run: two equal configs on the same data give the same weights."""

    preset: str = "custom"
    """Name of the recipe this came from; says nothing the other fields do not."""
    teachers: tuple[str, ...] = ()
    """Names of the teachers whose targets are read; masks look at the first one's attention."""
    backbone: BackboneConfig = field(default_factory=ViTConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    objectives: tuple[ObjectiveConfig, ...] = field(default_factory=lambda: (ReconstructConfig(),))
    """The losses, each at most once; the total is their weighted sum."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    epochs: int = 200
    batch_size: int = 1024
    """Crops a step, over all devices and micro-batches."""
    accumulate: int = 1
    """Micro-batches a process takes in a step, unless the Trainer is given how many crops its device holds at once. Only where a
    loss takes statistics over them (contrast) does a run depend on it."""
    seed: int = 0
    """Of the initial weights, the order of the rows, the masks and drop path."""
    drops: Literal["rows", "micro-batches"] = "rows"
    """What drop path is a function of, with seed and step: the row of the batch, or the micro-batch (runs of before)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bfloat16 autocast on CUDA, float32 elsewhere."""

    def validate(self):
        require(self.preset.isprintable(), f"preset must be printable text, not {self.preset!r}.")
        require(all(map(str.isprintable, self.teachers)), f"teachers must be printable text, not {self.teachers!r}.")
        for name in ("epochs", "batch_size", "accumulate"):
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}.")
        require(0 <= self.seed < 2**63, f"seed must be in 0..2**63 - 1, not {self.seed}.")
        require(
            self.batch_size % self.accumulate == 0,
            f"batch_size={self.batch_size} cannot be cut into accumulate={self.accumulate} equal parts.",
        )
        names = [objective.name for objective in self.objectives]
        require(
            len(names) > 0 and len(names) == len(set(names)),
            f"objectives must name each loss once a teacher and at least one, not {names}.",
        )
        require(
            self.optim.warmup_epochs <= self.epochs,
            f"optim.warmup_epochs={self.optim.warmup_epochs} is more than epochs={self.epochs}.",
        )
        peak = self.optim.peak_lr(self.batch_size)
        for name in ("min_lr", "warmup_start"):
            rate = getattr(self.optim, name)
            too_high = f"optim.{name}={rate} is above the peak rate {peak:g}: give at most that, or raise optim.base_lr."
            require(rate <= peak, too_high)

        for objective in self.objectives:
            fits = objective.kind != "contrast" or objective.queue % self.batch_size == 0
            require(
                fits,
                f"{objective.kind}.queue must be a multiple of batch_size={self.batch_size}, so that keys leave it in order.",
            )
        self.mask.validate_with(self.backbone)
        hides_none = self.mask.n_keep(self.backbone) == self.backbone.n_patches
        for objective in self.objectives:
            needs_hidden = objective.kind in ("reconstruct", "contrast") or (
                objective.kind == "cosine" and objective.tokens[:2] == (0, 0)
            )
            require(
                not (hides_none and needs_hidden),
                f"mask.ratio={self.mask.ratio} hides no patch, and {objective.name} has nothing to do.",
            )

    def to_json(self) -> dict:
        """The config as JSON values; objectives carry their `kind`."""
        return to_json(self)

    @classmethod
    def from_json(cls, value: dict) -> TrainConfig:
        """The config that `to_json` gave, now or before some fields were there (ADDED_LATER).

        ConfigError on unknown or missing keys and on wrong values.
        """
        return from_json(cls.completed(value), cls, "config")

    @classmethod
    def completed(cls, value: dict) -> dict:
        """`value`, what `to_json` once gave or any other JSON, with what a record without a later field means by that."""
        return completed(value, cls)


def with_overrides(config: TrainConfig, overrides: Mapping[str, str]) -> TrainConfig:
    """`config` with some fields set from text: {"optim.base_lr": ...}-like dotted names, values typed by the field.

    Objectives are numbered: "objectives.0.weight". Tuples are comma-separated, None is "none", truth is "true" or
    "false". All are applied before the result is checked. ConfigError lists the valid names if one is unknown.
    """
    tree = config.to_json()
    hints = leaf_hints(config)
    for name, text in overrides.items():
        if name not in hints:
            raise ConfigError(f"There is no field {name!r}. Fields that can be set: {', '.join(hints)}.")
        node, leaf = _node_of(tree, name)
        node[leaf] = parse(text, hints[name], name)
    return TrainConfig.from_json(tree)


def as_overrides(config: TrainConfig) -> dict[str, str]:
    """Every field that `with_overrides` can set, with the text that sets it to what it is."""
    tree = config.to_json()
    texts = {}
    for name in leaf_hints(config):
        node, leaf = _node_of(tree, name)
        value = node[leaf]
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        texts[name] = text.lower() if value is None or isinstance(value, bool) else text
    return texts


def keeping(
    config: TrainConfig, record: dict, former: Mapping[str, object], given: Collection[str] = ()
) -> tuple[TrainConfig, list[str]]:
    """`config` with the settings of an older `record` that it would have had then, and their dotted names.

    Such a setting is on ADDED_LATER or in `former` (dotted name -> JSON value), the record has the value that stands there, and
    its name is not among those `given` by the user.
    record: what `to_json` once gave, or any other JSON; where it has no such key, nothing is kept.
    """
    there, here, kept = TrainConfig.completed(record), config.to_json(), []
    for name, value in [*later_values(config).items(), *former.items()]:
        if name in given:
            continue
        try:
            recorded = _value(there, name)
        except (KeyError, IndexError, TypeError, ValueError):
            continue
        if recorded == value != _value(here, name):
            node, leaf = _node_of(here, name)
            node[leaf] = value
            kept.append(name)
    return (TrainConfig.from_json(here) if kept else config), kept


def _value(tree: dict, name: str) -> object:
    node, leaf = _node_of(tree, name)
    return node[leaf]


def _node_of(tree: dict, name: str) -> tuple[dict, str]:
    """The object that a dotted name ends in, and its key there."""
    *parents, leaf = name.split(".")
    for parent in parents:
        tree = tree[int(parent)] if isinstance(tree, list) else tree[parent]
    return tree, leaf
