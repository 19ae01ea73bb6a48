"""Everything a run is: frozen values, checked when built, `to_json` and `from_json`, no I/O.

A wrong value raises ConfigError wherever it came from: Python, a JSON file or a `--set` on the command line.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from .errors import ConfigError


class _Checked:
    """A config part: the types of its fields are checked when it is built, then `check` says the rest."""

    def __post_init__(self):
        for name, hint in typing.get_type_hints(type(self)).items():
            if typing.get_origin(hint) is ClassVar:
                continue
            value = getattr(self, name)
            if not _fits(value, hint):
                raise ConfigError(f"{type(self).__name__}.{name} must be {_words(hint)}, not {value!r}.")
        self.check()

    def check(self) -> None:
        """Raise ConfigError where values of the right type make no sense."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class BackboneConfig(_Checked):
    """A plain ViT with a CLS token and MAE's fixed positions; the defaults are ViT-B/16 at 224 pixels."""

    image_size: int = 224
    """Side of the square crop, pixels."""
    patch_size: int = 16
    """Side of a patch, pixels."""
    dim: int = 768
    """Width of the residual stream."""
    depth: int = 12
    """Number of blocks; block numbers count from 1."""
    heads: int = 12
    mlp_ratio: float = 4.0
    """Width of a block's hidden layer, in units of `dim`."""
    drop_path: float = 0.0
    """Probability of dropping the last block's branches; grows linearly from 0 at the first."""
    fuse_blocks: tuple[int, ...] = ()
    """Blocks whose outputs are summed before the final norm; empty: the last block alone."""

    def check(self):
        for name in ("image_size", "patch_size", "dim", "depth", "heads"):
            _require(getattr(self, name) > 0, f"backbone.{name} must be positive, not {getattr(self, name)}.")
        _require(
            self.image_size % self.patch_size == 0,
            f"backbone.image_size={self.image_size} is no multiple of patch_size={self.patch_size}.",
        )
        _require(self.dim % self.heads == 0, f"backbone.dim={self.dim} is no multiple of heads={self.heads}.")
        _require(self.dim % 4 == 0, f"backbone.dim={self.dim} must be a multiple of 4 for the position table.")
        _require(self.mlp_ratio > 0, f"backbone.mlp_ratio must be positive, not {self.mlp_ratio}.")
        _require(0 <= self.drop_path < 1, f"backbone.drop_path must be in 0..1, not {self.drop_path}.")
        fuse = self.fuse_blocks
        _require(
            list(fuse) == sorted(set(fuse)) and all(1 <= block <= self.depth for block in fuse),
            f"backbone.fuse_blocks must be ascending block numbers in 1..{self.depth}, not {fuse}.",
        )

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def n_patches(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class MaskConfig(_Checked):
    """Which patches the student sees."""

    kind: Literal["random", "attention", "attention-top"] = "random"
    """random: uniform. attention: drawn by the teacher's CLS attention. attention-top: always its most salient."""
    ratio: float = 0.75
    """Share of the patches that is hidden."""

    def check(self):
        _require(0 <= self.ratio < 1, f"mask.ratio must be in 0..1, below 1, not {self.ratio}.")

    def n_keep(self, n_patches: int) -> int:
        """Number of visible patches; in float arithmetic, as every MAE fork computes it (.70 of 196 keeps 58)."""
        return int(n_patches * (1 - self.ratio))


@dataclass(frozen=True)
class MimicConfig(_Checked):
    """MR-MAE's mimic loss: visible tokens through one Linear to the teacher's last block (P000:62-64)."""

    kind: ClassVar[str] = "mimic"
    weight: float = 1.0
    """Factor of this loss in the total."""

    def check(self):
        _require(self.weight > 0, f"{self.kind}.weight must be positive, not {self.weight}.")


@dataclass(frozen=True)
class AlignConfig(_Checked):
    """MaskAlign's dynamic alignment of all student blocks with the teacher's last `levels` blocks."""

    kind: ClassVar[str] = "align"
    weight: float = 1.0
    """Factor of this loss in the total."""
    levels: int = 5
    """K: number of teacher blocks, counted from the last."""

    def check(self):
        _require(self.weight > 0, f"{self.kind}.weight must be positive, not {self.weight}.")
        _require(self.levels > 0, f"{self.kind}.levels must be positive, not {self.levels}.")


@dataclass(frozen=True)
class ReconstructConfig(_Checked):
    """MAE's reconstruction of normalised pixels of the hidden patches by a small decoder."""

    kind: ClassVar[str] = "reconstruct"
    weight: float = 1.0
    """Factor of this loss in the total."""
    dim: int = 512
    """Width of the decoder."""
    depth: int = 8
    """Blocks of the decoder."""
    heads: int = 16
    mlp_ratio: float = 4.0

    def check(self):
        _require(self.weight > 0, f"{self.kind}.weight must be positive, not {self.weight}.")
        for name in ("dim", "depth", "heads", "mlp_ratio"):
            _require(getattr(self, name) > 0, f"{self.kind}.{name} must be positive, not {getattr(self, name)}.")
        _require(self.dim % self.heads == 0, f"{self.kind}.dim={self.dim} is no multiple of heads={self.heads}.")
        _require(self.dim % 4 == 0, f"{self.kind}.dim={self.dim} must be a multiple of 4 for the position table.")


ObjectiveConfig = MimicConfig | AlignConfig | ReconstructConfig
OBJECTIVE_KINDS = {cls.kind: cls for cls in typing.get_args(ObjectiveConfig)}


@dataclass(frozen=True)
class OptimConfig(_Checked):
    """AdamW with linear warm-up from 0 and half a cosine down to `min_lr`, both per step."""

    base_lr: float = 1.5e-4
    """Peak learning rate: for 256 crops a step if `lr_per_256`, else as it stands."""
    lr_per_256: bool = True
    """Whether `base_lr` is multiplied by batch_size / 256."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    warmup_epochs: float = 20.0
    min_lr: float = 0.0
    """Learning rate at the end, absolute."""
    clip_grad: float | None = None
    """Largest norm of the whole gradient; None: not clipped."""

    def check(self):
        _require(self.base_lr > 0, f"optim.base_lr must be positive, not {self.base_lr}.")
        _require(all(0 <= beta < 1 for beta in self.betas), f"optim.betas must be in 0..1, not {self.betas}.")
        for name in ("weight_decay", "warmup_epochs", "min_lr"):
            _require(getattr(self, name) >= 0, f"optim.{name} must not be negative: {getattr(self, name)}.")
        _require(self.clip_grad is None or self.clip_grad > 0, f"optim.clip_grad must be positive or none, not {self.clip_grad}.")

    def peak_lr(self, batch_size: int) -> float:
        """The learning rate at the end of the warm-up."""
        return self.base_lr * batch_size / 256 if self.lr_per_256 else self.base_lr


@dataclass(frozen=True)
class TrainConfig(_Checked):
    """One run: two equal configs on the same data give the same weights."""

    preset: str = "custom"
    """Name of the recipe this came from; says nothing the other fields do not."""
    teacher: str | None = None
    """Name of the teacher whose targets are read; for the record, the data source knows better."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    objectives: tuple[ObjectiveConfig, ...] = field(default_factory=lambda: (ReconstructConfig(),))
    """The losses, each at most once; the total is their weighted sum."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    epochs: int = 200
    batch_size: int = 1024
    """Crops a step, over all devices and micro-batches."""
    accumulate: int = 1
    """Micro-batches a step: the memory of batch_size / accumulate crops, the gradient of batch_size."""
    seed: int = 0
    """Of the initial weights, the order of the rows, the masks and drop path."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bfloat16 autocast on CUDA, float32 elsewhere."""

    def check(self):
        for name in ("epochs", "batch_size", "accumulate"):
            _require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}.")
        _require(0 <= self.seed < 2**63, f"seed must be in 0..2**63 - 1, not {self.seed}.")
        _require(
            self.batch_size % self.accumulate == 0,
            f"batch_size={self.batch_size} cannot be cut into accumulate={self.accumulate} equal parts.",
        )
        kinds = [objective.kind for objective in self.objectives]
        _require(
            len(kinds) > 0 and len(kinds) == len(set(kinds)),
            f"objectives must name each loss once and at least one, not {kinds}.",
        )
        _require(
            self.optim.warmup_epochs <= self.epochs,
            f"optim.warmup_epochs={self.optim.warmup_epochs} is more than epochs={self.epochs}.",
        )
        peak = self.optim.peak_lr(self.batch_size)
        _require(self.optim.min_lr <= peak, f"optim.min_lr={self.optim.min_lr} is above the peak rate {peak}.")

        n_keep = self.mask.n_keep(self.backbone.n_patches)
        _require(n_keep > 0, f"mask.ratio={self.mask.ratio} hides all {self.backbone.n_patches} patches.")
        _require(
            "reconstruct" not in kinds or n_keep < self.backbone.n_patches,
            f"mask.ratio={self.mask.ratio} hides no patch, and reconstruct has nothing to do.",
        )

    def to_json(self) -> dict:
        """The config as JSON values; objectives carry their `kind`."""
        return _to_json(self)

    @classmethod
    def from_json(cls, value: dict) -> TrainConfig:
        """The config that `to_json` gave; ConfigError on unknown or missing keys and on wrong values."""
        return _from_json(value, cls, "config")


