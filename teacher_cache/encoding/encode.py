"""What a store keeps of a teacher's output, worked out where the output is: on the GPU, if the teacher runs there.

The numbers are those that docs/format.md defines, to the bit, on whatever device: tests/oracles.py works them out in numpy.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..format.quantize import ChannelStatistics
from ..format.race import arrivals
from ..format.spec import ARRAY_NAME, StoreSpec
from ..format.transform import Transform
from ..store.nonfinite import finite_rows
from .klt_encode import TransformEncoder

# B batch, L layers, C+N tokens of the teacher, T tokens that are kept, D channels, G groups of channels


class Encoder:
    """Row arrays of one store from a teacher's output.

    statistics: of each layer; empty for float16. view: of the store. transform: of klt.
    """

    def __init__(self, spec: StoreSpec, statistics: dict[int, ChannelStatistics], view: int, device: torch.device,
                 transform: Transform | None = None):  # fmt: skip
        self.spec, self.view, self.device = spec, view, device
        self.transform = None if transform is None else TransformEncoder(spec, transform, statistics, device)
        self.statistics = {
            layer: (torch.tensor(channel.centre, device=device), torch.tensor(channel.spread, device=device))
            for layer, channel in statistics.items()
        }

    def __call__(self, output, rows: np.ndarray) -> Callable[[], dict[str, np.ndarray]]:
        """Begin to encode the output for `rows`; the function that is returned waits for it: array name -> [B, *row shape].

        output: teachers.base.TeacherOutput. There is one array more, `finite`, bool [B]: for which rows it is; what is encoded of
        others is of no use.
        """
        tokens, attention, spec = output.tokens, output.attention, self.spec
        arrays = {"finite": finite_rows(output)}
        if spec.visible:
            arrays["index"] = race(attention, rows, self.view, spec.visible)  # int32 [B, K]
            places = token_places(arrays["index"], tokens.shape[2] - attention.shape[1])
            tokens = take_tokens(tokens, places)  # [B, L, T, D]
        arrays |= self._by_channel(tokens) if self.transform is None else self.transform(tokens)
        if spec.attention:
            arrays["attention"] = attention
        return to_host(arrays)

    def _by_channel(self, tokens: Tensor) -> dict[str, Tensor]:
        """tokens/NN and scale of a store of another dtype, from tokens [B, L, T, D]."""
        arrays, scales = {}, []
        for i, layer in enumerate(self.spec.layers):
            if self.spec.has_scales:
                stored, scale = quantise(tokens[:, i], *self.statistics[layer], self.spec.dtype, self.spec.group)
                scales.append(scale)
            else:
                stored = tokens[:, i].half()
            arrays[ARRAY_NAME.format(layer)] = stored
        if scales:
            arrays["scale"] = torch.stack(scales, 1)  # [B, L, T, G]
        return arrays


def race(attention: Tensor | np.ndarray, rows: np.ndarray, view: int, n_first: int) -> Tensor:
    """The first patches of each row's race (race.py), in their order: int32 [B, n_first]. Patches without attention come last.

    attention: float32 [B, N]. rows: [B], their numbers. The logarithms come from the host: those of two devices differ in the
    last bit.
    """
    attention = torch.as_tensor(attention)
    arriving = torch.from_numpy(arrivals(attention.shape[1], rows, view))  # float64 [B, N]
    if attention.is_cuda:
        arriving = arriving.pin_memory().to(attention.device, non_blocking=True)
    speed = attention.double() / arriving
    return torch.argsort(speed, dim=1, descending=True, stable=True)[:, :n_first].int()


def token_places(patches: Tensor, n_cls: int) -> Tensor:
    """race.places_of on the device: where CLS, if there is one, and `patches` [B, K] stand among all tokens, int64 [B, C+K]."""
    cls = torch.arange(n_cls, device=patches.device).expand(len(patches), -1)
    return torch.cat([cls, patches.long() + n_cls], 1)


def take_tokens(tokens: Tensor, places: Tensor) -> Tensor:
    """The tokens at `places` [B, n] of [B, L, C+N, D]: [B, L, n, D]."""
    return tokens.take_along_dim(places[:, None, :, None], dim=2)


def to_host(tensors: dict[str, Tensor]) -> Callable[[], dict[str, np.ndarray]]:
    """Begin to copy tensors to the host, behind what their device has still to do; the function returned waits for them."""
    copies = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
    done = []
    for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))  # by itself it would look at the current device, cuda:0
        done.append(event)

    def wait() -> dict[str, np.ndarray]:
        for event in done:
            event.synchronize()
        return {name: copy.numpy() for name, copy in copies.items()}

    return wait


def quantise(tokens: Tensor, centre: Tensor, spread: Tensor, dtype: str, group: int) -> tuple[Tensor, Tensor]:
    """float [..., D] -> what is stored of it, and float16 scale [..., G]; on any device, to the same bits.

    Stored is int8 [..., D], in which -128 never occurs, or for int4 uint8 [..., ceil(D / 2)], in which 0 never fills the bytes of
    a group: these are the stores' fill values. centre, spread: float32 [D].
    """
    standard = (tokens.float() - centre).div_(spread)  # in place from here on: each pass over memory counts
    dim = standard.shape[-1]
    n_short = -dim % group  # the last group is filled up with one of its own values, which changes neither end
    padded = torch.cat([standard, standard[..., -1:].expand(*standard.shape[:-1], n_short)], -1) if n_short else standard
    groups = padded.unflatten(-1, (-1, group))  # [..., G, group]
    lowest, highest = groups.aminmax(dim=-1)
    largest = torch.maximum(highest.abs(), lowest.abs())
    if dtype == "int8":
        # by a tensor: for a number CUDA multiplies by its reciprocal, which rounds otherwise
        scale = (largest / torch.tensor(127.0, device=largest.device)).half()
        return _levels(groups, scale, -127, 127)[..., :dim].to(torch.int8), scale
    scale = (torch.where(highest >= -lowest, -largest, largest) / 8).half()
    levels = _levels(groups, scale, -8, 7)
    alone = levels.unflatten(-1, groups.shape[-2:]).amax(-1) == -8  # nothing but -8: +7 of a larger scale says the same
    scale = torch.where(alone, _times(scale, -8 / 7), scale)
    levels = torch.where(alone.repeat_interleave(group, -1), 7, levels)
    return _pack(levels[..., :dim]), scale


def quantise_on_host(tokens: np.ndarray, statistics: ChannelStatistics, dtype: str, group: int) -> tuple[np.ndarray, np.ndarray]:
    """`quantise` of an array: float32 [..., D]."""
    tensors = (torch.from_numpy(values) for values in (tokens, statistics.centre, statistics.spread))
    stored, scale = quantise(*tensors, dtype, group)
    return stored.numpy(), scale.numpy()


def _levels(groups: Tensor, scale: Tensor, least: int, most: int) -> Tensor:
    """float32 [..., G * group]: whole multiples of the scale of each value's group. `groups` is overwritten."""
    step = scale.float()
    step = torch.where(step == 0, torch.inf, step).unsqueeze(-1)  # by which all becomes 0
    return groups.div_(step).round_().clamp_(least, most).flatten(-2)


def _times(scale: Tensor, factor: float) -> Tensor:
    """A product of two float16 numbers as numpy rounds it: the factor first, then the product of both."""
    return (scale.float() * torch.tensor(factor, dtype=torch.float16, device=scale.device).float()).half()


def _pack(levels: Tensor) -> Tensor:
    nibbles = (levels + 8).to(torch.uint8)
    if nibbles.shape[-1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1), value=15)
    return nibbles[..., ::2] | (nibbles[..., 1::2] << 4)
