"""What is measured: an encoder from images to tokens, with all that its features depend on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..batch import Mask, take
from ..errors import ConfigError
from ..exports.record import sha256_tensors
from ..modules.attention import cls_attention
from .features import readouts_of

# B batch, N patches, C 1 with CLS else 0, n patches that are kept, D width

LAYER = "last block, final norm"
"""Which tokens are read of every encoder: those of its last block behind its final norm."""


class Encoder(Protocol):
    """Frozen, in eval mode, on one device."""

    has_cls: bool
    grid: tuple[int, int]
    """(rows, columns) of the patch tokens."""

    def encode_all(self, images: Tensor) -> Tensor:
        """float [B, C+N, D] of normalised images [B, 3, H, W]."""
        ...


@dataclass(frozen=True)
class Subject:
    """An encoder, how its images are to be, and what it is."""

    name: str
    """As it was asked for: the words of a command line."""
    about: str
    """What it is, in words."""
    weights: str
    """SHA-256 over architecture and weights: subjects with the same one give the same features."""
    encoder: Encoder
    image_size: int
    """Side of the input, pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Of the pixels, RGB in 0..1."""
    preset: str = ""
    """What a student was trained by."""
    checkpoint: str = ""
    """The file of a run that was read."""

    @property
    def readouts(self) -> tuple[str, ...]:
        return readouts_of(self.encoder)

    @property
    def network(self) -> nn.Module:
        """The encoder with weights that can be trained. Raises ConfigError for one that only runs as a whole."""
        if not isinstance(self.encoder, nn.Module):
            raise ConfigError(f"{self.name} ({self.about}) runs frozen only. Give a run, an exported file, timm:NAME or random.")
        return self.encoder

    def attention(self, images: Tensor) -> Tensor:
        """float32 [B, N]: CLS to patches in the last block, mean over heads. Raises ConfigError where there is none."""
        own = getattr(self.encoder, "attention", None)
        found = own(images) if own else cls_attention(getattr(self.encoder, "model", self.encoder), images)
        if found is None:
            raise ConfigError(f"{self.name} ({self.about}) has no CLS attention: that takes a plain ViT with a CLS token.")
        return found

    def encode_kept(self, images: Tensor, keep: Tensor) -> Tensor:
        """float [B, C+n, D]: the tokens where the encoder sees the patches `keep`, int64 [B, n], alone.

        Raises ConfigError for an encoder that cannot leave patches out.
        """
        model = getattr(self.encoder, "model", self.encoder)
        if isinstance(model, VisionTransformer) and getattr(model, "mask_token", None) is None:
            tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
            prefix, patches = tokens[:, : model.num_prefix_tokens], tokens[:, model.num_prefix_tokens :]
            tokens = model.norm(model.blocks(torch.cat([prefix, take(patches, keep)], dim=1)))
            first = int(self.encoder.has_cls)
            return torch.cat([tokens[:, :first], tokens[:, model.num_prefix_tokens :]], dim=1)
        if hasattr(model, "behind_blocks") and getattr(model, "mask_token", None) is None:  # ours, with patches dropped
            n_patches = self.encoder.grid[0] * self.encoder.grid[1]
            others = torch.ones(len(keep), n_patches, dtype=torch.bool, device=keep.device).scatter(1, keep, False)
            drop = others.nonzero()[:, 1].view(len(keep), n_patches - keep.shape[1])
            return model.norm(model(images, Mask(keep, drop)).layers[-1])
        raise ConfigError(f"{self.name} ({self.about}) cannot leave patches out: it was built to see all of them.")


class TimmEncoder(nn.Module):
    """A network of timm without a classifier; tokens as its `forward_features` gives them, registers left out."""

    def __init__(self, model: nn.Module, image_size: int):
        super().__init__()
        self.model = model
        self.n_prefix = getattr(model, "num_prefix_tokens", 0)
        self.has_cls = bool(getattr(model, "has_class_token", False))
        with torch.no_grad():
            was_training = model.training
            model.eval()
            self.grid = self._found(torch.zeros(1, 3, image_size, image_size))[1]
            model.train(was_training)

    def encode_all(self, images: Tensor) -> Tensor:
        """float [B, C+N, D]."""
        return self._found(images)[0]

    def _found(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens, and the grid of the patches among them."""
        tokens = self.model.forward_features(images)
        if tokens.ndim == 4:  # a grid without CLS; the channels last, or in the middle
            if getattr(self.model, "output_fmt", "NCHW") != "NHWC":
                tokens = tokens.permute(0, 2, 3, 1)
            return tokens.flatten(1, 2), tuple(tokens.shape[1:3])
        if isinstance(getattr(self.model, "fc_norm", None), nn.LayerNorm) and isinstance(self.model.norm, nn.Identity):
            tokens = self.model.fc_norm(tokens)  # the final norm of a model that timm pools before it
        side = round((tokens.shape[1] - self.n_prefix) ** 0.5)
        return torch.cat([tokens[:, : int(self.has_cls)], tokens[:, self.n_prefix :]], dim=1), (side, side)


class TeacherEncoder:
    """A frozen teacher, which takes uint8 images: tokens of its last block behind its final norm, without any projection.

    teacher: a teacher_cache.teachers.base.Teacher, with whose own mean and deviation the images were normalised.
    Raises ConfigError for one without a final norm that whitened tokens lead to.
    """

    def __init__(self, teacher):
        self.teacher, spec = teacher, teacher.spec
        if not spec.has_final_norm:
            raise ConfigError(
                f"{spec.name} has no final norm of its tokens that could be measured behind. Give a teacher that has one, or the "
                "same network as timm:NAME."
            )
        self.has_cls, self.grid = spec.has_cls, tuple(spec.grid)
        head = {name: torch.from_numpy(teacher.head[name]).to(teacher.device) for name in ("gamma", "beta")}
        self._gamma, self._beta = head["gamma"], head["beta"]
        self._mean, self._std = (torch.tensor(values, device=teacher.device).view(3, 1, 1) for values in (spec.mean, spec.std))

    def encode_all(self, images: Tensor) -> Tensor:
        """float32 [B, C+N, D]."""
        return self._gamma * self._output(images).tokens[:, 0] + self._beta

    def attention(self, images: Tensor) -> Tensor | None:
        """float32 [B, N] as Subject.attention."""
        return self._output(images).attention

    def _output(self, images: Tensor):
        levels = ((images.float() * self._std + self._mean) * 255).round().clamp(0, 255).to(torch.uint8)
        with torch.autocast(images.device.type, enabled=False):  # it has a precision of its own
            return self.teacher(levels.permute(0, 2, 3, 1), [self.teacher.spec.depth])


def fingerprint(architecture: str, module: nn.Module) -> str:
    """SHA-256 of an architecture, in words, and of all tensors of `module`."""
    return hashlib.sha256(f"{architecture}\n{sha256_tensors(module.state_dict())}".encode()).hexdigest()
