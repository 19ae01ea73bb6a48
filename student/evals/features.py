"""Frozen features of labelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..errors import ConfigError

# B batch, N patches, C 1 with CLS else 0, D width

READOUTS = {
    "cls": lambda tokens, n_cls: tokens[:, 0],
    "mean": lambda tokens, n_cls: tokens[:, n_cls:].mean(dim=1),
}


def readouts_of(model: nn.Module | Callable) -> tuple[str, ...]:
    """What can be read of a model's tokens: only the mean where a backbone has no CLS."""
    return tuple(READOUTS) if getattr(model, "has_cls", True) else ("mean",)


@torch.no_grad()
def extract_features(
    model: nn.Module | Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    readouts: tuple[str, ...] | None = None,
    device: str | torch.device = "cpu",
) -> tuple[dict[str, Tensor], Tensor]:
    """Features {readout: float32 [n, D]} and labels int64 [n], on the CPU, of all (images, labels) in `batches`.

    model: a backbone, which is put in eval mode for the while, or any callable images -> tokens [B, 1+N, D] with CLS
    first. readouts: "cls" is the CLS token, "mean" the mean of the patch tokens, both after the final norm; by default all that
    the model has.
    """
    readouts = readouts or readouts_of(model)
    n_cls = int(getattr(model, "has_cls", True))
    if "cls" in readouts and not n_cls:
        raise ConfigError("This backbone has no CLS token: the readout is mean.")
    unknown = [name for name in readouts if name not in READOUTS]
    if unknown:
        raise ConfigError(f"There is no readout {unknown[0]!r}; there are {', '.join(READOUTS)}.")

    is_backbone = hasattr(model, "encode_all")
    was_training = is_backbone and model.training
    encode = model
    if is_backbone:
        model.eval()
        encode = model.encode_all

    features, labels = {name: [] for name in readouts}, []
    try:
        for images, image_labels in batches:
            tokens = encode(images.to(device)).float()  # [B, C+N, D]
            for name in readouts:
                features[name].append(READOUTS[name](tokens, n_cls).cpu())
            labels.append(image_labels.cpu())
    finally:
        if was_training:
            model.train()
    if not labels:
        raise ConfigError("There are no images to extract features of.")
    return {name: torch.cat(batches) for name, batches in features.items()}, torch.cat(labels)
