"""The codes of a transform (format/transform.py), worked out on the teacher's device: docs/format.md, section 6, klt.

Products are in float32. Their sums have no fixed order, so that a value which lies on the edge of two codes may get the one on
another device, or in another batch, and the other here. Equal device, software and batch give equal codes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..format.quantize import ChannelStatistics
from ..format.spec import ARRAY_NAME, StoreSpec
from ..format.transform import LayerCode, Transform

# B batch, L layers, T tokens, D width, K components that are kept


class TransformEncoder:
    """tokens/NN of a klt store from whitened tokens.

    statistics: of each layer.
    """

    def __init__(self, spec: StoreSpec, transform: Transform, statistics: dict[int, ChannelStatistics], device: torch.device):
        self.spec = spec
        self.gains = torch.tensor(transform.gains, device=device)
        self.gain_edges = (self.gains[1:-1] * self.gains[2:]).sqrt()
        self.layers = {
            layer: _Layer(transform.layers[layer], transform, statistics[layer], [
                transform.layers[other].n_kept for other in spec.read_with(layer)[:-1]
            ], device)
            for layer in spec.layers
        }  # fmt: skip

    def __call__(self, tokens: Tensor) -> dict[str, Tensor]:
        """tokens: float [B, L, T, D], finite. Returns array name -> uint8 [B, T, bytes of a token]."""
        arrays, decoded = {}, {}
        for place in reversed(range(len(self.spec.layers))):
            layer = self.spec.layers[place]
            behind = [decoded[other] for other in self.spec.read_with(layer)[:-1]]
            arrays[ARRAY_NAME.format(layer)], decoded[layer] = self._encode(self.layers[layer], tokens[:, place], behind)
        return arrays

    def _encode(self, layer: _Layer, tokens: Tensor, behind: list[Tensor]) -> tuple[Tensor, Tensor]:
        """uint8 [B, T, bytes] and the coefficients that are read from it, float32 [B, T, K]."""
        own = layer.coefficients(tokens, behind)  # [B, T, K]
        size = (own / layer.scale).square().mean(-1, keepdim=True).sqrt()
        number = 1 + torch.bucketize(size, self.gain_edges)  # [B, T, 1]
        gain = self.gains[number]
        codes = layer.codes(own / gain)
        return torch.cat([number.to(torch.uint8), layer.pack(codes)], -1), gain * layer.read(codes)


class _Layer:
    """A LayerCode on a device. n_behind: kept components of each layer that predicts it."""

    def __init__(self, code: LayerCode, transform: Transform, statistics: ChannelStatistics, n_behind: list[int],
                 device: torch.device):  # fmt: skip
        dim, n_kept = len(code.mean), code.n_kept
        on = lambda values: torch.tensor(np.ascontiguousarray(values), device=device)  # noqa: E731
        self.centre, self.spread, self.mean = on(statistics.centre), on(statistics.spread), on(code.mean)
        self.scale = on(code.scale[:n_kept])
        rows = [code.basis[place * dim : place * dim + n] for place, n in enumerate(n_behind)]
        self.predict = on(np.concatenate(rows)) if rows else None  # [K of all behind, D]
        self.own = on(code.basis[-dim:][:n_kept].T)  # [D, K]
        self.runs = []  # of components with equally many bits
        for bits in np.unique(code.bits[:n_kept])[::-1].tolist():
            which = np.flatnonzero(code.bits == bits)
            levels = on(transform.levels[2**bits - 2 : 2 ** (bits + 1) - 2])
            self.runs.append((slice(which[0], which[-1] + 1), bits, levels, (levels[1:] + levels[:-1]) / 2))
        self.n_bits = int(code.bits.sum())

    def coefficients(self, tokens: Tensor, behind: list[Tensor]) -> Tensor:
        """Its own, float32 [B, T, K], of tokens [B, T, D], given those read of the layers behind it."""
        left = ((tokens.float() - self.centre) / self.spread).sub_(self.mean)
        if behind:
            left -= torch.cat(behind, -1) @ self.predict
        return left @ self.own

    def codes(self, own: Tensor) -> Tensor:
        """int32 [B, T, K]: the level next to each coefficient over its scale."""
        values = own / self.scale
        runs = [torch.bucketize(values[..., run].contiguous(), edges, out_int32=True) for run, _, _, edges in self.runs]
        return torch.cat(runs, -1)

    def read(self, codes: Tensor) -> Tensor:
        """float32 [B, T, K]: scale times level."""
        return self.scale * torch.cat([levels[codes[..., run]] for run, _, levels, _ in self.runs], -1)

    def pack(self, codes: Tensor) -> Tensor:
        """uint8 [B, T, bytes]: codes back to back, the lowest bit first, zeros behind the last."""
        small = codes.to(torch.int16)
        parts = []
        for run, bits, _, _ in self.runs:
            places = torch.arange(bits, device=codes.device, dtype=torch.int16)
            parts.append((small[..., run, None] >> places & 1).to(torch.uint8).flatten(-2))
        parts.append(parts[0].new_zeros((*codes.shape[:-1], -self.n_bits % 8)))
        eights = torch.cat(parts, -1).unflatten(-1, (-1, 8))
        return (eights << torch.arange(8, device=codes.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
