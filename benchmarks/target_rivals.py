"""Other ways to store a token in few bytes, for benchmarks/target_codes.py: each is fitted on tokens and gives back what it would
read. Tokens are float32 [L, n, D] of L layers, standardised by channel (format/quantize.py); bits a value include all side
information of a token, and none of what a store keeps once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from teacher_cache.encoding.klt_fit import lloyd_max
from teacher_cache.format.transform import DISTORTION

N_ITERATIONS = 12
"""Of k-means."""
BLOCK_TOKENS = 4096
"""Tokens that are worked on at a time."""


@dataclass(frozen=True)
class Rival:
    name: str
    bits: float
    """A value."""
    read_back: Callable[[Tensor], Tensor]
    """float32 [L, n, D] -> the same, stored and read."""


def _levels(bits: int) -> Tensor:
    return torch.from_numpy(lloyd_max()[2**bits - 2 : 2 ** (bits + 1) - 2]).float()


def _nearest(values: Tensor, levels: Tensor) -> Tensor:
    return levels[torch.bucketize(values.contiguous(), (levels[1:] + levels[:-1]) / 2)]


def _root_mean_square(values: Tensor) -> Tensor:
    return values.square().mean(-1, keepdim=True).sqrt().half().float().clamp_min(1e-4)


def uniform(bits: int, group: int) -> Rival:
    """Whole multiples of a float16 scale for each group of neighbouring channels, as int4 has them: the value of largest
    magnitude becomes the lowest level, so that all levels are used."""

    def read_back(tokens: Tensor) -> Tensor:
        dim = tokens.shape[-1]
        groups = torch.nn.functional.pad(tokens, (0, -dim % group)).unflatten(-1, (-1, group))
        lowest, highest = groups.aminmax(dim=-1, keepdim=True)
        half = 2 ** (bits - 1)
        scale = (torch.where(highest >= -lowest, -highest, -lowest) / half).half().float()
        levels = (groups / torch.where(scale == 0, torch.inf, scale)).round().clamp(-half, half - 1)
        return (levels * scale).flatten(-2)[..., :dim]

    return Rival(f"uniform, {bits} bits, groups of {group}", bits + 16 / group, read_back)


def rotated(fitted: Tensor, bits: int, kind: str) -> Rival:
    """A rotation that knows nothing of the tokens, then Lloyd-Max levels of a Gaussian, and a float16 scale a token.

    kind: `random`, or `Hadamard` with random signs, in blocks of the largest power of two that divides the width.
    """
    n_layers, _, dim = fitted.shape
    generator = torch.Generator().manual_seed(0)
    if kind == "random":
        rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    else:
        block, side = torch.ones(1, 1), dim & -dim
        while len(block) < side:
            block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
        signs = torch.randint(0, 2, (dim, 1), generator=generator) * 2 - 1
        rotation = signs * torch.block_diag(*[block / side**0.5] * (dim // side))
    means, levels = fitted.mean(1, keepdim=True), _levels(bits)

    def read_back(tokens: Tensor) -> Tensor:
        turned = (tokens - means) @ rotation
        scale = _root_mean_square(turned)
        return _nearest(turned / scale, levels) * scale @ rotation.T + means

    return Rival(f"{kind} rotation, Lloyd-Max, {bits} bits", bits + 16 / dim, read_back)


def product(fitted: Tensor, n_channels: int, bits: int) -> Rival:
    """Product quantisation: neighbouring channels together are one of 2 ** bits words of a codebook of their own (k-means), and a
    float16 scale a token."""
    means = fitted.mean(1, keepdim=True)

    def split(tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[L, D / n, n tokens, n] of unit scale, and the scale."""
        centred = tokens - means
        scale = _root_mean_square(centred)
        return (centred / scale).unflatten(-1, (-1, n_channels)).transpose(1, 2), scale

    def nearest(points: Tensor, words: Tensor) -> Tensor:
        found = torch.empty(points.shape[:-1], dtype=torch.long)
        for place in np.ndindex(*points.shape[:2]):  # a codebook, and points whose distances stay in the processor's cache
            book, lengths = words[place].T, words[place].square().sum(-1)
            for out, block in zip(found[place].split(BLOCK_TOKENS), points[place].split(BLOCK_TOKENS), strict=True):
                torch.argmin(torch.addmm(lengths, block, book, alpha=-2), -1, out=out)
        return found

    points = split(fitted)[0]
    first = torch.randperm(points.shape[2], generator=torch.Generator().manual_seed(0))[: 2**bits]
    words = points[:, :, first].clone()
    for _ in range(N_ITERATIONS):
        index = nearest(points, words)[..., None]
        sums = torch.zeros_like(words).scatter_add_(2, index.expand_as(points), points)
        counts = torch.zeros_like(words[..., :1]).scatter_add_(2, index, torch.ones_like(points[..., :1]))
        words = torch.where(counts > 0, sums / counts.clamp_min(1), words)

    def read_back(tokens: Tensor) -> Tensor:
        parts, scale = split(tokens)
        read = words.gather(2, nearest(parts, words)[..., None].expand_as(parts))
        return read.transpose(1, 2).flatten(-2) * scale + means

    return Rival(
        f"product quantisation, {bits} bits for {n_channels} channels", bits / n_channels + 16 / fitted.shape[-1], read_back
    )


