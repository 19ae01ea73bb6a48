"""From a configuration to its masker."""

from __future__ import annotations

from ..batch import Needs, TeacherShape
from ..config import BackboneConfig, MaskConfig
from ..errors import ConfigError
from .blocks import BlockMasker
from .by_score import SCORES, ScoreMasker
from .masker import Masker
from .stored_race import StoredRace
from .units import UnitMasker


def build_masker(config: MaskConfig, backbone: BackboneConfig, teachers: tuple[TeacherShape, ...] = ()) -> Masker:
    """The masker a configuration names; ConfigError if it looks at attention and the first teacher has none, or if only tokens
    of visible patches are stored and it would keep others.
    """
    n_keep = config.n_keep(backbone)
    if teachers and teachers[0].n_visible is not None:
        _require_stored(config, n_keep, teachers[0])
        _require_attention(config, backbone, teachers)
        return StoredRace(n_keep)
    if config.kind == "unit":
        side = config.unit_side(backbone)
        return UnitMasker(n_keep // side**2, side, backbone.grid)
    if config.kind == "block":
        return BlockMasker(backbone.n_patches - n_keep, config.min_block, backbone.grid)
    score = SCORES[config.kind]
    if config.kind == "random":
        return ScoreMasker(n_keep, score)
    _require_attention(config, backbone, teachers)
    return ScoreMasker(n_keep, score, Needs(attention=True))


def _require_stored(config: MaskConfig, n_keep: int, teacher: TeacherShape) -> None:
    stored = f"the store of {teacher.name} keeps the tokens of {teacher.n_visible} visible patches, drawn by attention"
    if config.kind != "attention":
        raise ConfigError(
            f"mask.kind={config.kind} chooses other patches than those stored: {stored}. Use mask.kind=attention, or a store of "
            "all tokens (teacher-cache extract --tokens all)."
        )
    if n_keep > teacher.n_visible:
        raise ConfigError(
            f"mask.ratio={config.ratio} leaves {n_keep} patches visible, and {stored}. Set a higher mask.ratio, or make a store "
            f"of as many (teacher-cache extract --tokens visible:{n_keep})."
        )


def _require_attention(config: MaskConfig, backbone: BackboneConfig, teachers: tuple[TeacherShape, ...]) -> None:
    if not teachers:
        raise ConfigError(
            f"mask.kind={config.kind} chooses patches by a teacher's attention, and this run has "
            f"no teacher. Use mask.kind=random, or train from a cache."
        )
    teacher = teachers[0]
    if not teacher.has_attention:
        raise ConfigError(
            f"mask.kind={config.kind} chooses patches by the teacher's attention, and {teacher.name} gives none (that of a CLS "
            "token, or of an attention-pooling head). Use mask.kind=random, or a teacher that gives it."
        )
    if teacher.grid != backbone.grid:
        raise ConfigError(
            f"mask.kind={config.kind} needs attention on the student's {backbone.grid[0]} x {backbone.grid[1]} patches "
            f"({backbone.image_size} pixels, {backbone.stride} a patch); the teacher {teacher.name} has {teacher.grid[0]} x "
            f"{teacher.grid[1]}. {teacher.how_to_meet(backbone)}"
        )
