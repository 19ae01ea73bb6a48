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
from ..format.transform import DISTORTION, ESCAPED, LayerCode, Transform
from ..teachers.float32 import full_float32

# B batch, L layers, T tokens, D width, K components that have bits


class TransformEncoder:
    """tokens/NN of a klt store from whitened tokens.

    statistics: of each layer.
    """

    def __init__(self, spec: StoreSpec, transform: Transform, statistics: dict[int, ChannelStatistics], device: torch.device):
        self.spec = spec
        kept = {layer: code.n_kept for layer, code in transform.layers.items()}
        self.layers = {
            layer: _Layer(code, transform, statistics[layer], [kept[other] for other in spec.read_with(layer)[:-1]], device)
            for layer, code in transform.layers.items()
        }

    def __call__(self, tokens: Tensor) -> dict[str, Tensor]:
        """tokens: float [B, L, T, D], finite. Returns array name -> uint8 [B, T, bytes of a token]."""
        arrays, read = {}, {}
        with full_float32():
            for place in reversed(range(len(self.spec.layers))):
                layer = self.spec.layers[place]
                behind = [read[other] for other in self.spec.read_with(layer)[:-1]]
                arrays[ARRAY_NAME.format(layer)], read[layer] = self.layers[layer].encode(tokens[:, place], behind)
        return arrays


class _Layer:
    """A LayerCode on a device. n_behind: components with bits of each layer that predicts it."""

    def __init__(self, code: LayerCode, transform: Transform, statistics: ChannelStatistics, n_behind: list[int],
                 device: torch.device):  # fmt: skip
        dim, kept = len(code.mean), slice(code.n_kept)
        on = lambda values: torch.tensor(np.ascontiguousarray(values, "float32"), device=device)  # noqa: E731
        self.scales = on(transform.scales)
        self.edges = on(transform.scales[1 : ESCAPED - 1] * transform.scales[2:ESCAPED])  # of the mean square
        own = code.basis[-dim:][kept].astype("float64") / statistics.spread  # [K, D]
        analysis = (own / statistics.spread / (own**2).sum(1, keepdims=True)).T
        rows = [code.basis[place * dim : place * dim + n].astype("float64") for place, n in enumerate(n_behind)]
        self.mean, self.analysis = on(code.mean), on(analysis)
        self.predict = [on(of_layer @ analysis) for of_layer in rows]  # [K of a layer behind, K] each
        self.by_basis = _Coding(code.bits[kept], 1 / np.maximum(code.unit[kept], 1e-30), transform, on)
        self.by_itself = _Coding(code.flat_bits[kept], np.ones(code.n_kept), transform, on)
        self.unit, self.deviation = on(code.unit[kept]), on(1 / np.maximum(code.unit[kept], 1e-30))
        self.n_bits = int(code.bits.sum())

    def encode(self, tokens: Tensor, behind: list[Tensor]) -> tuple[Tensor, Tensor]:
        """uint8 [B, T, bytes] of tokens [B, T, D], and the values that are read from it, float32 [B, T, K]. behind: those read of
        the layers behind it."""
        alone = (tokens.float() - self.mean) @ self.analysis  # [B, T, K]
        own, alone = alone, alone * self.deviation
        for values, predict in zip(behind, self.predict, strict=True):
            own.flatten(0, 1).addmm_(values.flatten(0, 1), predict, alpha=-1)  # in place: `flatten` is a view
        (number, scale), (flat_number, flat_scale) = self._scale(own), self._scale(alone)
        escapes = self.by_itself.noise(alone, flat_scale) < self.by_basis.noise(own, scale)  # [B, T, 1]
        stored, levels = self.by_basis.codes(own / scale, self.n_bits)
        if tokens.is_cuda or escapes.any():  # a GPU would have to be waited for
            flat_stored, flat_levels = self.by_itself.codes(alone / flat_scale, self.n_bits)
            stored, levels = torch.where(escapes, flat_stored, stored), torch.where(escapes, flat_levels * self.unit, levels)
            number = torch.where(escapes, flat_number + ESCAPED, number)
        return torch.cat([number.to(torch.uint8), stored], -1), levels * self.scales[number]

    def _scale(self, components: Tensor) -> tuple[Tensor, Tensor]:
        """Number and value of each token's scale, [B, T, 1]: the root mean square of its components, rounded."""
        number = 1 + torch.bucketize(components.square().mean(-1, keepdim=True), self.edges)
        return number, self.scales[number]


