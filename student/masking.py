"""Which patches a student sees.

A masker is a callable `masker(batch, noise) -> Mask`. Its randomness comes in from outside, one number a patch, so a
mask is a function of (seed, step, row of the batch) alone: not of the device, the rank or the gradient accumulation.
To add one: write the callable, add a line to MASKERS and a kind to MaskConfig.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import Batch, Needs, TeacherShape
from .config import BackboneConfig, MaskConfig
from .errors import ConfigError
from .seeds import position_seed

# B batch, N patches, D width


@dataclass(frozen=True)
class Mask:
    """A partition of the N patches of every image, counted row by row from 0."""

    keep: Tensor  # int64 [B, n_keep], visible patches in the order the encoder gets them
    drop: Tensor  # int64 [B, n_drop], the others

    @property
    def restore(self) -> Tensor:
        """int64 [B, N]: where patch n stands in the sequence [keep, drop]; undoes the shuffle with `take`."""
        return torch.argsort(torch.cat([self.keep, self.drop], dim=1), dim=1)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """The tokens [B, n, D] that stand at `index` [B, n] of `tokens` [B, N, D]."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def draw_noise(seed: int, step: int, n_rows: int, n_patches: int) -> Tensor:
    """The noise of one step: float32 [n_rows, n_patches] in (0, 1), on the CPU, for the whole global batch."""
    generator = torch.Generator().manual_seed(position_seed("mask", seed, step))
    noise = torch.rand(n_rows, n_patches, generator=generator)  # [0, 1), in steps of 2^-24
    return noise.clamp_(min=2.0**-25)


@dataclass(frozen=True)
class Masker:
    """Keeps the `n_keep` patches with the highest score; `score(batch, noise)` gives float [B, N]."""

    n_keep: int
    score: Callable[[Batch, Tensor], Tensor]
    needs: Needs

    def __call__(self, batch: Batch, noise: Tensor) -> Mask:
        # Stable, because equal scores must fall the same way on every device.
        order = torch.argsort(self.score(batch, noise), dim=1, descending=True, stable=True)  # [B, N]
        return Mask(keep=order[:, : self.n_keep], drop=order[:, self.n_keep :])


def _random(batch: Batch, noise: Tensor) -> Tensor:
    """Uniform without replacement (MAE models_mae.py:123-148: the first patches of a random shuffle)."""
    return -noise


def _attention_race(batch: Batch, noise: Tensor) -> Tensor:
    """Drawn by the teacher's attention without replacement: the exponential race p / E, E ~ Exp(1).

    The same law as torch.multinomial(p, n, replacement=False), which MILAN and MaskAlign use, with the randomness
    from outside and without its host synchronisation. Patches without attention come last.
    """
    # In float64: float32 logarithms of two devices differ in the last bit, and a race could end the other way.
    return batch.targets.attention.double() / -noise.double().log()


def _attention_top(batch: Batch, noise: Tensor) -> Tensor:
    """Always the patches with the most attention: the literal reading of "the most salient tokens" of MR-MAE."""
    return batch.targets.attention


MASKERS = {
    "random": (_random, Needs()),
    "attention": (_attention_race, Needs(attention=True)),
    "attention-top": (_attention_top, Needs(attention=True)),
}


def build_masker(config: MaskConfig, backbone: BackboneConfig, teacher: TeacherShape | None) -> Masker:
    """The masker a configuration names; ConfigError if it looks at attention and the teacher has none."""
    score, needs = MASKERS[config.kind]
    if needs.attention:
        if teacher is None:
            raise ConfigError(
                f"mask.kind={config.kind} chooses patches by a teacher's attention, and this run has "
                f"no teacher. Use mask.kind=random, or train from a cache."
            )
        if not teacher.has_attention:
            raise ConfigError(
                f"mask.kind={config.kind} chooses patches by the attention of CLS, which the teacher "
                f"{teacher.name} does not have. Use mask.kind=random or a teacher with a CLS token."
            )
        if teacher.grid != backbone.grid:
            raise ConfigError(
                f"mask.kind={config.kind} needs attention on the student's {backbone.grid} patches; the "
                f"teacher {teacher.name} has {teacher.grid}."
            )
    return Masker(config.n_keep(backbone.n_patches), score, needs)
