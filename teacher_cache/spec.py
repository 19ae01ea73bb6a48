"""What a store says about itself: frozen values with `to_json` and `from_json`, checked when built, no I/O.

Everything a reader needs to interpret bytes on disk is here; facts about single shards are not (see commits.py).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from .errors import CacheCorruptError

FORMAT_VERSION = 1


def _from_json(cls, value: dict):
    """Build the dataclass `cls` from a parsed JSON object; unknown or missing keys are corruption."""
    names = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(value, dict) or set(value) != names:
        given = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise CacheCorruptError(f"{cls.__name__}: expected the keys {sorted(names)}, found {given}.")
    tupled = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
    try:
        return cls(**tupled)
    except (TypeError, ValueError) as error:
        raise CacheCorruptError(f"{cls.__name__}: {error}") from error


@dataclass(frozen=True)
class TeacherSpec:
    """A frozen teacher, described by data: enough to read its targets without ever loading it."""

    name: str
    """As given to `--teacher`: `clip-b16`, `demo`, `timm:vit_tiny_patch16_224`."""
    weights: str
    """Where the weights came from: a file's name, `random:SEED` or `built-in`."""
    weights_sha256: str
    """Of the weights file; for random weights of names, shapes and bytes of all tensors in sorted order."""
    image_size: int
    """Side of the teacher's square input, pixels."""
    patch_size: int
    """Side of a patch, pixels."""
    grid: tuple[int, int]
    """(rows, columns) of patches; N = rows * columns."""
    dim: int
    """Width D of the residual stream."""
    depth: int
    """Number of blocks; block numbers count from 1."""
    heads: int
    has_cls: bool
    """C = 1: the CLS token is stored, first. Else C = 0 and there is no attention."""
    n_registers: int
    """Further prefix tokens, which are dropped."""
    mean: tuple[float, float, float]
    """Of the input normalisation, for pixels in 0..1."""
    std: tuple[float, float, float]
    norm_eps: float
    """Of the teacher's LayerNorms; the whitening uses the same."""
    projection_dim: int | None
    """Width E of the projection behind the final norm (CLIP), else None."""
    resize: str
    """How a crop of another size becomes `image_size`, and how the position table follows."""

    def __post_init__(self):
        for name in ("image_size", "patch_size", "dim", "depth", "heads"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, not {getattr(self, name)!r}")
        if len(self.grid) != 2 or not all(isinstance(side, int) and side > 0 for side in self.grid):
            raise ValueError(f"grid must be (rows, columns), not {self.grid!r}")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(s > 0 for s in self.std):
            raise ValueError(f"mean and std must have 3 channels and std be positive: {self.mean!r}, {self.std!r}")
        if not (math.isfinite(self.norm_eps) and self.norm_eps > 0):
            raise ValueError(f"norm_eps must be positive, not {self.norm_eps!r}")

    @property
    def n_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def n_tokens(self) -> int:
        """C + N, the length of the stored token axis."""
        return self.n_patches + int(self.has_cls)

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict) -> TeacherSpec:
        return _from_json(cls, value)
