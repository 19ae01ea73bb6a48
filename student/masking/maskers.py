"""Which patches a student sees.

A masker is a callable `masker(batch, noise) -> Mask`. Its randomness comes in from outside, one number a patch, so a
mask is a function of (seed, step, row of the batch) alone: not of the device, the rank or the gradient accumulation.
To add one: write the callable, add a line to `build_masker` and a kind to MaskConfig. Where a masker looks at noise and attention
alone, `MasksAhead` draws its masks before the teacher's tokens are read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch, Mask, Needs, TeacherShape
from ..config import BackboneConfig, MaskConfig
from ..errors import ConfigError
from ..seeds import position_seed

# B batch, N patches, D width


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """The tokens [B, n, D] that stand at `index` [B, n] of `tokens` [B, N, D]."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


@functools.lru_cache(maxsize=2)  # a step may be cut into many micro-batches
def draw_noise(seed: int, step: int, n_rows: int, n_patches: int) -> Tensor:
    """The noise of one step: float32 [n_rows, n_patches] in (0, 1), on the CPU, for the whole global batch. Not to be changed."""
    generator = torch.Generator().manual_seed(position_seed("mask", seed, step))
    noise = torch.rand(n_rows, n_patches, generator=generator)  # [0, 1), in steps of 2^-24
    np.maximum(noise.numpy(), 2.0**-25, out=noise.numpy())  # not by torch's threads: see MasksAhead
    return noise


class Masker(Protocol):
    """Draws a mask; `needs` says what of the first teacher it looks at."""

    needs: Needs

    def __call__(self, batch: Batch, noise: Tensor) -> Mask:
        """The mask of a batch, on the device of its images. noise: float32 [B, N] in (0, 1), on any device."""
        ...


@dataclass(frozen=True)
class ScoreMasker:
    """Keeps the `n_keep` patches with the highest score.

    score: (attention, noise) -> [B, N], all three tensors or all three numpy arrays; attention is None unless `needs` has it.
    """

    n_keep: int
    score: Callable[[Tensor | np.ndarray | None, Tensor | np.ndarray], Tensor | np.ndarray]
    needs: Needs = Needs()

    def __call__(self, batch: Batch, noise: Tensor) -> Mask:
        attention = batch.targets[0].attention if self.needs.attention else None
        scores = self.score(attention, noise.to(batch.images.device))
        # Stable, because equal scores must fall the same way on every device.
        order = torch.argsort(scores, dim=1, descending=True, stable=True)  # [B, N]
        return self.mask(order)

    def mask(self, order: Tensor) -> Mask:
        """The mask of the patches from the highest score to the lowest, int64 [B, N]."""
        return Mask(keep=order[:, : self.n_keep], drop=order[:, self.n_keep :])


def _random(attention, noise):
    """Uniform without replacement (MAE models_mae.py:123-148: the first patches of a random shuffle)."""
    return -noise


def _attention_race(attention, noise):
    """Drawn by the teacher's attention without replacement: the exponential race p / E, E ~ Exp(1).

    The same law as torch.multinomial(p, n, replacement=False), which MILAN and MaskAlign use, with the randomness
    from outside and without its host synchronisation. Patches without attention come last.
    """
    # In float64: float32 logarithms of two devices differ in the last bit, and a race could end the other way.
    if isinstance(noise, np.ndarray):
        return attention.astype("float64") / -np.log(noise.astype("float64"))
    return attention.double() / -noise.double().log()


def _attention_top(attention, noise):
    """Always the patches with the most attention: the literal reading of "the most salient tokens" of MR-MAE."""
    return attention


@dataclass(frozen=True)
class MasksAhead:
    """The masks of a run, drawn where its batches are made: those that its student would draw, before any token is read.

    So tokens of hidden patches need not be read, sent and dequantised where no loss looks at them.
    """

    masker: ScoreMasker
    seed: int
    n_patches: int

    def order(self, step: int, batch_size: int, place: int, n_places: int, attention: np.ndarray | None) -> np.ndarray:
        """int64 [B, N]: the patches of the crops of a micro-batch, the visible ones first; see ScoreMasker.mask.

        place: of the micro-batch among the `n_places` of step `step`, which has `batch_size` crops. attention: float32 [B, N], if
        the masker needs it.
        """
        # By numpy: torch would start as many threads as there are processors, on which the loader decodes crops.
        noise = draw_noise(self.seed, step, batch_size, self.n_patches).chunk(n_places)[place].numpy()
        return np.argsort(-self.masker.score(attention, noise), axis=1, kind="stable")


@dataclass(frozen=True)
class StoredRace:
    """Keeps the first `n_keep` of the patches whose tokens are stored: the race of `_attention_race`, run when they were.

    So the mask of a crop is the same in every epoch that reads its view, and noise plays no part.
    """

    n_keep: int
    needs: Needs = Needs()

    def __call__(self, batch: Batch, noise: Tensor) -> Mask:
        keep = batch.targets[0].index[:, : self.n_keep]
        is_kept = torch.zeros(noise.shape, dtype=torch.int8, device=keep.device).scatter_(1, keep, 1)
        return Mask(keep, drop=torch.argsort(is_kept, dim=1, stable=True)[:, : noise.shape[1] - self.n_keep])