def with_overrides(config: TrainConfig, overrides: Mapping[str, str]) -> TrainConfig:
    """`config` with some fields set from text: {"optim.lr": ...}-like dotted names, values typed by the field.

    Objectives are numbered: "objectives.0.weight". Tuples are comma-separated, None is "none", truth is "true" or
    "false". All are applied before the result is checked. ConfigError lists the valid names if one is unknown.
    """
    tree = config.to_json()
    hints = _leaf_hints(config)
    for name, text in overrides.items():
        if name not in hints:
            raise ConfigError(f"There is no field {name!r}. Fields that can be set: {', '.join(hints)}.")
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node[int(parent)] if isinstance(node, list) else node[parent]
        node[leaf] = _parse(text, hints[name], name)
    return TrainConfig.from_json(tree)


# --- JSON ---------------------------------------------------------------------------------------------------------


def _to_json(value):
    if dataclasses.is_dataclass(value):
        kind = {"kind": value.kind} if isinstance(value, ObjectiveConfig) else {}
        return kind | {part.name: _to_json(getattr(value, part.name)) for part in dataclasses.fields(value)}
    return [_to_json(item) for item in value] if isinstance(value, tuple) else value


def _from_json(value, hint, where: str):
    """Rebuild what `hint` describes; the types of plain values are checked by the part they end up in."""
    if hint == ObjectiveConfig:
        kind = value.get("kind") if isinstance(value, dict) else None
        if kind not in OBJECTIVE_KINDS:
            raise ConfigError(f"{where}.kind must be one of {', '.join(OBJECTIVE_KINDS)}, not {kind!r}.")
        return _from_json({key: item for key, item in value.items() if key != "kind"}, OBJECTIVE_KINDS[kind], where)

    if dataclasses.is_dataclass(hint):
        names = [part.name for part in dataclasses.fields(hint)]
        if not isinstance(value, dict) or set(value) != set(names):
            given = sorted(value) if isinstance(value, dict) else repr(value)
            raise ConfigError(f"{where} must have exactly the keys {', '.join(names)}; given: {given}.")
        hints = typing.get_type_hints(hint)
        return hint(**{name: _from_json(value[name], hints[name], f"{where}.{name}") for name in names})

    if typing.get_origin(hint) is tuple and isinstance(value, list):
        item_hint = typing.get_args(hint)[0]
        return tuple(_from_json(item, item_hint, f"{where}.{index}") for index, item in enumerate(value))
    return value


