"""Images and a teacher whose content is a pure function of their index or pixels, so that any mix-up shows."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from teacher_cache.format.spec import TeacherSpec
from teacher_cache.teachers.base import TeacherOutput, whiten


def image_of(index: int) -> Image.Image:
    """A picture that no other index has: 40 to 71 pixels a side, a gradient, a disc and stripes."""
    height, width = 40 + index * 7 % 32, 40 + index * 11 % 32
    y, x = np.mgrid[:height, :width]
    red = (x * 5 + index * 37) % 256
    green = (y * 5 + index * 91) % 256
    blue = np.where((x - width / 2) ** 2 + (y - height / 2) ** 2 < (8 + index % 9) ** 2, 255, (x + y) * (1 + index % 5) % 256)
    return Image.fromarray(np.stack([red, green, blue], -1).astype("uint8"))


def write_images(folder: Path, n_classes: int = 3, per_class: int = 8) -> Path:
    """Class folders of PNGs: class-0/image-000.png ..., `image_of` a running index."""
    for index in range(n_classes * per_class):
        path = folder / f"class-{index // per_class}" / f"image-{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image_of(index).save(path)
    return folder


class FakeTeacher:
    """A teacher without weights: each block is a fixed random projection of the pixels of a patch. Deterministic and fast.

    32 px, patches of 8: a grid of 4 x 4. Width 24, 6 blocks, CLS = mean of the patches, projection to 10.

    pools: attention is that of a pooling head, and not of CLS. has_head: else there is neither final norm nor projection.
    """

    def __init__(self, seed: int = 0, has_cls: bool = True, pools: bool = False, has_head: bool = True):
        generator = torch.Generator().manual_seed(seed)
        self.blocks = torch.randn(6, 192, 24, generator=generator) / 192**0.5
        self.gamma, self.beta = (torch.randn(24, generator=generator) for _ in range(2))
        self.projection = torch.randn(24, 10, generator=generator)
        digest = hashlib.sha256(self.blocks.numpy().tobytes()).hexdigest()
        self.spec = TeacherSpec(
            name="fake", weights=f"random:{seed}", weights_sha256=digest, image_size=32, patch_size=8, grid=(4, 4), dim=24,
            depth=6, heads=2, has_cls=has_cls, n_registers=0, mean=(0.5,) * 3, std=(0.5,) * 3, norm_eps=1e-5,
            projection_dim=10 if has_head else None, resize="none", activation="none", positions="none",
            attention_source="pool" if pools else "cls" if has_cls else None, head="layernorm" if has_head else "none",
        )  # fmt: skip
        self.head = (
            {}
            if not has_head
            else {"gamma": self.gamma.numpy(), "beta": self.beta.numpy(), "projection": self.projection.numpy()}
        )
        self.device, self.precision = torch.device("cpu"), "fp32"
        self.ignored_weights, self.weights_read, self.is_compiled, self.is_raw = (), "", False, False
        self.n_calls = 0

    def __call__(self, images_u8, layers) -> TeacherOutput:
        self.n_calls += 1
        assert images_u8.dtype == torch.uint8 and images_u8.shape[1:] == (32, 32, 3)
        patches = images_u8.reshape(-1, 4, 8, 4, 8, 3).transpose(2, 3).reshape(-1, 16, 192).float() / 127.5 - 1  # [B, N, 192]
        tokens = torch.einsum("bnp,lpd->blnd", patches, self.blocks[[layer - 1 for layer in layers]])
        tokens = torch.cat([tokens.mean(2, keepdim=True), tokens], 2) if self.spec.has_cls else tokens
        sharpness = {"cls": 4, "pool": 2, None: 0}[self.spec.attention_source]
        attention = patches.mean(2).mul(sharpness).softmax(1) if sharpness else None
        return TeacherOutput(whiten(tokens, self.spec.norm_eps), attention)


class Bf16Teacher(FakeTeacher):
    """Says it runs in bf16, where it answers with an offset that tells the precisions apart, and with NaN for crops of `broken`.

    broken: crops (uint8 [n, 32, 32, 3]) that overflow in bf16. in_fp32: those that do so in fp32 too. glitches: how many of its
    first calls give NaN for all rows.
    """

    OFFSET = 0.01

    def __init__(self, broken=(), in_fp32=(), glitches=0, **kwargs):
        super().__init__(**kwargs)
        self.precision, self.broken, self.in_fp32, self.glitches, self.alone = "bf16", broken, in_fp32, glitches, 0

    def __call__(self, images, layers, precision=None):
        output = super().__call__(images, layers)
        if precision == "fp32":
            self.alone += 1
        among = self.in_fp32 if precision == "fp32" else self.broken
        is_broken = torch.tensor([any(np.array_equal(image, crop) for crop in among) for image in images.numpy()])
        if precision is None and self.glitches:
            self.glitches -= 1
            is_broken[:] = True
        tokens = output.tokens + (self.OFFSET if precision is None else 0)
        tokens[is_broken] = torch.nan
        return replace(output, tokens=tokens)