@dataclass(frozen=True)
class UnitMasker:
    """Keeps `n_keep` square units of `side` x `side` patches, uniformly (SimMIM data_simmim.py:21-45); MimCo.

    Of the noise, the number at a unit's first patch decides.
    """

    n_keep: int
    side: int
    grid: tuple[int, int]
    needs: Needs = Needs()

    def __call__(self, batch: Batch, noise: Tensor) -> Mask:
        noise = noise.to(batch.images.device).unflatten(1, self.grid)[:, :: self.side, :: self.side].flatten(1)  # [B, units]
        units = torch.argsort(noise, dim=1, stable=True)
        patches = self._patches_of_units(units.device)
        return Mask(*(patches[part].flatten(1) for part in (units[:, : self.n_keep], units[:, self.n_keep :])))

    def _patches_of_units(self, device: torch.device) -> Tensor:
        """int64 [units, side * side]: the patches of each unit."""
        rows, columns = self.grid
        patches = torch.arange(rows * columns, device=device).reshape(
            rows // self.side, self.side, columns // self.side, self.side
        )
        return patches.transpose(1, 2).reshape(-1, self.side**2)


@dataclass(frozen=True)
class BlockMasker:
    """Hides rectangles, one after the other, until exactly `n_drop` patches are covered (CAE masking_generator.py:5-65).

    While R patches are left to hide, a rectangle is drawn: area uniform between `min_block` and R, log of height / width
    uniform in +-log(1 / .3), sides rounded and below the grid's, place uniform. It is taken if it covers at least one new patch
    and at most R. BEiT's generator, from which this comes, may stop early; here the count is exact.
    """

    n_drop: int
    min_block: int
    grid: tuple[int, int]
    needs: Needs = Needs()

    def __call__(self, batch: Batch, noise: Tensor) -> Mask:
        hidden = self.draw(_keys(noise.cpu().numpy()))  # bool [B, N]
        order = torch.from_numpy(np.argsort(hidden, axis=1, kind="stable")).to(batch.images.device)
        return Mask(keep=order[:, : -self.n_drop or None], drop=order[:, order.shape[1] - self.n_drop :])

    def draw(self, keys: np.ndarray) -> np.ndarray:
        """bool [B, N], True where hidden; keys: uint64 [B], of which the mask of a crop is a function.

        All crops of a batch are drawn at once, a rectangle each in turn: in a loop over crops this would be the slowest part
        of a step.
        """
        rows, columns = self.grid
        row, column = np.divmod(np.arange(rows * columns), columns)  # [N]
        hidden = np.zeros((len(keys), rows * columns), bool)
        left = np.full(len(keys), self.n_drop)  # patches still to hide
        attempt = 0
        while len(open_ := np.flatnonzero(left)):
            area, ratio, top, start = _uniforms(keys[open_], attempt)  # each [open]
            attempt += 1
            area = self.min_block + area * (left[open_] - self.min_block)
            ratio = 0.3 ** (2 * ratio - 1)
            height, width = np.rint(np.sqrt(area * ratio)).astype(int), np.rint(np.sqrt(area / ratio)).astype(int)
            top, start = (top * (rows - height + 1)).astype(int)[:, None], (start * (columns - width + 1)).astype(int)[:, None]
            inside = (
                (row >= top) & (row < top + height[:, None]) & (column >= start) & (column < start + width[:, None])
            )  # [open, N]
            n_new = (inside & ~hidden[open_]).sum(1)
            taken = (height < rows) & (width < columns) & (n_new > 0) & (n_new <= left[open_])
            hidden[open_[taken]] |= inside[taken]
            left[open_[taken]] -= n_new[taken]
        return hidden


def _keys(noise: np.ndarray) -> np.ndarray:
    """uint64 [B]: the bits of a row's first numbers, mixed. noise: float32 [B, N]."""
    keys = np.zeros(len(noise), "uint64")
    for bits in np.ascontiguousarray(noise[:, :4]).view("uint32").T:
        keys = _mixed(keys ^ bits.astype("uint64"))
    return keys


def _uniforms(keys: np.ndarray, attempt: int) -> np.ndarray:
    """float64 [4, B] in [0, 1): the numbers of one attempt, functions of key and attempt alone."""
    counters = np.uint64(4 * attempt) + np.arange(4, dtype="uint64")[:, None]
    with np.errstate(over="ignore"):
        mixed = _mixed(keys + (counters + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return (mixed >> np.uint64(11)) * 2.0**-53


def _mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64's output function (Steele et al. 2014): every bit of the result depends on every bit of the input."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


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
    if config.kind == "random":
        return ScoreMasker(n_keep, _random)
    _require_attention(config, backbone, teachers)
    score = {"attention": _attention_race, "attention-top": _attention_top}[config.kind]
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
            f"mask.kind={config.kind} chooses patches by the attention of CLS, which the teacher "
            f"{teacher.name} does not have. Use mask.kind=random or a teacher with a CLS token."
        )
    if teacher.grid != backbone.grid:
        raise ConfigError(
            f"mask.kind={config.kind} needs attention on the student's {backbone.grid} patches; the "
            f"teacher {teacher.name} has {teacher.grid}."
        )
