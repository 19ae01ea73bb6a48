"""Training images as MAE and BEiT fine-tune on them, by timm's parts; each draw is a function of seed, epoch and image."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from teacher_cache.errors import BadInputError

from ...seeds import position_seed
from .settings import FineTune


class TrainImages(Protocol):
    """Whole labelled images."""

    labels: np.ndarray

    def __len__(self) -> int: ...
    def image(self, index: int) -> Image.Image: ...


@contextmanager
def seeded(*position) -> Iterator[None]:
    """Within the block Python's, numpy's and torch's generators (of CPUs) start from a position; after it they are as before."""
    before = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    seed = position_seed(*position)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.random.set_rng_state(before[2])


def transform_of(settings: FineTune, size: int, mean: Sequence[float], std: Sequence[float]):
    """Random resized crop, flip, RandAugment, normalisation, erasing: PIL image -> float32 [3, size, size]."""
    from timm.data import create_transform
    from timm.data.auto_augment import RandAugment, posterize

    made = create_transform(
        input_size=size,
        is_training=True,
        color_jitter=None,
        auto_augment=f"rand-m{settings.magnitude}-mstd0.5-inc1" if settings.magnitude else None,
        interpolation="bicubic",
        re_prob=settings.erasing,
        re_mode="pixel",
        re_count=1,
        mean=tuple(mean),
        std=tuple(std),
    )
    for part in made.transforms:
        for op in part.ops if isinstance(part, RandAugment) else ():
            if op.aug_fn is posterize:
                op.aug_fn = posterized
    return made


def posterized(image: Image.Image, bits: int, **_) -> Image.Image:
    """timm's posterize, also for 0 bits, which its greatest magnitude asks for: black. Pillow 13 refuses them, earlier ones gave
    black."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits >= 1 else image.point(lambda level: 0)


class Augmented(Dataset):
    """Item (epoch, index) -> (float32 [3, size, size], label); of an image that cannot be read the error, for `collate`."""

    def __init__(self, images: TrainImages, transform, seed: int):
        self._images, self._transform, self._seed = images, transform, seed

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int] | BadInputError:
        epoch, index = place
        try:
            image = self._images.image(index)
        except BadInputError as error:
            return error
        with seeded("finetune image", self._seed, epoch, index):
            return self._transform(image), int(self._images.labels[index])


def leave_signals_alone(worker: int) -> None:
    """For a worker process: a terminal's Ctrl-C reaches it too, and is for the one that it works for, which ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def collate(items: list) -> tuple[Tensor, Tensor] | BadInputError:
    """A batch, or its first error: raised by a worker it would reach the user as a traceback."""
    for item in items:
        if isinstance(item, BadInputError):
            return item
    return default_collate(items)


def mixer(settings: FineTune, n_classes: int):
    """timm's Mixup: (images, labels) -> (mixed images, smoothed targets [B, K]); None where nothing is mixed."""
    from timm.data import Mixup

    if not settings.mixes:
        return None
    return Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=n_classes)
