"""Frozen features of labelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..backbone import Backbone
from ..errors import ConfigError

# B batch, N patches, D width

READOUTS = {
    "cls": lambda tokens: tokens[:, 0],
    "mean": lambda tokens: tokens[:, 1:].mean(dim=1),
}


@torch.no_grad()
def extract_features(
    model: Backbone | Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    readouts: tuple[str, ...] = ("cls", "mean"),
    device: str | torch.device = "cpu",
) -> tuple[dict[str, Tensor], Tensor]:
    """Features {readout: float32 [n, D]} and labels int64 [n], on the CPU, of all (images, labels) in `batches`.

    model: a Backbone, which is put in eval mode for the while, or any callable images -> tokens [B, 1+N, D] with CLS
    first. readouts: "cls" is the CLS token, "mean" the mean of the patch tokens, both after the final norm.
    """
    unknown = [name for name in readouts if name not in READOUTS]
    if unknown:
        raise ConfigError(f"There is no readout {unknown[0]!r}; there are {', '.join(READOUTS)}.")

    was_training = isinstance(model, Backbone) and model.training
    encode = model
    if isinstance(model, Backbone):
        model.eval()
        encode = model.encode_all

    features, labels = {name: [] for name in readouts}, []
    try:
        for images, image_labels in batches:
            tokens = encode(images.to(device)).float()  # [B, 1+N, D]
            for name in readouts:
                features[name].append(READOUTS[name](tokens).cpu())
            labels.append(image_labels.cpu())
    finally:
        if was_training:
            model.train()
    if not labels:
        raise ConfigError("There are no images to extract features of.")
    return {name: torch.cat(parts) for name, parts in features.items()}, torch.cat(labels)
