"""What a student is given: images and, where a method has a teacher, that teacher's targets for the same crops.

Objectives and maskers see these classes and nothing else, so any source that can fill them will do: a cache, a teacher
run on the spot, or a test. Shapes throughout the package:

# B batch, N patches (row by row), C 1 with CLS else 0, D width, L layers, E projected width
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .config import BackboneConfig
from .errors import RunError


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """The tokens [B, n, D] that stand at `index` [B, n] of `tokens` [B, N, D]."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


@dataclass(frozen=True)
class Mask:
    """A partition of the N patches of every image, counted row by row from 0."""

    keep: Tensor  # int64 [B, n_keep], visible patches in the order the encoder gets them
    drop: Tensor  # int64 [B, n_drop], the others

    @property
    def is_hidden(self) -> Tensor:
        """bool [B, N], True where a patch is hidden."""
        visible = torch.ones(
            self.keep.shape[0], self.keep.shape[1] + self.drop.shape[1], dtype=torch.bool, device=self.keep.device
        )
        return visible.scatter(1, self.keep, False)

    @property
    def restore(self) -> Tensor:
        """int64 [B, N]: where patch n stands in the sequence [keep, drop]; undoes the shuffle with `take`."""
        return torch.argsort(torch.cat([self.keep, self.drop], dim=1), dim=1)


@dataclass(frozen=True)
class TeacherHead:
    """The teacher's own way out of its last block: final_norm = gamma * z + beta, then z @ projection."""

    gamma: Tensor  # float32 [D]
    beta: Tensor  # float32 [D]
    projection: Tensor | None  # float32 [D, E]; None where the teacher has no projection


@dataclass(frozen=True)
class Targets:
    """A teacher's view of a batch, whitened: LayerNorm without gain and bias, token by token."""

    tokens: Tensor  # float [B, L, C+N, D], in the order of `layers`
    layers: tuple[int, ...]  # counted from the end: -1 is the teacher's last block; ascending
    has_cls: bool  # C = 1: row 0 of the token axis is CLS
    attention: Tensor | None  # float32 [B, N], of CLS or a pooling head to the patches, mean over heads; 0..1
    head: TeacherHead | None  # None where the teacher has no final norm that follows from whitened tokens
    index: Tensor | None = None  # int64 [B, K]: the patches whose tokens these are, K for N above; None: all, row by row

    def layer(self, which: int) -> Tensor:
        """All tokens of one block, [B, C+N, D]; `which` counts from the end, -1 is the last block.

        Raises RunError if that block was not read.
        """
        if which not in self.layers:
            raise RunError(
                f"The batch holds the teacher's layers {self.layers}, not {which}: the data source must "
                f"read every layer that the student's `needs` names."
            )
        return self.tokens[:, self.layers.index(which)]

    def patches(self, which: int) -> Tensor:
        """The patch tokens of one block, [B, N, D]: `layer` without CLS. RunError if there are only those of visible patches."""
        if self.index is not None:
            raise RunError("The batch holds tokens of visible patches only; `needs.hidden_tokens` must ask for the others.")
        return self.layer(which)[:, int(self.has_cls) :]

    def visible(self, which: int, keep: Tensor) -> Tensor:
        """The tokens of the visible patches `keep` of one block: int64 [B, n] -> [B, n, D].

        Where only tokens of visible patches are there, `keep` is the beginning of `index`: StoredRace and MasksAhead of masking
        see to that.
        """
        if self.index is not None:
            first = int(self.has_cls)
            return self.layer(which)[:, first : first + keep.shape[1]]
        return take(self.patches(which), keep)


@dataclass(frozen=True)
class Batch:
    """Crops, ready for the student."""

    images: Tensor  # float [B, 3, H, W], normalised for the student
    rows: Tensor  # int64 [B], row of the crop in its view; on the CPU
    labels: Tensor | None  # int64 [B], on the CPU
    targets: tuple[Targets, ...]  # of each of the run's teachers, in order; empty for methods without one
    mask: Mask | None = None  # where the source has drawn it already (masking.MasksAhead); else the student draws it


@dataclass(frozen=True)
class Needs:
    """What a student wants of one of its teachers; nothing else is read at all."""

    layers: tuple[int, ...] = ()  # counted from the end, ascending
    attention: bool = False
    hidden_tokens: bool = False  # those of hidden patches too, not of visible ones alone

    def __or__(self, other: Needs) -> Needs:
        """What two objectives, or a masker and one, want together."""
        layers = tuple(sorted({*self.layers, *other.layers}))
        return Needs(layers, self.attention or other.attention, self.hidden_tokens or other.hidden_tokens)


@dataclass(frozen=True)
class TeacherShape:
    """All a student must know of its teacher to build its heads."""

    name: str
    grid: tuple[int, int]  # (rows, columns) of patches
    dim: int
    depth: int
    has_cls: bool
    has_attention: bool
    projection_dim: int | None
    n_visible: int | None = None
    """K, where only tokens of visible patches are stored: the first of an attention race, one a crop and view; None: all."""
    has_final_norm: bool = True
    """Whether its targets come with a `TeacherHead`."""
    patch_size: int | None = None
    """Side of what one token stands for, pixels of the teacher's input; None: not known."""

    def how_to_meet(self, backbone: BackboneConfig) -> str:
        """For a message: the sizes at which this teacher and a student of `backbone` have one grid."""
        side, ways = backbone.grid[0], []
        if self.patch_size is not None:
            extract = f"teacher-cache extract --image-size {side * self.patch_size}"
            ways.append(f"With {extract}, under another --name, {self.name} has {side} x {side} patches.")
        if self.grid[0] == self.grid[1]:
            size = self.grid[0] * backbone.stride
            student = f"A student of {size} px (--set backbone.image_size={size}, on crops of that size)"
            ways.append(f"{student} has {self.grid[0]} x {self.grid[1]}.")
        return " ".join(ways) or "Choose another teacher."


class BatchSource(Protocol):
    """Where batches come from. The k-th step always gets the same rows, whoever asks and wherever it starts."""

    steps_per_epoch: int
    identity: dict
    """JSON values that say which data this is (a cache's id, its views, the order's seed); a run only resumes on
    the same.

    A source may also have `pixels`, see checkpoint.Description; `views_of(n)`, the sha256 of its first n views, with
    `change_views([(step, those), ...])`, where their number can be changed under way; and `rows_of(step)`, the number of the view
    and the rows of a step."""

    def micro_batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """The batches of steps [first_step, last_step), counted from 0 over the whole run, in order.

        Each step is as many batches as the trainer asks for, of equal size, by the numbers of `micro_batches.number_in_step`,
        already on the device of the training. If the iterator has a `close()`, it is called when training ends, however it ends.
        """
        ...
