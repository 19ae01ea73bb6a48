"""What every teacher does the same way, whichever library its blocks come from.

A teacher takes uint8 crops and gives whitened block outputs and one map of attention over the patches.
Preprocessing, taps and whitening stand here once; the files beside this one only say where a library keeps its parts, and
`blocks/` what a kind of block does.

Gives up: blocks of several widths or grids (of a Swin only those of the last stage can be asked for), post-norm blocks,
hybrids.
"""

# B batch, N patches, C 1 with CLS else 0, T all tokens (CLS, registers, patches), D width, L layers, H heads

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..device import require_bf16
from ..errors import UsageError
from ..format.spec import TeacherSpec
from .blocks.attention import AttentionParts, attention_map
from .float32 import full_float32

RESIZE = "bicubic, align_corners=False, no antialias, on the tensor before normalisation"
"""`TeacherSpec.resize` of every teacher."""
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class TeacherOutput:
    """What a teacher says about a batch of crops; plain float32 tensors on the teacher's device, without gradient."""

    tokens: Tensor
    """float32 [B, L, C+N, D]: whitened block outputs, in the order of the layers asked for; CLS first where there is one."""
    attention: Tensor | None
    """float32 [B, N]: of CLS to the patches in the last block, or of the pooling head to them (`TeacherSpec.attention_source`),
    mean over heads; the softmax runs over all keys, so a row sums to at most 1. None where there is no source."""


@dataclass(frozen=True)
class Anatomy:
    """Where a library keeps the parts that are tapped."""

    model: nn.Module
    forward: Callable[[Tensor], object]
    """Runs all blocks on normalised images [B, 3, H, W]; what it returns is not looked at."""
    blocks: Sequence[nn.Module]
    """The blocks 1 to `TeacherSpec.depth`; each gives [B, T, D], or on a grid without CLS [B, rows, columns, D]."""
    final_norm: nn.LayerNorm | None
    """None where `TeacherSpec.head` is `none`."""
    attention_parts: Callable[[nn.Module], AttentionParts] | None
    """Of one block; needed where `TeacherSpec.attention_source` is `cls`."""
    projection: Tensor | None = None
    """[D, E] behind the final norm (CLIP)."""
    pool_attention: Callable[[Tensor], Tensor] | None = None
    """From what the last block gives, float32 [B, T, D], the weights of the pooling head over the patches, float32 [B, N], mean
    over its heads; needed where `TeacherSpec.attention_source` is `pool`."""


def activation_name(module: nn.Module) -> str:
    """`TeacherSpec.activation` of an MLP's activation: `gelu`, `gelu_tanh`, `quick_gelu`, `silu` ..., by its class."""
    name = type(module).__name__.removeprefix("Quick")
    quick = "quick_" * (name != type(module).__name__)
    tanh = "_tanh" * (getattr(module, "approximate", None) == "tanh" or name == "GELUTanh")
    return quick + name.removesuffix("Tanh").lower() + tanh


def activation_of(mlps: Iterable[nn.Module]) -> str:
    """`TeacherSpec.activation`, read off the MLPs of all blocks as they were built; `gated_silu` of a SwiGLU."""
    names = set()
    for mlp in mlps:
        gated = "gated_" * ("glu" in type(mlp).__name__.lower())
        parts = [part for part in mlp.modules() if not [*part.children(), *part.parameters()]]
        names |= {gated + activation_name(part) for part in parts if not isinstance(part, nn.Dropout | nn.Identity)}
    return " and ".join(sorted(names))