# --- types of fields ----------------------------------------------------------------------------------------------


def _fits(value, hint) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        hints = [args[0]] * len(value) if args[-1] is Ellipsis and isinstance(value, tuple) else args
        return isinstance(value, tuple) and len(value) == len(hints) and all(map(_fits, value, hints))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _words(hint) -> str:
    """What a field wants, for an error message."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_words, args))
    if origin is Literal:
        return "one of " + ", ".join(args)
    if origin is tuple:
        return f"numbers like 1,2,3 (each {_words(args[0])})" if args[-1] is Ellipsis else f"{len(args)} numbers"
    plain = {int: "an integer", float: "a finite number", bool: "true or false", str: "text", type(None): "none"}
    return plain.get(hint, f"a {getattr(hint, '__name__', hint)}")


def _parse(text: str, hint, name: str):
    """The JSON value that `text` means for a field of type `hint`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # only "X | None" occurs
        inner = next(arg for arg in args if arg is not type(None))
        return None if text.lower() == "none" else _parse(text, inner, name)
    if origin is tuple:
        return [_parse(item.strip(), args[0], name) for item in text.split(",")] if text.strip() else []
    if hint is str or origin is Literal:
        return text
    try:
        return {"true": True, "false": False}[text.lower()] if hint is bool else hint(text)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{name}={text} must be {_words(hint)}.") from error


def _leaf_hints(part, prefix: str = "") -> dict[str, object]:
    """Dotted name -> type of every field that holds a plain value."""
    hints = {}
    for name, hint in typing.get_type_hints(type(part)).items():
        if typing.get_origin(hint) is ClassVar:
            continue
        value = getattr(part, name)
        if dataclasses.is_dataclass(value):
            hints |= _leaf_hints(value, f"{prefix}{name}.")
        elif hint == tuple[ObjectiveConfig, ...]:
            for index, objective in enumerate(value):
                hints |= _leaf_hints(objective, f"{prefix}{name}.{index}.")
        else:
            hints[prefix + name] = hint
    return hints
