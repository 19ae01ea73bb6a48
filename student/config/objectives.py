"""The losses a student can learn from, and the predictors that some of them train."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from .section import Section, require, require_positive


@dataclass(frozen=True)
class PredictorConfig(Section):
    """From visible tokens to a token for every patch; the defaults are MAE's decoder."""

    style: Literal["self", "prompting", "regressor"] = "self"
    """self: visible and mask tokens attend to all (MAE). prompting: mask tokens attend to frozen visible tokens, CLS and each
    other (MILAN). regressor: to visible tokens and each other, positions in every block (CAE v2)."""
    dim: int = 512
    """Width."""
    depth: int = 8
    """Blocks."""
    heads: int = 16
    mlp_ratio: float = 4.0
    layer_scale: float | None = None
    """As ViTConfig.layer_scale."""
    drop_path: float = 0.0
    """Probability of dropping the last block's branches; grows linearly from 0 at the first (CAE), so one block has none."""

    def validate(self):
        require(self.depth >= 0, f"predictor.depth must not be negative: {self.depth}.")
        require_positive(self, "predictor", "dim", "heads", "mlp_ratio")
        require(self.dim % self.heads == 0, f"predictor.dim={self.dim} is no multiple of heads={self.heads}.")
        require(self.dim % 4 == 0, f"predictor.dim={self.dim} must be a multiple of 4 for the position table.")
        require(self.layer_scale is None or self.layer_scale > 0, f"predictor.layer_scale must be positive: {self.layer_scale}.")
        require(0 <= self.drop_path < 1, f"predictor.drop_path must be in 0..1, not {self.drop_path}.")


@dataclass(frozen=True)
class _Objective(Section):
    weight: float = 1.0
    """Factor of this loss in the total."""
    teacher: int = 0
    """Which of the run's teachers, counted from 0."""

    @property
    def name(self) -> str:
        """`kind`, with the teacher's number where it is not the first."""
        return self.kind if self.teacher == 0 else f"{self.kind}-{self.teacher + 1}"

    def validate(self):
        require(self.weight > 0, f"{self.kind}.weight must be positive, not {self.weight}.")
        require(self.teacher >= 0, f"{self.kind}.teacher must be a place in `teachers`, counted from 0, not {self.teacher}.")


@dataclass(frozen=True)
class MimicConfig(_Objective):
    """MR-MAE's mimic loss: visible tokens through one Linear to the teacher's last block."""

    kind: ClassVar[str] = "mimic"


@dataclass(frozen=True)
class AlignConfig(_Objective):
    """MaskAlign's alignment of student blocks with the teacher's last `levels` blocks."""

    kind: ClassVar[str] = "align"
    levels: int = 5
    """K: number of teacher blocks, counted from the last."""
    mixing: Literal["dynamic", "layer-wise"] = "dynamic"
    """dynamic: each level learns its own mixture of all student blocks. layer-wise: the student's last K blocks, one each."""

    def validate(self):
        super().validate()
        require_positive(self, self.kind, "levels")


@dataclass(frozen=True)
class ReconstructConfig(_Objective):
    """MAE's reconstruction of the hidden patches by a small decoder: normalised pixels, and teacher tokens if wanted."""

    kind: ClassVar[str] = "reconstruct"
    mimic: float = 0.0
    """Factor of a second loss of the same decoder: the teacher's last block, whitened, at hidden patches."""
    decoder: PredictorConfig = field(default_factory=PredictorConfig)

    def validate(self):
        super().validate()
        require(self.mimic >= 0, f"{self.kind}.mimic must not be negative: {self.mimic}.")


@dataclass(frozen=True)
class CosineConfig(_Objective):
    """Directions of the teacher's projected tokens, at every token: MILAN (scale 2), CAE v2 (scale 1)."""

    kind: ClassVar[str] = "cosine"
    scale: float = 1.0
    """The loss of a token is scale * (1 - cos)."""
    tokens: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Factors of CLS, visible and hidden tokens in the mean over all of them; the first is 0 where one side has no CLS."""
    predictor: PredictorConfig = field(default_factory=lambda: PredictorConfig("prompting"))

    def validate(self):
        super().validate()
        require_positive(self, self.kind, "scale")
        require(
            min(self.tokens) >= 0 and max(self.tokens) > 0,
            f"{self.kind}.tokens must not be negative, and not all 0: {self.tokens}.",
        )


@dataclass(frozen=True)
class ContrastConfig(_Objective):
    """MimCo's two InfoNCE losses, of hidden patches and of the image, against queues of keys of the frozen teacher."""

    kind: ClassVar[str] = "contrast"
    patch_weight: float = 1.0
    image_weight: float = 1.0
    hidden_dim: int = 4096
    """Of projectors and predictors."""
    out_dim: int = 256
    """Width of queries and keys."""
    temperature: float = 0.2
    queue: int = 4096
    """K: keys in each queue."""
    momentum: float = 0.99
    """Of the key projector at the start; rises to 1 by a cosine."""

    def validate(self):
        super().validate()
        require_positive(self, self.kind, "hidden_dim", "out_dim", "temperature", "queue")
        for name in ("patch_weight", "image_weight"):
            require(getattr(self, name) >= 0, f"{self.kind}.{name} must not be negative: {getattr(self, name)}.")
        require(self.patch_weight + self.image_weight > 0, f"{self.kind}: both losses have weight 0.")
        require(0 <= self.momentum <= 1, f"{self.kind}.momentum must be in 0..1, not {self.momentum}.")


ObjectiveConfig = MimicConfig | AlignConfig | ReconstructConfig | CosineConfig | ContrastConfig
