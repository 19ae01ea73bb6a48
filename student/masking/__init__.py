"""Which patches a student sees.

A masker is a callable `masker(batch, noise) -> Mask`. Its randomness comes in from outside, one number a patch, so a
mask is a function of (seed, step, row of the batch) alone: not of the device, the rank or the gradient accumulation.
To add one: a file here (or a score in by_score.py), a line in `build_masker` and a kind in MaskConfig. Where a masker looks at
noise and attention alone, `MasksAhead` draws its masks before the teacher's tokens are read.
"""

from .ahead import MasksAhead
from .build import build_masker
from .by_score import ScoreMasker
from .masker import Masker, draw_noise

__all__ = ["Masker", "MasksAhead", "ScoreMasker", "build_masker", "draw_noise"]
