"""Stored tokens back to float, on the device of the training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from teacher_cache.format.quantize import ChannelStatistics
from teacher_cache.format.spec import ARRAY_NAME, StoreSpec
from teacher_cache.format.transform import ESCAPED, LayerCode, Transform, starts_of

# B batch, T tokens of a row, D width, G groups of channels, K components of a layer that are kept


def dequantise(stored: Tensor, scale: Tensor, centre: Tensor, spread: Tensor, group: int, out: Tensor | None = None) -> Tensor:
    """format/quantize.py on the device: int8 [B, T, D] or, two to a byte, uint8 [B, T, ceil(D / 2)], and float16 [B, T, G] ->
    float32 [B, T, D], in `out` if it is given.

    As few passes over float32 values as can be: on a CPU or a GPU they take longer than the arithmetic.
    """
    dim = len(centre)
    if stored.dtype == torch.uint8:
        levels = torch.stack([stored & 15, stored >> 4], -1).flatten(-2)[..., :dim].view(torch.int8) - 8
    else:
        levels = stored
    if dim % group == 0:
        standardised = (levels.unflatten(-1, (-1, group)) * scale.float().unsqueeze(-1)).flatten(-2)
    else:
        standardised = levels * scale.float().repeat_interleave(group, dim=-1)[..., :dim]
    return torch.addcmul(centre, standardised, spread, out=out)


class PlainDecoder:
    """`dequantise` for whole stores: the rows of an int8, int4 or float16 store -> float32 tokens of some of its layers.

    statistics: per layer of the store. layers: block numbers.
    """

    def __init__(self, spec: StoreSpec, statistics: dict[int, ChannelStatistics], layers: Sequence[int], device: torch.device):
        self.spec, self.layers = spec, layers
        self.statistics = [
            [torch.tensor(values, device=device) for values in (statistics[layer].centre, statistics[layer].spread)]
            for layer in (layers if spec.has_scales else ())
        ]

    def __call__(self, stored: Callable[[str], Tensor], out: Tensor) -> None:
        """Fill `out`, float32 [L, B, T, D]. stored: the rows of an array by its name, as StoreSpec.row_shape has them."""
        scale = stored("scale") if self.statistics else None  # [B, layers of the store, T, G]
        for i, layer in enumerate(self.layers):
            if scale is None:
                out[i] = stored(ARRAY_NAME.format(layer))
            else:
                of_layer = scale[:, self.spec.layers.index(layer)]
                dequantise(stored(ARRAY_NAME.format(layer)), of_layer, *self.statistics[i], self.spec.group, out=out[i])


class TransformDecoder:
    """format/transform.py on the device: the codes of a klt store -> float32 tokens of some of its layers.

    layers: block numbers. Products are in float32; on a GPU both factors are rounded to bfloat16 first, each by a relative 2**-9
    at most, and added up in float32.
    """

    def __init__(self, spec: StoreSpec, transform: Transform, layers: Sequence[int], device: torch.device):
        self.layers = [spec.read_with(layer) for layer in layers]
        self.values = {layer: _Values(transform.layers[layer], transform, device) for read in self.layers for layer in read}
        self.on_gpu = device.type == "cuda"
        self.products = []
        for read in self.layers:
            code, dim = transform.layers[read[-1]], len(transform.layers[read[-1]].mean)
            rows = [code.basis[i * dim : i * dim + transform.layers[other].n_kept] for i, other in enumerate(read)]
            basis, mean = (torch.tensor(array, device=device) for array in (np.concatenate(rows), code.mean))
            self.products.append((basis.bfloat16() if self.on_gpu else basis, mean))

    def __call__(self, stored: Callable[[str], Tensor], out: Tensor) -> None:
        """Fill `out`, float32 [L, B, T, D]. stored: the rows of an array by its name, uint8 [B, T, bytes of a token]."""
        read = {layer: values(stored(ARRAY_NAME.format(layer))) for layer, values in self.values.items()}
        for layers, (basis, mean), tokens in zip(self.layers, self.products, out, strict=True):
            (own, escaped), behind = read[layers[-1]], [read[layer][0] for layer in layers[:-1]]
            if escaped is not None:
                behind = [values.masked_fill(escaped, 0) for values in behind]
            flat = tokens.view(-1, len(mean))
            if self.on_gpu:
                values = torch.cat([*behind, own], -1).flatten(0, 1)  # [B * T, K of all of them]
                torch.mm(values.bfloat16(), basis, out_dtype=torch.float32, out=flat).add_(mean)
                continue
            parts = basis.split([values.shape[-1] for values in (*behind, own)])
            torch.addmm(mean, own.flatten(0, 1), parts[-1], out=flat)
            for values, part in zip(behind, parts[:-1], strict=True):
                flat.addmm_(values.flatten(0, 1), part)


class _Values:
    """From the bytes of a layer's tokens to its values: which bytes and bits a code has, and what it stands for."""

    def __init__(self, code: LayerCode, transform: Transform, device: torch.device):
        on = lambda values: torch.tensor(values, device=device)  # noqa: E731
        self.levels, self.scales, self.unit = on(transform.levels), on(transform.scales), on(code.unit[: code.n_kept])
        self.by_basis, self.by_itself = (
            (on(1 + starts_of(bits) // 8), *(on(part).int() for part in (starts_of(bits) % 8, 2**bits - 1, 2**bits - 2)))
            for bits in (code.bits[: code.n_kept], code.flat_bits[: code.n_kept])
        )

    def __call__(self, stored: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 [B, T, bytes] -> float32 [B, T, K], and which tokens are coded by themselves, bool [B, T, 1]; None: none is."""
        number, wide = stored[..., :1].int(), torch.nn.functional.pad(stored, (0, 2)).int()
        words = wide[..., :-2] | wide[..., 1:-1] << 8 | wide[..., 2:] << 16  # a code of 10 bits ends within 3 bytes
        values, escaped = self._levels(words, *self.by_basis), number >= ESCAPED
        if stored.is_cuda or escaped.any():  # a GPU would have to be waited for
            values = torch.where(escaped, self._levels(words, *self.by_itself).mul_(self.unit), values)
        else:
            escaped = None
        return values.mul_(self.scales[number]), escaped

    def _levels(self, words: Tensor, byte: Tensor, shift: Tensor, mask: Tensor, first: Tensor) -> Tensor:
        """float32 [B, T, K]"""
        codes = words.index_select(-1, byte).bitwise_right_shift_(shift).bitwise_and_(mask).add_(first)
        return self.levels[codes]