class _Coding:
    """bits, deviations: [K], of components in units of these, in tokens standardised by channel. on: an array on the device."""

    def __init__(self, bits: np.ndarray, deviations: np.ndarray, transform: Transform, on):
        self.runs = []  # of components with equally many bits
        for n_bits in np.unique(bits)[::-1].tolist():
            which = np.flatnonzero(bits == n_bits)
            levels = on(transform.levels_of(n_bits))
            self.runs.append((slice(which[0], which[-1] + 1), n_bits, levels, (levels[1:] + levels[:-1]) * 0.5))
        self.tables = self._tables() if self.runs[0][2].device.type == "cpu" else None
        self.deviations, self.top = on(deviations), on([transform.levels_of(n)[-1] for n in bits])
        self.expected = float((deviations**2 * np.array(DISTORTION)[bits]).sum())

    def noise(self, components: Tensor, scale: Tensor) -> Tensor:
        """The squared error to be expected of each token, [B, T, 1]: that of rounding, and of what is beyond the levels."""
        beyond = (components.abs() - scale * self.top).clamp_(min=0).mul_(self.deviations)
        return beyond.square_().sum(-1, keepdim=True) + scale.square() * self.expected

    def _tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """runs, edges, levels, as kernels/coding.py takes them."""
        runs, first_edge, first_level = [], 0, 0
        for run, n_bits, levels, edges in self.runs:
            runs.append((run.start, run.stop, n_bits, first_edge, first_level))
            first_edge, first_level = first_edge + len(edges), first_level + len(levels)
        edges, levels = (np.concatenate([run[part].numpy() for run in self.runs]) for part in (3, 2))
        return np.array(runs, "int64"), edges, levels

    def codes(self, values: Tensor, n_bits: int) -> tuple[Tensor, Tensor]:
        """Of values [B, T, K] the codes of the nearest levels, packed, uint8 [B, T, n_bits / 8], and these levels [B, T, K]."""
        if self.tables is not None:
            from ..kernels.coding import code_values

            stored, nearest = values.new_empty((*values.shape[:-1], n_bits // 8), dtype=torch.uint8), torch.empty_like(values)
            flat = [tensor.flatten(0, -2).numpy() for tensor in (values.contiguous(), stored, nearest)]
            code_values(flat[0], *self.tables, *flat[1:])
            return stored, nearest
        found = [
            (bits, levels, torch.bucketize(values[..., run].contiguous(), edges, out_int32=True))
            for run, bits, levels, edges in self.runs
        ]
        nearest = torch.cat([levels[codes] for _, levels, codes in found], -1)
        return pack([(bits, codes) for bits, _, codes in found], n_bits), nearest


def pack(codes: list[tuple[int, Tensor]], n_bits: int) -> Tensor:
    """uint8 [B, T, n_bits / 8]: codes back to back, the lowest bit first, zeros behind the last. codes: bits, and [B, T, k]."""
    parts = []
    for bits, of_run in codes:
        places = torch.arange(bits, device=of_run.device, dtype=torch.int16)
        parts.append((of_run.to(torch.int16)[..., None] >> places & 1).to(torch.uint8).flatten(-2))
    n_left = n_bits - sum(part.shape[-1] for part in parts)
    parts.append(parts[0].new_zeros((*parts[0].shape[:-1], n_left)))
    eights = torch.cat(parts, -1).unflatten(-1, (-1, 8))
    return (eights << torch.arange(8, device=eights.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