def whiten(tokens: Tensor, eps: float) -> Tensor:
    """LayerNorm without affine over the last axis, per token, in float32: (x - mean) / sqrt(biased variance + eps)."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:], eps=eps)


def grid_for(name: str, image_size: int, patch_size: int) -> tuple[int, int]:
    """(rows, columns) of patches of a square input, or UsageError if the patches do not fill it."""
    if image_size < patch_size or image_size % patch_size:
        below = max(patch_size, image_size // patch_size * patch_size)
        raise UsageError(
            f"Teacher {name} has patches of {patch_size} pixels, which do not fill an image of {image_size}. "
            f"Take a multiple: --image-size {below} or {below + patch_size}."
        )
    return (image_size // patch_size,) * 2


def check_precision(precision: str, device: torch.device | str) -> None:
    """Raise UsageError for a precision that does not exist, or would be a mistake on this device."""
    if precision not in PRECISIONS:
        raise UsageError(
            f"Teachers run in {' or '.join(PRECISIONS)}, not {precision!r}. float16 has not float32's range, and one overflow "
            "would spoil every block after it."
        )
    if precision == "bf16":
        require_bf16(str(device))


class Teacher:
    """A frozen teacher: uint8 crops in, targets out.

    Deliberately not an nn.Module: a student that holds one neither trains it, nor switches it to train mode,
    nor saves it.

    spec:              what the store keeps about it
    head:              float32 arrays `gamma` [D], `beta` [D] of the final norm, and `projection` [D, E], each where there is one.
                       final norm = gamma * whitened + beta; CLIP's embedding = final norm @ projection
    ignored_weights:   names in the weights file that belong to no part of this teacher (text tower, classifier)
    precision:         fp32, without TF32 whatever the process's settings, or bf16 by autocast (on a GPU, or a CPU
                       that has it), where the residual stream, the attention map and all outputs stay float32
    weights_read:      what about the weights file is worth saying: the part that was taken, `stored as float16`; may be empty
    """

    is_compiled = False
    """Whether `compile` was called."""
    is_raw = False
    """Whether `give_raw` was called."""

    def __init__(
        self,
        spec: TeacherSpec,
        anatomy: Anatomy,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        ignored_weights: tuple[str, ...] = (),
        weights_read: str = "",
    ):
        self.spec, self.precision, self.ignored_weights, self.weights_read = spec, precision, ignored_weights, weights_read
        self._anatomy = anatomy
        anatomy.model.eval().requires_grad_(False)
        norm, head = anatomy.final_norm, {"projection": anatomy.projection}
        assert (norm is not None) == spec.has_final_norm, "anatomy and description agree on the final norm"
        if norm is not None:  # which may have no scale, or no shift
            head["gamma"] = torch.ones(spec.dim) if norm.weight is None else norm.weight
            head["beta"] = torch.zeros(spec.dim) if norm.bias is None else norm.bias
        self.head: dict[str, np.ndarray] = {
            name: tensor.detach().float().cpu().numpy().copy() for name, tensor in head.items() if tensor is not None
        }
        self.to(device)

    @property
    def network(self) -> nn.Module:
        """The network itself, on the teacher's device, frozen and in eval mode; whoever trains it has another one."""
        return self._anatomy.model

    def __repr__(self) -> str:
        return f"Teacher({self.spec.name}, weights {self.spec.weights}, {self.precision} on {self.device})"

    def to(self, device: torch.device | str) -> Teacher:
        """Move the weights; returns the teacher itself. Raises UsageError for bf16 on a CPU without it."""
        self.device = torch.device(device)
        check_precision(self.precision, self.device)
        self._anatomy.model.to(self.device)
        mean, std = (torch.tensor(channels, device=self.device) for channels in (self.spec.mean, self.spec.std))
        self._mean, self._std = mean.view(3, 1, 1), std.view(3, 1, 1)
        return self

    def compile(self, backend: str = "inductor") -> Teacher:
        """Run each block through torch.compile from now on; returns the teacher itself.

        Outputs differ by rounding. The taps stay outside of what is compiled.
        """
        for block in self._anatomy.blocks:
            block.forward = torch.compile(block.forward, backend=backend)
        self.is_compiled = True
        return self

    def give_raw(self) -> Teacher:
        """Give block outputs as they are from now on, not whitened, for ablations; returns the teacher itself."""
        self.is_raw = True
        return self

    # no_grad, not inference_mode: a live student's loss saves the targets for its backward pass, which tensors made
    # under inference_mode refuse
    @torch.no_grad()
    def __call__(self, images_u8: Tensor, layers: Sequence[int], precision: str | None = None) -> TeacherOutput:
        """Targets of a batch of square RGB crops.

        images_u8: uint8 [B, side, side, 3] on the teacher's device; another side than `spec.image_size` is resized.
        layers:    block numbers, ascending, counted from 1; `spec.depth` is the last block.
        precision: of this batch alone, `fp32` or `bf16`; None: the teacher's own.
        Raises UsageError for anything else.
        """
        images = self.preprocess(images_u8)  # [B, 3, H, W]
        assert not any(module.training for module in self._anatomy.model.modules()), "a teacher in train mode"
        if precision is not None:
            check_precision(precision, self.device)
        layers, precision = self._check_layers(layers), precision or self.precision
        n_prefix = int(self.spec.has_cls) + self.spec.n_registers

        is_fp32 = precision == "fp32"
        exact = full_float32() if is_fp32 else nullcontext()
        with exact, self._taps(layers) as tapped, torch.autocast(self.device.type, torch.bfloat16, enabled=not is_fp32):
            self._anatomy.forward(images)

        tokens = torch.stack([tapped[number] for number in layers], dim=1)  # [B, L, T, D]
        if self.spec.n_registers:
            tokens = torch.cat([tokens[:, :, : int(self.spec.has_cls)], tokens[:, :, n_prefix:]], dim=2)
        return TeacherOutput(tokens, tapped.get("attention"))

    def preprocess(self, images_u8: Tensor) -> Tensor:
        """The float32 [B, 3, H, W] that the first layer sees: levels / 255, resized by RESIZE's rule, normalised."""
        if images_u8.dtype != torch.uint8 or images_u8.ndim != 4 or images_u8.shape[3] != 3:
            raise UsageError(f"Crops must be uint8 [B, side, side, 3], not {images_u8.dtype} {list(images_u8.shape)}.")
        if images_u8.shape[1] != images_u8.shape[2]:
            raise UsageError(f"Crops must be square, not {images_u8.shape[1]} x {images_u8.shape[2]} pixels.")
        if images_u8.device.type != self.device.type:
            raise UsageError(f"The crops are on {images_u8.device}, the teacher on {self.device}.")
        images = images_u8.permute(0, 3, 1, 2).float() / 255  # [B, 3, H, W]
        size = self.spec.image_size
        if images.shape[2] != size:
            images = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False, antialias=False)
        return (images - self._mean) / self._std

    def _check_layers(self, layers: Sequence[int]) -> tuple[int, ...]:
        layers = tuple(layers)
        in_range = all(1 <= number <= self.spec.depth for number in layers)
        if not layers or not in_range or sorted(set(layers)) != list(layers):
            raise UsageError(
                f"Layers {list(layers)} of {self.spec.name}: give block numbers 1 to {self.spec.depth}, ascending, "
                f"each once; {self.spec.depth} is the last block."
            )
        return layers

    @contextmanager
    def _taps(self, layers: Sequence[int]):
        """Hooks that fill {block number: whitened output [B, T, D]} and, with a source, {"attention": [B, N]} on a forward."""
        tapped: dict = {}
        blocks, parts_of, spec = self._anatomy.blocks, self._anatomy.attention_parts, self.spec
        pool_attention = self._anatomy.pool_attention

        def keep_stream_float32(block, inputs):  # open_clip rounds it to bf16 under autocast, timm does not
            return (inputs[0].float(), *inputs[1:])

        def tap_output(number):
            def hook(block, inputs, output):
                tokens = output.flatten(1, -2)  # a grid becomes [B, T, D], row by row
                tapped[number] = tokens.float() if self.is_raw else whiten(tokens, spec.norm_eps)

            return hook

        def tap_cls(block, inputs, named):
            with torch.autocast(inputs[0].device.type, enabled=False):
                tapped["attention"] = attention_map(inputs[0], parts_of(block), named.get("rope"))

        def tap_pool(block, inputs, output):
            with torch.autocast(output.device.type, enabled=False):
                tapped["attention"] = pool_attention(output.flatten(1, -2).float())

        handles = [blocks[0].register_forward_pre_hook(keep_stream_float32)]
        handles += [blocks[number - 1].register_forward_hook(tap_output(number)) for number in layers]
        if spec.attention_source == "cls":
            handles.append(blocks[-1].register_forward_pre_hook(tap_cls, with_kwargs=True))
        elif spec.attention_source == "pool":
            handles.append(blocks[-1].register_forward_hook(tap_pool))
        try:
            yield tapped
        finally:
            for handle in handles:
                handle.remove()