class Spectrum:
    """The covariance of all layers together, or of each alone, weighted as the product weights it."""

    def __init__(self, fitted: Tensor, together: bool):
        self.parts = (
            [self._part(fitted, range(len(fitted)))] if together else [self._part(fitted, [i]) for i in range(len(fitted))]
        )
        self.together = together

    @staticmethod
    def _part(fitted: Tensor, layers) -> tuple:
        tokens = torch.cat([fitted[i] for i in layers], -1)
        weight = 1 / tokens.square().sum(-1, keepdim=True)
        weight = weight / weight.sum()
        mean = (weight * tokens).sum(0)
        centred = tokens - mean
        variances, basis = torch.linalg.eigh(centred.T @ (weight * centred))
        variances = variances.flip(0)
        return list(layers), mean, variances.clamp_min(1e-9 * variances[0]), basis.flip(1)

    def code(self, bits: float, has_scale: bool) -> Rival:
        """Bits by greedy water-filling and Lloyd-Max levels; with a scale of a byte a token, in the bits, or none."""
        coders = []
        for layers, mean, variances, basis in self.parts:
            n_bits = int(bits * len(mean)) - 8 * has_scale
            gains = variances.numpy() * -np.diff(DISTORTION)[:, None]
            given = np.argsort(-gains.ravel(), kind="stable")[:n_bits] % len(mean)
            coders.append((layers, mean, variances.sqrt(), basis, np.bincount(given, minlength=len(mean))))

        def read_back(tokens: Tensor) -> Tensor:
            out = torch.empty_like(tokens)
            for layers, mean, deviation, basis, n_bits in coders:
                values = ((torch.cat([tokens[i] for i in layers], -1) - mean) @ basis) / deviation
                kept = torch.from_numpy(n_bits > 0)
                scale = values[:, kept].square().mean(-1, keepdim=True).sqrt() if has_scale else torch.ones(len(values), 1)
                scale = torch.exp2((8 * scale.log2()).round() / 8)
                read = torch.zeros_like(values)
                for each in np.unique(n_bits[n_bits > 0]).tolist():
                    which = torch.from_numpy(np.flatnonzero(n_bits == each))
                    read[:, which] = _nearest(values[:, which] / scale, _levels(each)) * scale
                for i, part in zip(layers, (read * deviation @ basis.T + mean).split(tokens.shape[-1], -1), strict=True):
                    out[i] = part
            return out

        name = "all layers in one transform" if self.together else "a transform of each layer"
        return Rival(f"{name}, {bits:g} bits, {'a' if has_scale else 'no'} scale a token", bits, read_back)
