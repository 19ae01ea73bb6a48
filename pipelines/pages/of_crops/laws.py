"""Which patches the methods would show their student: the masks of all presets that fit a teacher's grid."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from student.batch import Batch, Targets, TeacherHead, TeacherShape
from student.config import BackboneConfig, MaskConfig
from student.errors import ConfigError
from student.masking import build_masker, draw_noise

from ...presets import PRESETS, recipe

ATTENTION_KINDS = ("attention", "attention-top")
PIXELS_A_PATCH = 16
METHODS = {"mae": "MAE", "mr_mae": "MR-MAE", "mr_mcmae": "MR-MCMAE", "mimco": "MimCo", "cae_v2": "CAE v2",
           "maskalign": "MaskAlign", "milan": "MILAN"}  # fmt: skip
"""By the module of their presets."""


@dataclass(frozen=True)
class Law:
    """One way of hiding patches, and the presets that use it."""

    mask: MaskConfig
    backbone: BackboneConfig
    presets: tuple[str, ...]
    scaled: bool
    """The presets are made for another grid; units and blocks are scaled to this one."""

    @property
    def title(self) -> str:
        units = f" {self.mask.unit_side(self.backbone)} x {self.mask.unit_side(self.backbone)}" * (self.mask.kind == "unit")
        return f"{self.mask.kind}{units}, {1 - self.mask.n_keep(self.backbone) / self.backbone.n_patches:.0%} hidden"

    @property
    def methods(self) -> list[str]:
        """Of the presets, each once."""
        return list(dict.fromkeys(METHODS[PRESETS[name].__module__.rpartition(".")[2]] for name in self.presets))


def laws_for(teacher: TeacherShape) -> list[Law]:
    """The different laws of all presets on the grid of `teacher`, those that need attention only if it has some.

    Presets for another grid come in miniature (Recipe.tiny), where their kind of mask is not there in full size. A grid that is
    not square fits none.
    """
    if teacher.grid[0] != teacher.grid[1]:
        return []
    full, small = [], []
    for name in PRESETS:
        config = recipe(name).config
        if config.backbone.grid == teacher.grid:
            full.append((name, config))
        else:
            with contextlib.suppress(ConfigError):  # a grid so small that the preset would hide all of it
                tiny = recipe(name).tiny((replace(teacher, dim=48),), teacher.grid[0] * PIXELS_A_PATCH)
                small.append((name, tiny.config))
    kinds = {config.mask.kind for _, config in full}
    chosen = [(name, config, False) for name, config in full]
    chosen += [(name, config, True) for name, config in small if config.mask.kind not in kinds]

    laws: dict[tuple, Law] = {}
    for name, config, scaled in chosen:
        mask = config.mask
        if mask.kind in ATTENTION_KINDS and not teacher.has_attention:
            continue
        side = mask.unit_side(config.backbone) if mask.kind == "unit" else None
        key = mask.kind, mask.n_keep(config.backbone), side, mask.min_block if mask.kind == "block" else None
        known = laws.get(key, Law(mask, config.backbone, (), scaled))
        laws[key] = replace(known, presets=(*known.presets, name))
    order = [*ATTENTION_KINDS, "random", "block", "unit"]
    return sorted(laws.values(), key=lambda law: (order.index(law.mask.kind), -law.mask.ratio))


def one_a_kind(laws: Sequence[Law]) -> list[Law]:
    """Of each kind the law of the most presets."""
    best: dict[str, Law] = {}
    for law in laws:
        if law.mask.kind not in best or len(law.presets) > len(best[law.mask.kind].presets):
            best[law.mask.kind] = law
    return list(best.values())


def hidden_patches(law: Law, teacher: TeacherShape, attention: np.ndarray | None, n_rows: int, seed: int) -> np.ndarray:
    """bool [n_rows, N], True where a law hides a patch. All laws get the same noise, that of step 0 of `seed`.

    attention: float32 [n_rows, N], if the teacher has some.
    """
    noise = draw_noise(seed, 0, n_rows, law.backbone.n_patches)
    targets = ()
    if attention is not None:
        nothing = torch.zeros(0)
        targets = (Targets(nothing, (), teacher.has_cls, torch.from_numpy(attention), TeacherHead(nothing, nothing, None)),)
    batch = Batch(images=torch.zeros(n_rows), rows=torch.arange(n_rows), labels=None, targets=targets)
    return build_masker(law.mask, law.backbone, (teacher,))(batch, noise).is_hidden.numpy()
