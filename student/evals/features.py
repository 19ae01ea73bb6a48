"""Frozen features of labelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .watch import Watch, unwatched

# B batch, N patches, C 1 with CLS else 0, D width

READOUTS = {
    "cls": lambda tokens, n_cls: tokens[:, 0],
    "mean": lambda tokens, n_cls: tokens[:, n_cls:].mean(dim=1),
    "patches": lambda tokens, n_cls: tokens[:, n_cls:].half(),
}
"""Of tokens [B, C+N, D]: the CLS token and the mean of the patches, float32 [B, D]; the patches themselves, float16 [B, N, D]."""


def readouts_of(model: nn.Module | Callable) -> tuple[str, ...]:
    """What can be read of a model's tokens: only the mean where a backbone has no CLS."""
    return ("cls", "mean") if getattr(model, "has_cls", True) else ("mean",)


@torch.no_grad()
def extract_features(
    model: nn.Module | Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    readouts: tuple[str, ...] | None = None,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    watch: Watch = unwatched,
) -> tuple[dict[str, Tensor], Tensor]:
    """Features {readout: float32 [n, D]} and labels int64 [n], on the CPU, of all (images, labels) in `batches`.

    model: a backbone, which is put in eval mode for the while, an encoder, or any callable images -> tokens [B, 1+N, D] with CLS
    first. readouts: of READOUTS, all after the final norm; by default "cls" and "mean", of which the model may have only the
    latter. precision: fp32 or bf16 (autocast).
    """
    readouts = readouts or readouts_of(model)
    n_cls = int(getattr(model, "has_cls", True))
    if "cls" in readouts and not n_cls:
        raise ConfigError("This backbone has no CLS token: the readout is mean.")
    unknown = [name for name in readouts if name not in READOUTS]
    if unknown:
        raise ConfigError(f"There is no readout {unknown[0]!r}; there are {', '.join(READOUTS)}.")

    encode = getattr(model, "encode_all", model)
    was_training = encode is not model and getattr(model, "training", False)
    if was_training:
        model.eval()

    features, labels = {name: [] for name in readouts}, []
    device = torch.device(device)
    total = len(batches) if hasattr(batches, "batch_size") else 0  # 0: not known, nothing is shown
    try:
        with watch("features", total, "images") as advance, torch.autocast(device.type, torch.bfloat16, precision == "bf16"):
            for images, image_labels in batches:
                tokens = encode(images.to(device)).float()  # [B, C+N, D]
                for name in readouts:
                    features[name].append(READOUTS[name](tokens, n_cls).cpu())
                labels.append(image_labels.cpu())
                advance(len(images))
    finally:
        if was_training:
            model.train()
    if not labels:
        raise ConfigError("There are no images to extract features of.")
    return {name: torch.cat(batches) for name, batches in features.items()}, torch.cat(labels)
