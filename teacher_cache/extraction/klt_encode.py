"""The codes of a transform (format/transform.py), worked out on the teacher's device: docs/format.md, section 6, klt.

Products are in float32. Their sums have no fixed order, so that a value which lies on the edge of two codes may get the one on
one device, or in one batch, and the other in another. Equal device, software and batch give equal codes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..format.quantize import ChannelStatistics
from ..format.spec import ARRAY_NAME, StoreSpec
from ..format.transform import LayerCode, Transform

# B batch, L layers, T tokens, D width, K components that have bits


class TransformEncoder:
    """tokens/NN of a klt store from whitened tokens.

    statistics: of each layer.
    """

    def __init__(self, spec: StoreSpec, transform: Transform, statistics: dict[int, ChannelStatistics], device: torch.device):
        self.spec = spec
        self.scales = torch.tensor(transform.scales, device=device)
        self.edges = self.scales[1:-1] * self.scales[2:]  # of the mean square
        n_kept = {layer: code.n_kept for layer, code in transform.layers.items()}
        self.layers = {
            layer: _Layer(code, transform, statistics[layer], [n_kept[other] for other in spec.read_with(layer)[:-1]], device)
            for layer, code in transform.layers.items()
        }

    def __call__(self, tokens: Tensor) -> dict[str, Tensor]:
        """tokens: float [B, L, T, D], finite. Returns array name -> uint8 [B, T, bytes of a token]."""
        arrays, read = {}, {}
        for place in reversed(range(len(self.spec.layers))):
            layer = self.spec.layers[place]
            behind = [read[other] for other in self.spec.read_with(layer)[:-1]]
            arrays[ARRAY_NAME.format(layer)], read[layer] = self._encode(self.layers[layer], tokens[:, place], behind)
        return arrays

    def _encode(self, layer: _Layer, tokens: Tensor, behind: list[Tensor]) -> tuple[Tensor, Tensor]:
        """uint8 [B, T, bytes], and the values that are read from it, float32 [B, T, K]."""
        own = layer.components(tokens, behind)
        number = 1 + torch.bucketize(own.square().mean(-1, keepdim=True), self.edges)  # [B, T, 1]
        scale = self.scales[number]
        codes, values = layer.codes(own / scale)
        return torch.cat([number.to(torch.uint8), pack(codes)], -1), values * scale


class _Layer:
    """A LayerCode on a device. n_behind: components with bits of each layer that predicts it."""

    def __init__(self, code: LayerCode, transform: Transform, statistics: ChannelStatistics, n_behind: list[int],
                 device: torch.device):  # fmt: skip
        dim = len(code.mean)
        on = lambda values: torch.tensor(np.ascontiguousarray(values), device=device)  # noqa: E731
        self.mean = on(code.mean)
        rows = [code.basis[place * dim : place * dim + n] for place, n in enumerate(n_behind)]
        self.predict = on(np.concatenate(rows)) if rows else None  # [K of all behind, D]
        own = code.basis[-dim:][: code.n_kept].astype("float64") / statistics.spread
        self.analysis = on((own / statistics.spread / (own**2).sum(1, keepdims=True)).T.astype("float32"))  # [D, K]
        self.runs = []  # of components with equally many bits
        for bits in np.unique(code.bits[: code.n_kept])[::-1].tolist():
            which = np.flatnonzero(code.bits == bits)
            levels = on(transform.levels_of(bits))
            self.runs.append((slice(which[0], which[-1] + 1), bits, levels, (levels[1:] + levels[:-1]) * 0.5))

    def components(self, tokens: Tensor, behind: list[Tensor]) -> Tensor:
        """Its own, float32 [B, T, K], of tokens [B, T, D], given the values read of the layers behind it."""
        left = tokens.float() - self.mean
        if self.predict is not None:
            left -= torch.cat(behind, -1) @ self.predict
        return left @ self.analysis

    def codes(self, components: Tensor) -> tuple[list[tuple[int, Tensor]], Tensor]:
        """The levels next to components [B, T, K]: bits and int32 codes [B, T, k] run by run, and float32 [B, T, K] of levels."""
        found = [
            (bits, levels, torch.bucketize(components[..., run].contiguous(), edges, out_int32=True))
            for run, bits, levels, edges in self.runs
        ]
        return [(bits, codes) for bits, _, codes in found], torch.cat([levels[codes] for _, levels, codes in found], -1)


def pack(codes: list[tuple[int, Tensor]]) -> Tensor:
    """uint8 [B, T, bytes]: codes of a whole number of bytes, back to back, the lowest bit first."""
    parts = []
    for bits, of_run in codes:
        places = torch.arange(bits, device=of_run.device, dtype=torch.int16)
        parts.append((of_run.to(torch.int16)[..., None] >> places & 1).to(torch.uint8).flatten(-2))
    eights = torch.cat(parts, -1).unflatten(-1, (-1, 8))
    return (eights << torch.arange(8, device=eights.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
